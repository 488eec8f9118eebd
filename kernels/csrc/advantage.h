// Group-relative advantages: a few thousand numbers per step, in double, in order. Compiled without
// instruction-set flags.
#pragma once
#include <stdint.h>
#include <string>

struct AdvantageArgs {
  const void *rewards;              // [N] float, or double when `wide`
  const int64_t *group_ids, *roles; // [N]; roles may be null
  const bool *scored;               // [N]
  float *value;                     // [N]
  int64_t *counts;                  // [S, R] scored members
  bool *flat;                       // [S, R] some, with equal rewards
  const double *baseline;           // [R], NaN: none yet; or null
  double *new_baseline;             // [R] or null
  int64_t N, S, R;
  int method; // 0 std, 1 mean, 2 leave one out, 3 running
  double decay;
  bool wide;
};

std::string group_advantages(const AdvantageArgs *a); // what is wrong with the group and role ids, or nothing
