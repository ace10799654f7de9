// rope_write on a GPU: a block of threads per row.
#include "base/gpu.h"
#include "ops/rope_write/rope_write.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128;

// A row's keys or values, from element `from` of qkv on, into their slot.
__device__ void write(const RopeWrite& a, const WrittenPages& pages, int64_t from, int64_t row) {
  const int64_t plane = a.plane != nullptr ? a.plane[row] : 0, slot = a.slot[row];
  if (slot < 0 || slot >= a.blocks * a.block_size || plane < 0 || plane >= a.planes) return;
  const int64_t to = plane * pages.plane_stride + slot / a.block_size * pages.block_stride +
                     slot % a.block_size * pages.slot_stride;
  for (int64_t i = threadIdx.x; i < a.kv_heads * pages.dim; i += kThreads)
    gpu::store_any(pages.data, pages.type,
                   to + i / pages.dim * pages.head_stride + i % pages.dim * pages.dim_stride,
                   gpu::load_any(a.qkv, a.type, from + i));
}

__global__ void __launch_bounds__(kThreads) rotate_and_write(RopeWrite a) {
  const int64_t row = blockIdx.x, x = row * a.qkv_row, pairs = a.rotary_dim / 2;
  const int64_t line = a.position != nullptr ? a.position[row] : row;
  if (a.cos != nullptr && line >= 0 && line < a.lines) {
    const float *const cos = a.cos + line * a.cos_row, *const sin = a.sin + line * a.sin_row;
    for (int64_t n = threadIdx.x; n < (a.q_heads + a.kv_heads) * pairs; n += kThreads) {
      const int64_t head = x + n / pairs * a.k.dim, p = n % pairs;
      const int64_t i = a.interleaved ? 2 * p : p, j = a.interleaved ? 2 * p + 1 : p + pairs;
      const float first = gpu::load_any(a.qkv, a.type, head + i);
      const float second = gpu::load_any(a.qkv, a.type, head + j);
      gpu::store_any(a.qkv, a.type, head + i, gpu::mul(first, cos[i]) - gpu::mul(second, sin[i]));
      gpu::store_any(a.qkv, a.type, head + j, gpu::mul(second, cos[j]) + gpu::mul(first, sin[j]));
    }
  }
  gpu::sync_block();
  const int64_t keys = x + a.q_heads * a.k.dim;
  write(a, a.k, keys, row);
  write(a, a.v, keys + a.kv_heads * a.k.dim, row);
}

}  // namespace

int rope_write_cuda(const RopeWrite& args, void* stream) {
  if (args.rows > gpu::kMaxGridX) return gpu::kInvalidValue;
  return gpu::launch(&rotate_and_write, dim3(static_cast<unsigned>(args.rows)), kThreads, 0, stream,
                     args);
}

}  // namespace effinfer
