// causal_conv1d on a GPU: one thread per output, whose taps its neighbours have just brought into
// L1.
#include "base/gpu.h"
#include "ops/causal_conv1d/causal_conv1d.h"

namespace effinfer {
namespace {

constexpr int kThreads = 256;

// One sequence as the formula sees it: [initial_state | x], masked positions zero.
struct History {
  const CausalConv1d& a;
  int64_t sequence, batch, begin, length;

  __device__ History(const CausalConv1d& args, int64_t of) : a(args), sequence(of) {
    const bool packed = a.cu_seqlens != nullptr;
    batch = packed ? 0 : sequence;
    begin = packed ? a.cu_seqlens[sequence] : 0;
    int64_t end = packed ? a.cu_seqlens[sequence + 1] : a.length;
    begin = begin < 0 ? 0 : begin;
    end = end > a.length ? a.length : end;  // what lies on the GPU was not checked on the host
    length = end > begin ? end - begin : 0;
  }
  __device__ int64_t past() const { return (a.width - 1) * a.dilation; }
  __device__ bool masked(int64_t t) const {
    return a.mask != nullptr && a.mask[batch * a.mask_batch + (begin + t) * a.mask_time] == 0;
  }
  __device__ float at(int64_t d, int64_t t) const {  // t >= -past()
    if (t >= 0)
      return masked(t) ? 0.f
                       : gpu::load_any(a.x, a.type,
                                       batch * a.x_batch + d * a.x_dim + (begin + t) * a.x_time);
    if (a.initial_state == nullptr) return 0.f;
    return a.initial_state[sequence * a.initial_sequence + d * a.initial_dim +
                           (past() + t) * a.initial_column];
  }
};

// The sequence that position t of the packed row belongs to: the last one to begin at or before t.
__device__ int64_t sequence_of(const CausalConv1d& a, int64_t t) {
  int64_t low = 0, high = a.sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (a.cu_seqlens[middle] <= t)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) convolve(CausalConv1d a, int64_t outputs) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= outputs) return;
  // Neighbouring threads take neighbouring memory, whichever way x lies.
  const bool across = a.x_dim == 1;
  const int64_t d = across ? i % a.dim : i / a.length % a.dim;
  const int64_t position = across ? i / a.dim % a.length : i % a.length;
  const bool packed = a.cu_seqlens != nullptr;
  const History h(a, packed ? sequence_of(a, position) : i / (a.dim * a.length));
  const int64_t t = position - h.begin;
  if (t < 0 || t >= h.length) return;  // cu_seqlens that do not cover the row
  float y = 0.f;
  if (!h.masked(t)) {
    y = a.bias != nullptr ? a.bias[d] : 0.f;
    for (int64_t j = 0; j < a.width; ++j)
      y = gpu::fma(a.weight[d * a.width + j], h.at(d, t - (a.width - 1 - j) * a.dilation), y);
    if (a.silu) y = gpu::silu(y);
  }
  gpu::store_any(a.y, a.type, h.batch * a.y_batch + d * a.y_dim + position * a.y_time, y);
}

__global__ void __launch_bounds__(kThreads) write_states(CausalConv1d a, int64_t elements) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const int64_t past = (a.width - 1) * a.dilation, column = i % past, d = i / past % a.dim;
  const int64_t k = i / past / a.dim % a.num_states;
  const History h(a, i / past / a.dim / a.num_states);
  const int64_t tokens = h.length > k ? h.length - k : 0;
  a.states[i] = h.at(d, tokens - past + column);
}

unsigned blocks(int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

}  // namespace

int causal_conv1d_cuda(const CausalConv1d& a, void* stream) {
  const int64_t batch = a.cu_seqlens != nullptr ? 1 : a.sequences;
  const int64_t outputs = a.sequences > 0 ? batch * a.dim * a.length : 0;
  const int status = gpu::launch(&convolve, dim3(blocks(outputs)), kThreads, 0, stream, a, outputs);
  const int64_t elements = a.sequences * a.num_states * a.dim * (a.width - 1) * a.dilation;
  if (status != 0) return status;
  return gpu::launch(&write_states, dim3(blocks(elements)), kThreads, 0, stream, a, elements);
}

}  // namespace effinfer
