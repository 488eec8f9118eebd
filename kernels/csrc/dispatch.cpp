#include "dispatch.h"

#include <string.h>

extern const Kernels kernels_generic;
#if defined(DUOLOGUE_X86)
#include <cpuid.h>
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;

namespace {

struct Features {
  bool avx2, avx512, bf16;
};

bool bit(unsigned word, int i) {
  return word >> i & 1;
}

Features detect() {
  Features f = {false, false, false};
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27) /* OSXSAVE */) return f;
  const bool fma = bit(c, 12), avx = bit(c, 28);
  unsigned lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  const bool ymm = (lo & 0x6) == 0x6, zmm = (lo & 0xe6) == 0xe6; // the OS saves these registers
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = avx && fma && ymm && bit(b, 5);
  f.avx512 = f.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31); // F, DQ, BW, VL
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.bf16 = f.avx512 && bit(a, 5);
  return f;
}

} // namespace

const Kernels *best_kernels() {
  const Features f = detect();
  return f.bf16     ? &kernels_avx512bf16
         : f.avx512 ? &kernels_avx512
         : f.avx2   ? &kernels_avx2
                    : &kernels_generic;
}

const Kernels *find_kernels(const char *name) {
  const Features f = detect();
  if (!strcmp(name, "generic")) return &kernels_generic;
  if (!strcmp(name, "avx2")) return f.avx2 ? &kernels_avx2 : nullptr;
  if (!strcmp(name, "avx512")) return f.avx512 ? best_kernels() : nullptr;
  if (!strcmp(name, "avx512-nobf16")) return f.avx512 ? &kernels_avx512 : nullptr;
  return nullptr;
}
#else
const Kernels *best_kernels() {
  return &kernels_generic;
}
const Kernels *find_kernels(const char *name) {
  return strcmp(name, "generic") ? nullptr : &kernels_generic;
}
#endif
