// y = epilogue(x W^T + bias) + residual, with weights packed once into panels of 16 outputs.
//
// Packed weights: [panels, k, 16], panels = ceil(n / 16), outputs past n are zero. f32 and f16 keep
// their order; bf16 stores output j beside output j + 8, so that one 32-byte load `v` gives two
// float vectors, v << 16 and v & 0xffff0000. For the *_mul epilogues two matrices are interleaved
// panel by panel (gate, up, gate, up, ...) and y = act(gate) * up.
//
// Every output is summed in one order, whatever the other rows, the tile it falls in, the threads
// or the strides: blocks of kTerms products in ascending k, each block by fused multiply-adds into
// a fresh float32 accumulator, the blocks added in ascending order. So a row's bits depend on that
// row and the weights alone, and errors grow with sqrt(kTerms) rather than sqrt(k).
//
// Cost: 2 rows n k flops; bytes: the weights once (once per 96 rows above that), x and y. On a Zen
// 3 core at 3.24 GHz (104 GFLOP/s; 24 to 26 GB/s, of which one sequential stream gets 17), float32
// weights from DRAM: 1 to 4 rows take what reading them takes; 8 rows 1.35 to 1.5 times that on
// huge pages, where they are at 0.75 of the FMA peak. 384 and 512 rows reach 0.91 to 0.93 of the
// peak at k >= 768, 0.86 for 1536 -> 80, 0.84 at k = 48. The tile over a block of x in L2 reaches
// 0.97, and a whole call 0.95 where nothing is copied, fetched from afar or stored to y: copying x
// is 2 % (9 % for 80 outputs), storing y 1 % (4 % at k = 48), fetching weights and sums 1 to 2 %.
#pragma once
#include <cstddef>

#include "base/cpu.h"
#include "base/dtype.h"

namespace effinfer {

enum class Epilogue : int8_t { none, silu, gelu, gelu_tanh, silu_mul, gelu_mul };

constexpr bool takes_two(Epilogue e) { return e == Epilogue::silu_mul || e == Epilogue::gelu_mul; }

struct Linear {
  const void* x;         // [rows, k]
  const void* weight;    // packed, see above
  const float* bias;     // [n]; [2, n], gate first, for the *_mul epilogues; or null
  const void* residual;  // [rows, n] in x's type, or null
  void* y;               // [rows, n] in x's type
  int64_t rows, n, k;
  int64_t x_stride, residual_stride, y_stride;  // elements between rows
  DType x_type, weight_type;
  Epilogue epilogue;
  float* scratch;  // linear_scratch() bytes, 64-byte aligned
  int64_t slots;   // how many threads may work: one part of the scratch each
};

namespace linear_layout {
constexpr int64_t kPanel = 16;                  // outputs side by side in a panel
constexpr int64_t kTerms = 256;                 // products per block of k
constexpr int64_t kXStride = kTerms + 16;       // floats between the rows of a copied block of x
constexpr int64_t kWide = 2 * kTerms * kPanel;  // floats, for weights on their way to float32
constexpr int64_t kMaxRows = 96;                // rows of one task: their block of x stays in L2
constexpr int64_t kMaxPanels = 64;              // panels of one task
constexpr int64_t kMaxGroup = 4;                // panels that walk down k together

inline int64_t panels(const Linear& a) {
  return (a.n + kPanel - 1) / kPanel * (takes_two(a.epilogue) ? 2 : 1);
}
}  // namespace linear_layout

// One task: these rows times these panels, with `scratch` to itself.
struct LinearTask {
  int64_t row, rows, panel, panels;
  int64_t x_blocks;  // of k, copied at a time
  float* scratch;
};

using LinearFn = void (*)(const Linear&, const LinearTask&);

const Kernel<LinearFn>& linear_kernel();
size_t linear_scratch(const Linear& args);  // bytes; reads the sizes and slots
void linear(const Linear& args);

// Asks for huge pages behind memory that is about to be filled with packed weights: reading them is
// up to a fifth faster. Harmless where the system has none.
void advise_huge_pages(void* data, size_t bytes);

void linear_scalar(const Linear&, const LinearTask&);
void linear_avx2(const Linear&, const LinearTask&);
void linear_avx512(const Linear&, const LinearTask&);
void linear_neon(const Linear&, const LinearTask&);

int linear_cuda(const Linear&, void* stream);  // a cudaError_t

}  // namespace effinfer
