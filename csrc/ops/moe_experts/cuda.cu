// moe_experts on a GPU: the pairs are sorted by one block, then each expert's panels are multiplied
// by the rows it has, which only the GPU knows: a block for every panel of every expert, most of
// them idle where rows are few. Sums are float32, in one order whatever the other rows.
#include "base/gpu.h"
#include "ops/linear/cuda_epilogue.h"
#include "ops/moe_experts/moe_experts.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 8;                    // of an expert, at a time
constexpr int kSplits = kThreads / kPanel;  // of k, in flight
constexpr int kChunk = 32 * kSplits;        // of k, in shared memory
constexpr int kXRow = kChunk + 1;

// A thread looks after some experts: it finds where their pairs begin, then puts them there.
__global__ void __launch_bounds__(kThreads) sort_pairs(MoeExperts a) {
  const MoeScratch& s = a.scratch;
  const int64_t pairs = a.rows * a.top_k;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t p = thread; p < pairs; p += kThreads) s.place[p] = -1;
  for (int64_t e = thread; e < a.experts; e += kThreads) {
    int32_t count = 0;
    for (int64_t p = 0; p < pairs; ++p) count += a.index[p] == e;
    s.starts[e + 1] = count;
  }
  gpu::sync_block();
  if (thread == 0) {
    s.starts[0] = 0;
    for (int64_t e = 0; e < a.experts; ++e) s.starts[e + 1] += s.starts[e];
  }
  gpu::sync_block();
  for (int64_t e = thread; e < a.experts; e += kThreads) {
    int32_t at = s.starts[e];
    for (int64_t p = 0; p < pairs; ++p) {
      if (a.index[p] != e) continue;
      s.pair[at] = static_cast<int32_t>(p);
      s.place[p] = at++;
    }
  }
}

// Rows for the experts' products, one per place.
struct Product {
  const void* x;
  DType x_type;
  int64_t x_stride;
  const int32_t* pair;  // place i takes row pair[i] / top_k; null: row i
  int64_t top_k;
  const int32_t* starts;
  float* y;
  int64_t y_stride, n, k;
};

struct Shared {
  float x[kRows][kXRow];
  float sums[kSplits][kRows][kPanel];
};

// A thread: one output of a panel, every kSplits-th weight of it; then one output of one row.
template <class W>
__global__ void __launch_bounds__(kThreads) multiply(Product a, const W* weights) {
  Shared& s = *gpu::shared<Shared>();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kPanel, split = thread / kPanel;
  const int64_t panel = blockIdx.x, expert = blockIdx.y;
  const int64_t panels = (a.n + kPanel - 1) / kPanel, n = panel * kPanel + lane;
  const W* const w = weights + (expert * panels + panel) * a.k * kPanel + place<W>(lane);
  for (int64_t first = a.starts[expert]; first < a.starts[expert + 1]; first += kRows) {
    const int64_t left = a.starts[expert + 1] - first;
    const int rows = static_cast<int>(left < kRows ? left : kRows);
    float sums[kRows] = {};
    for (int64_t begin = 0; begin < a.k; begin += kChunk) {
      const int terms = static_cast<int>(a.k - begin < kChunk ? a.k - begin : kChunk);
      for (int i = thread; i < kRows * kChunk; i += kThreads) {
        const int r = i / kChunk, k = i % kChunk;
        float x = 0.f;
        if (r < rows && k < terms) {
          const int64_t row = a.pair != nullptr ? a.pair[first + r] / a.top_k : first + r;
          x = gpu::load_any(a.x, a.x_type, row * a.x_stride + begin + k);
        }
        s.x[r][k] = x;
      }
      gpu::sync_block();
      for (int k = split; k < terms; k += kSplits) {
        const float weight = gpu::load(w + (begin + k) * kPanel);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = gpu::fma(s.x[r][k], weight, sums[r]);
      }
      gpu::sync_block();
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) s.sums[split][r][lane] = sums[r];
    gpu::sync_block();
    if (split < rows && n < a.n) {
      float total = 0.f;
      for (int part = 0; part < kSplits; ++part) total += s.sums[part][split][lane];
      a.y[(first + split) * a.y_stride + n] = total;
    }
    gpu::sync_block();
  }
}

