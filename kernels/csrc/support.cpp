#include "support.h"

#include <algorithm>
#include <stdlib.h>
#include <string.h>

std::string check_supports(const HeadArgs *a) {
  auto number = [](auto x) { return std::to_string(x); };
  const std::string size = number(a->n_kept), last = number(a->V - 1);
  if (a->kept_offsets[0] != 0) return "kept_offsets[0] = " + number(a->kept_offsets[0]) + ", accepted is 0";
  for (int64_t n = 0; n < a->N; ++n) {
    const int64_t begin = a->kept_offsets[n], end = a->kept_offsets[n + 1], target = a->targets[n];
    const std::string row = "[" + number(n) + "] = ";
    if (end < begin || end > a->n_kept || (n == a->N - 1 && end != a->n_kept))
      return "kept_offsets[" + number(n + 1) + "] = " + number(end) +
             ", accepted is rising from 0 to len(kept_ids) = " + size;
    for (int64_t j = begin; j < end; ++j)
      if (a->kept_ids[j] < 0 || a->kept_ids[j] >= a->V || (j > begin && a->kept_ids[j] <= a->kept_ids[j - 1]))
        return "kept_ids[" + number(j) + "] = " + number(a->kept_ids[j]) + ", accepted is 0 to " + last +
               ", rising within a row";
    if (target < 0 || target >= a->V) return "targets" + row + number(target) + ", accepted is 0 to " + last;
    if (begin < end && !std::binary_search(a->kept_ids + begin, a->kept_ids + end, (int32_t)target))
      return "targets" + row + number(target) + ", accepted is one of the kept ids of its row";
    if (!(a->temperature[n] > 0))
      return "temperature" + row + number(a->temperature[n]) + ", accepted is above 0";
  }
  if (a->N == 0 && a->n_kept) return "kept_ids has " + size + " entries, accepted is none for no rows";
  return "";
}

void take_supports(const int64_t *counts, int32_t **stash, int64_t N, int32_t *ids) {
  for (int64_t n = 0; n < N; ++n) {
    if (counts[n] == 0) continue;
    memcpy(ids, stash[n], (size_t)counts[n] * sizeof(int32_t));
    free(stash[n]);
    ids += counts[n];
  }
}
