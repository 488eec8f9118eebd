// Chooses the instruction set once. Compiled without any instruction-set flag, so that it runs anywhere.
#pragma once
#include "kernels.h"

const Kernels *best_kernels();
const Kernels *find_kernels(const char *name); // null when unknown here or not runnable on this machine
const char *refused_tiles();                   // why tiles that the processor has do not serve, or nothing
