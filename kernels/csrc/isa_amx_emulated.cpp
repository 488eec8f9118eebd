#define ISA "amx-emulated"
#define KERNELS kernels_amx_emulated
#define DUOLOGUE_TILES 2
#include "isa.inc"
