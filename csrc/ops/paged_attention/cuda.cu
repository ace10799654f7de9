// paged_attention on a GPU: a block per row and query head. Its warps share out a block of keys for
// the scores, its threads the dimensions of the values; keys come in ascending blocks, so a row's
// bits are its own here too. Rows of one sequence do not share their loads.
#include "base/gpu.h"
#include "ops/paged_attention/layout.h"

namespace effinfer {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / gpu::kWarp;
constexpr int kBlock = static_cast<int>(kAttentionBlock);

// Whose keys a block of threads reads.
struct Reader {
  int64_t sequence, plane, kv_head;
};

// Where position t's vector lies, or -1 where an index is out of range: on the host nobody looked.
__device__ int64_t find(const PagedAttention& a, const PageStrides& s, const Reader& r, int64_t t) {
  const int64_t page = t / a.block_size;
  if (page >= a.max_blocks) return -1;
  const int64_t block = a.block_table[r.sequence * a.table_row + page];
  if (block < 0 || block >= a.blocks) return -1;
  return r.plane * s.plane + block * s.block + t % a.block_size * s.slot + r.kv_head * s.head;
}

__global__ void __launch_bounds__(kThreads) attend(PagedAttention a) {
  const int64_t row = blockIdx.x / a.q_heads, head = blockIdx.x % a.q_heads;
  const Reader reader = {a.sequence[row], a.plane != nullptr ? a.plane[row] : 0,
                         head / (a.q_heads / a.kv_heads)};
  const int thread = static_cast<int>(threadIdx.x);
  int64_t* const places = gpu::shared<int64_t>();  // of the block's values
  float* const weights = reinterpret_cast<float*>(places + kBlock);
  float* const q = weights + kBlock;
  float* const out = q + a.k_dim;
  const int64_t q_at = row * a.q_row + head * a.q_head;
  for (int64_t d = thread; d < a.k_dim; d += kThreads)
    q[d] = gpu::load_any(a.q, a.q_type, q_at + d);
  for (int64_t d = thread; d < a.v_dim; d += kThreads) out[d] = 0.f;
  const bool valid = reader.sequence >= 0 && reader.sequence < a.sequences && reader.plane >= 0 &&
                     reader.plane < a.planes;
  const int64_t last = valid ? a.position[row] : -1;
  const float none = -INFINITY;
  float top = none, total = 0.f;
  for (int64_t t = first_key(a, last); t <= last;) {
    const int64_t next = round_up(t + 1, kAttentionBlock);
    const int count = static_cast<int>((next < last + 1 ? next : last + 1) - t);
    gpu::sync_block();  // q is there, and nobody reads the last block's weights any more
    for (int j = gpu::warp(); j < count; j += kWarps) {
      const int64_t k = find(a, a.k_stride, reader, t + j);
      float dot = 0.f;
      if (k >= 0)
        for (int64_t d = gpu::lane(); d < a.k_dim; d += gpu::kWarp)
          dot = gpu::fma(q[d], gpu::load_any(a.k_pages, a.k_type, k + d * a.k_stride.dim), dot);
      float score = gpu::warp_sum(dot) * a.scale;
      if (a.softcap > 0.f) score = a.softcap * tanhf(score / a.softcap);
      if (gpu::lane() == 0) {
        weights[j] = k >= 0 ? score : none;
        places[j] = find(a, a.v_stride, reader, t + j);
      }
    }
    gpu::sync_block();
    float risen = top;
    for (int j = 0; j < count; ++j) risen = weights[j] > risen ? weights[j] : risen;
    gpu::sync_block();  // every thread has seen the scores
    for (int j = thread; j < count; j += kThreads)
      weights[j] = places[j] >= 0 ? expf(weights[j] - risen) : 0.f;
    gpu::sync_block();
    const float factor = top == none ? 0.f : expf(top - risen);
    total *= factor;
    for (int j = 0; j < count; ++j) total += weights[j];
    for (int64_t d = thread; d < a.v_dim; d += kThreads) {
      float sum = 0.f;
      for (int j = 0; j < count; ++j)
        if (places[j] >= 0)
          sum = gpu::fma(weights[j], gpu::load_any(a.v_pages, a.v_type, places[j] + d), sum);
      out[d] = gpu::fma(out[d], factor, sum);
    }
    top = risen;
    t = next;
  }
  const int64_t out_at = row * a.out_row + head * a.out_head;
  for (int64_t d = thread; d < a.v_dim; d += kThreads)
    gpu::store_any(a.out, a.q_type, out_at + d, total == 0.f ? 0.f : out[d] / total);
}

}  // namespace

int paged_attention_cuda(const PagedAttention& args, void* stream) {
  const int64_t blocks = args.rows * args.q_heads;
  if (blocks > gpu::kMaxGridX) return gpu::kInvalidValue;
  const size_t shared = kBlock * (sizeof(int64_t) + sizeof(float)) +
                        static_cast<size_t>(args.k_dim + args.v_dim) * sizeof(float);
  return gpu::launch(&attend, dim3(static_cast<unsigned>(blocks)), kThreads, shared, stream, args);
}

}  // namespace effinfer
