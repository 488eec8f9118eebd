// Supports: the tokens that truncation left to a row. Compiled without instruction-set flags.
#pragma once
#include "kernels.h"

#include <string>

std::string check_supports(
    const HeadArgs *a); // what is wrong with the values of a support, target or temperature, or nothing
void take_supports(const int64_t *counts, int32_t **stash, int64_t N,
                   int32_t *ids); // of N rows, one after the other; frees
