#define ISA "avx512"
#define KERNELS kernels_avx512
#include "isa.inc"
