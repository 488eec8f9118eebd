#include "dispatch.h"

#include <string.h>

extern const Kernels kernels_generic, kernels_amx_emulated;
#if defined(DUOLOGUE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;
#if defined(DUOLOGUE_AMX)
extern const Kernels kernels_amx;
#endif

namespace {

struct Features {
  bool avx2, avx512, bf16, amx; // amx: the processor has it and the operating system saves its state
};

bool bit(unsigned word, int i) {
  return word >> i & 1;
}

Features detect() {
  Features f = {};
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27) /* OSXSAVE */) return f;
  const bool fma = bit(c, 12), avx = bit(c, 28);
  unsigned lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  const bool ymm = (lo & 0x6) == 0x6, zmm = (lo & 0xe6) == 0xe6; // the OS saves these registers
  const bool tmm = (lo & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = avx && fma && ymm && bit(b, 5);
  f.avx512 = f.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31); // F, DQ, BW, VL
  const bool tiles = tmm && bit(d, 22) && bit(d, 24);                               // AMX-BF16, AMX-TILE
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.bf16 = f.avx512 && bit(a, 5);
  f.amx = f.bf16 && tiles;
  return f;
}

// Linux gives the 8 KB of tile data to a process that asks; once given, it stays.
bool tiles_allowed() {
#if defined(DUOLOGUE_AMX) && defined(__linux__)
  static const bool allowed =
      syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
#else
  return false;
#endif
}

const Kernels *tiled(const Features &f) {
#if defined(DUOLOGUE_AMX)
  if (f.amx && tiles_allowed()) return &kernels_amx;
#endif
  (void)f;
  return nullptr;
}

const Kernels *best_vectors(const Features &f) {
  return f.bf16     ? &kernels_avx512bf16
         : f.avx512 ? &kernels_avx512
         : f.avx2   ? &kernels_avx2
                    : &kernels_generic;
}

} // namespace

const Kernels *best_kernels() {
  const Features f = detect();
  const Kernels *tiles = tiled(f);
  return tiles ? tiles : best_vectors(f);
}

const Kernels *find_kernels(const char *name) {
  const Features f = detect();
  if (!strcmp(name, "generic")) return &kernels_generic;
  if (!strcmp(name, "amx-emulated")) return &kernels_amx_emulated;
  if (!strcmp(name, "avx2")) return f.avx2 ? &kernels_avx2 : nullptr;
  if (!strcmp(name, "avx512")) return f.avx512 ? best_vectors(f) : nullptr;
  if (!strcmp(name, "avx512-nobf16")) return f.avx512 ? &kernels_avx512 : nullptr;
  if (!strcmp(name, "avx512bf16")) return f.bf16 ? &kernels_avx512bf16 : nullptr;
  if (!strcmp(name, "amx")) return tiled(f);
  return nullptr;
}

const char *refused_tiles() {
  if (!detect().amx) return "";
#if !defined(DUOLOGUE_AMX)
  return "the compiler knew no AMX";
#else
  return tiles_allowed() ? "" : "the operating system does not allow AMX";
#endif
}
#else
const Kernels *best_kernels() {
  return &kernels_generic;
}
const Kernels *find_kernels(const char *name) {
  if (!strcmp(name, "amx-emulated")) return &kernels_amx_emulated;
  return strcmp(name, "generic") ? nullptr : &kernels_generic;
}
const char *refused_tiles() {
  return "";
}
#endif
