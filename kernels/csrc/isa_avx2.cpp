#define ISA "avx2"
#define KERNELS kernels_avx2
#include "isa.inc"
