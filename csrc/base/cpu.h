// What this CPU can run, and how an op picks its kernel.
#pragma once
#include <cstddef>
#include <cstdint>

namespace effinfer {

// Instruction sets a kernel may need, as bits.
enum Isa : uint32_t {
  kScalar = 0,
  kAvx2 = 1 << 0,    // AVX2 + FMA + F16C
  kAvx512 = 1 << 1,  // F, BW, DQ, VL
  kNeon = 1 << 2,
  kDotprod = 1 << 3,
  kI8mm = 1 << 4,
  kAvx512Vnni = 1 << 5,
};

// Bits this process may use: what the CPU and the OS offer, capped by EFFINFER_ISA or set_isa_cap.
uint32_t isa_bits();

// Caps the choice: "scalar", "avx2", "avx512", "avx512vnni", "neon", "dotprod", "i8mm", or "" for
// no cap. Returns false, and changes nothing, when the name is unknown.
bool set_isa_cap(const char* name);

// The value of EFFINFER_ISA when it is not a known name, else nullptr.
const char* isa_env_error();

// Name of the best instruction set in use, for people.
const char* isa_name();

// One row of an op's kernel table.
template <class Fn>
struct Kernel {
  const char* isa;
  uint32_t needs;
  Fn run;
};

// The first row this CPU can run; tables are best first and end with a scalar row.
template <class Fn, size_t N>
inline const Kernel<Fn>& pick(const Kernel<Fn> (&table)[N]) {
  const uint32_t have = isa_bits();
  for (const auto& k : table)
    if ((k.needs & have) == k.needs) return k;
  return table[N - 1];
}

}  // namespace effinfer
