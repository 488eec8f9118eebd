#define ISA "avx512bf16"
#define KERNELS kernels_avx512bf16
#include "isa.inc"
