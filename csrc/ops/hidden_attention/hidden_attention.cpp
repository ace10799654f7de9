#include "ops/hidden_attention/hidden_attention.h"

#include "base/parallel.h"

namespace effinfer {
namespace {

constexpr Kernel<HiddenAttentionFn> kKernels[] = {
#if defined(__x86_64__)
    {"avx512", kAvx512, hidden_attention_avx512},
    {"avx2", kAvx2, hidden_attention_avx2},
#elif defined(__aarch64__)
    {"neon", kNeon, hidden_attention_neon},
#endif
    {"scalar", kScalar, hidden_attention_scalar},
};

int64_t scratch_floats(const HiddenAttention& a) {
  // Per position its step and its rows of decays, inputs and C, each up to a vector (of 16) wider;
  // A; four vectors of states for each n.
  return a.length * (3 * (a.state + 16) + 1) + 16 + 65 * (a.state + 16);
}

}  // namespace

const Kernel<HiddenAttentionFn>& hidden_attention_kernel() { return pick(kKernels); }

int64_t hidden_attention_scratch(const HiddenAttention& a) {
  return num_threads() * scratch_floats(a) * static_cast<int64_t>(sizeof(float));
}

void hidden_attention(const HiddenAttention& a) {
  const auto run = hidden_attention_kernel().run;
  const int64_t floats = scratch_floats(a);
  parallel_for(a.batch * a.dim, [&](int64_t row, int64_t worker) {
    run(a, row, static_cast<float*>(a.scratch) + worker * floats);
  });
}

}  // namespace effinfer
