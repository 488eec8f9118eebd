// Chooses the instruction set once. Compiled without any instruction-set flag, so that it runs anywhere.
#pragma once
#include "table.h"

const Table *best_table();
const Table *find_table(const char *name); // null when unknown here or not runnable on this machine