__device__ inline float activated(ExpertActivation activation, float x) {
  switch (activation) {
    case ExpertActivation::silu:
      return activate(Epilogue::silu, x);
    case ExpertActivation::gelu:
      return activate(Epilogue::gelu, x);
    case ExpertActivation::gelu_tanh:
      return activate(Epilogue::gelu_tanh, x);
    default:
      return x < 0.f ? 0.f : x * x;
  }
}

// A block per pair.
__global__ void __launch_bounds__(kThreads) activate_row(MoeExperts a) {
  const int64_t at = blockIdx.x;
  if (at >= a.scratch.starts[a.experts]) return;
  float* const row = a.scratch.inner + at * a.up_outputs();
  for (int64_t i = threadIdx.x; i < a.inner; i += kThreads) {
    const float x = activated(a.activation, row[i]);
    row[i] = a.gated ? x * row[a.inner + i] : x;
  }
}

// A block per row.
__global__ void __launch_bounds__(kThreads) combine_row(MoeExperts a) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < a.dim; i += kThreads) {
    float sum = 0.f;
    for (int64_t pair = row * a.top_k; pair < (row + 1) * a.top_k; ++pair) {
      const int64_t at = a.scratch.place[pair];
      if (at >= 0) sum = gpu::fma(a.weights[pair], a.scratch.rows[at * a.dim + i], sum);
    }
    gpu::store_any(a.y, a.x_type, row * a.y_stride + i, sum);
  }
}

int multiply_all(const Product& p, const void* weights, DType type, int64_t experts, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, kPanel)), static_cast<unsigned>(experts));
  int status = 0;
  with_type(type, [&](auto w) {
    using W = decltype(w);
    status = gpu::launch(&multiply<W>, grid, kThreads, sizeof(Shared), stream, p,
                         static_cast<const W*>(weights));
  });
  return status;
}

// Lays out the scratch from its beginning.
void lay_out(MoeExperts& a) {
  MoeScratch& s = a.scratch;
  const int64_t pairs = a.rows * a.top_k;
  s.inner = s.rows + pairs * a.dim;
  s.starts = reinterpret_cast<int32_t*>(s.inner + pairs * a.up_outputs());
  s.pair = s.starts + a.experts + 1;
  s.place = s.pair + pairs;
}

}  // namespace

int64_t moe_experts_cuda_scratch(const MoeExperts& a) {
  const int64_t pairs = a.rows * a.top_k;
  return pairs * (a.dim + a.up_outputs() + 2) + a.experts + 1;
}

int moe_experts_cuda(const MoeExperts& args, void* stream) {
  MoeExperts a = args;
  lay_out(a);
  const int64_t pairs = a.rows * a.top_k;
  const MoeScratch& s = a.scratch;
  if (a.experts > gpu::kMaxGridYZ || pairs > gpu::kMaxGridX) return gpu::kInvalidValue;
  if (a.rows == 0) return 0;
  const Product up = {a.x,      a.x_type, a.x_stride,     s.pair,         a.top_k,
                      s.starts, s.inner,  a.up_outputs(), a.up_outputs(), a.dim};
  const Product down = {s.inner,  DType::f32, a.up_outputs(), nullptr, 1,
                        s.starts, s.rows,     a.dim,          a.dim,   a.inner};
  int status = gpu::launch(&sort_pairs, dim3(1), kThreads, 0, stream, a);
  if (status == 0) status = multiply_all(up, a.up, a.up_type, a.experts, stream);
  if (status == 0)
    status = gpu::launch(&activate_row, dim3(static_cast<unsigned>(pairs)), kThreads, 0, stream, a);
  if (status == 0) status = multiply_all(down, a.down, a.down_type, a.experts, stream);
  if (status == 0)
    status = gpu::launch(&combine_row, dim3(static_cast<unsigned>(a.rows)), kThreads, 0, stream, a);
  return status;
}

}  // namespace effinfer
