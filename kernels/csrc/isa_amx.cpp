#define ISA "amx"
#define KERNELS kernels_amx
#define DUOLOGUE_TILES 1
#include "isa.inc"
