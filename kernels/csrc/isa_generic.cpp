#define ISA "generic"
#define KERNELS kernels_generic
#include "isa.inc"
