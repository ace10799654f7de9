#include "base/cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace effinfer {
namespace {

struct Level {
  const char* name;
  uint32_t bits;
};

constexpr Level kLevels[] = {
#if defined(__x86_64__)
    {"avx512vnni", kAvx512Vnni | kAvx512 | kAvx2},
    {"avx512", kAvx512 | kAvx2},
    {"avx2", kAvx2},
#elif defined(__aarch64__)
    {"i8mm", kI8mm | kDotprod | kNeon},
    {"dotprod", kDotprod | kNeon},
    {"neon", kNeon},
#endif
    {"scalar", kScalar},
};

// Names that are right on another architecture cap to scalar here rather than fail.
constexpr const char* kForeign[] = {"avx512vnni", "avx512", "avx2", "i8mm", "dotprod", "neon"};

uint32_t detect() {
  uint32_t bits = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    bits |= kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      bits |= kAvx512;
      if (__builtin_cpu_supports("avx512vnni")) bits |= kAvx512Vnni;
    }
  }
#elif defined(__aarch64__)
  bits |= kNeon;
#if defined(__linux__)
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
    bits |= kDotprod;
    if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) bits |= kI8mm;
  }
#endif
#endif
  return bits;
}

bool find_cap(const char* name, uint32_t* cap) {
  if (name == nullptr || *name == '\0') {
    *cap = ~0u;
    return true;
  }
  for (const Level& level : kLevels)
    if (std::strcmp(name, level.name) == 0) {
      *cap = level.bits;
      return true;
    }
  for (const char* foreign : kForeign)
    if (std::strcmp(name, foreign) == 0) {
      *cap = kScalar;
      return true;
    }
  return false;
}

std::atomic<uint32_t>& cap() {
  static std::atomic<uint32_t> value = [] {
    uint32_t bits = ~0u;
    find_cap(std::getenv("EFFINFER_ISA"), &bits);
    return bits;
  }();
  return value;
}

}  // namespace

uint32_t isa_bits() {
  static const uint32_t detected = detect();
  return detected & cap().load(std::memory_order_relaxed);
}

bool set_isa_cap(const char* name) {
  uint32_t bits = 0;
  if (!find_cap(name, &bits)) return false;
  cap().store(bits, std::memory_order_relaxed);
  return true;
}

const char* isa_env_error() {
  const char* name = std::getenv("EFFINFER_ISA");
  uint32_t ignored = 0;
  return find_cap(name, &ignored) ? nullptr : name;
}

const char* isa_name() {
  const uint32_t have = isa_bits();
  for (const Level& level : kLevels)
    if ((level.bits & have) == level.bits) return level.name;
  return "scalar";
}

}  // namespace effinfer
