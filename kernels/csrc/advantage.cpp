#include "advantage.h"

#include <math.h>
#include <vector>

namespace {

constexpr double kEps = 1e-4;

struct Sums {
  double low = 0, high = 0, sum = 0,
         square = 0; // sum: of what is above `low`; square: of the distance to the mean
  int64_t count = 0;
  double mean() const { return low + (count ? sum / (double)count : 0.0); }
};

double reward(const AdvantageArgs *a, int64_t n) {
  return a->wide ? ((const double *)a->rewards)[n] : (double)((const float *)a->rewards)[n];
}

// Shifted by the smallest member, equal rewards have exactly their own value as mean.
template <class Key> std::vector<Sums> collect(const AdvantageArgs *a, int64_t size, Key key) {
  std::vector<Sums> all((size_t)size);
  for (int64_t n = 0; n < a->N; ++n) {
    if (!a->scored[n]) continue;
    Sums &s = all[(size_t)key(n)];
    const double r = reward(a, n);
    s.low = s.count && s.low < r ? s.low : r, s.high = s.count && s.high > r ? s.high : r;
    ++s.count;
  }
  for (int64_t n = 0; n < a->N; ++n)
    if (a->scored[n]) all[(size_t)key(n)].sum += reward(a, n) - all[(size_t)key(n)].low;
  for (int64_t n = 0; n < a->N; ++n)
    if (a->scored[n]) {
      Sums &s = all[(size_t)key(n)];
      const double d = reward(a, n) - s.mean();
      s.square += d * d;
    }
  return all;
}

double advantage(int method, const Sums &s, double r) {
  if (s.low == s.high) return 0.0;
  const double centred = r - s.mean(), others = (double)(s.count - 1);
  if (method == 0) return centred / (sqrt(s.square / others) + kEps);
  return method == 1 ? centred : centred * ((double)s.count / others);
}

std::string check_ids(const AdvantageArgs *a) {
  for (int64_t n = 0; n < a->N; ++n) {
    const std::string row = "[" + std::to_string(n) + "] = ";
    if (a->group_ids[n] < 0 || a->group_ids[n] >= a->S)
      return "group_ids" + row + std::to_string(a->group_ids[n]) + ", accepted is 0 to " +
             std::to_string(a->S - 1);
    if (a->roles && (a->roles[n] < 0 || a->roles[n] >= a->R))
      return "roles" + row + std::to_string(a->roles[n]) + ", accepted is 0 to " + std::to_string(a->R - 1);
  }
  return "";
}

} // namespace

std::string group_advantages(const AdvantageArgs *a) {
  const std::string error = check_ids(a);
  if (!error.empty()) return error;
  auto role = [&](int64_t n) { return a->roles ? a->roles[n] : 0; };
  auto segment = [&](int64_t n) { return a->group_ids[n] * a->R + role(n); };
  const std::vector<Sums> groups = collect(a, a->S * a->R, segment);
  for (int64_t s = 0; s < a->S * a->R; ++s) {
    a->counts[s] = groups[(size_t)s].count;
    a->flat[s] = groups[(size_t)s].count && groups[(size_t)s].low == groups[(size_t)s].high;
  }
  if (a->method != 3) {
    for (int64_t n = 0; n < a->N; ++n)
      a->value[n] =
          a->scored[n] ? (float)advantage(a->method, groups[(size_t)segment(n)], reward(a, n)) : 0.0f;
    return "";
  }
  const std::vector<Sums> roles = collect(a, a->R, role);
  auto before = [&](int64_t r) { return isnan(a->baseline[r]) ? roles[(size_t)r].mean() : a->baseline[r]; };
  for (int64_t n = 0; n < a->N; ++n)
    a->value[n] = a->scored[n] ? (float)(reward(a, n) - before(role(n))) : 0.0f;
  for (int64_t r = 0; r < a->R; ++r) {
    const Sums &s = roles[(size_t)r];
    a->new_baseline[r] = s.count ? a->decay * before(r) + (1 - a->decay) * s.mean() : a->baseline[r];
  }
  return "";
}
