#include "ops/paged_attention/paged_attention.h"

#include <algorithm>

#include "testing.h"

namespace effinfer {
namespace {

class PagedAttentionTest : public testing::PerIsa {};
EFFINFER_PER_ISA(PagedAttentionTest);

struct Shape {
  int64_t q_heads, kv_heads, k_dim, v_dim, block_size, window;
  bool columns = false;  // of keys
};

// Two sequences in pages that alternate; every buffer is exactly as long as it has to be, for
// AddressSanitizer, and every slot past a sequence's end is a NaN.
template <class T>
struct Problem {
  Shape shape;
  std::vector<int64_t> lengths = {71, 5};
  int64_t pages, blocks;
  std::vector<T> q, k, v, out;
  std::vector<int32_t> table, sequence, position;
  std::vector<char> scratch;

  explicit Problem(Shape s) : shape(s) {
    pages = (lengths[0] + s.block_size - 1) / s.block_size;
    blocks = 2 * pages;
    for (int64_t line = 0; line < 2; ++line)
      for (int64_t page = 0; page < pages; ++page)
        table.push_back(static_cast<int32_t>(2 * (pages - 1 - page) + line));
    const auto add = [&](int32_t line, int64_t begin) {
      for (int64_t t = begin; t < lengths[static_cast<size_t>(line)]; ++t) {
        sequence.push_back(line);
        position.push_back(static_cast<int32_t>(t));
      }
    };
    add(0, 58);
    add(1, 0);
    sequence.push_back(0);
    position.push_back(-1);
    const size_t rows = sequence.size();
    q = testing::to_type<T>(testing::random_floats(rows * s.q_heads * s.k_dim, 1));
    out.resize(rows * s.q_heads * s.v_dim);
    k = pool(s.k_dim, 2);
    if (s.columns) k = in_columns(k);
    v = pool(s.v_dim, 3);
  }

  int64_t slot(int64_t line, int64_t t) const {
    return table[line * pages + t / shape.block_size] * shape.block_size + t % shape.block_size;
  }

  std::vector<T> pool(int64_t dim, unsigned seed) const {
    const int64_t width = shape.kv_heads * dim;
    const auto random = testing::random_floats(blocks * shape.block_size * width, seed);
    std::vector<float> all(random.size(), NAN);
    for (int64_t line = 0; line < 2; ++line)
      for (int64_t t = 0; t < lengths[line]; ++t)
        std::copy_n(random.begin() + slot(line, t) * width, width,
                    all.begin() + slot(line, t) * width);
    return testing::to_type<T>(all);
  }

  PageStrides key_strides() const {
    const Shape& s = shape;
    const int64_t block = s.block_size * s.kv_heads * s.k_dim;
    if (s.columns) return {0, block, 1, s.block_size * s.k_dim, s.block_size};
    return {0, block, s.kv_heads * s.k_dim, s.k_dim, 1};
  }

  // Dimension d of kv head h of what lies in a slot.
  int64_t key_at(int64_t slot, int64_t h, int64_t d) const {
    const PageStrides by = key_strides();
    return slot / shape.block_size * by.block + slot % shape.block_size * by.slot + h * by.head +
           d * by.dim;
  }

  std::vector<T> in_columns(const std::vector<T>& rows) const {
    std::vector<T> result(rows.size());
    const int64_t heads = shape.kv_heads, dim = shape.k_dim;
    for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i)
      result[key_at(i / (heads * dim), i / dim % heads, i % dim)] = rows[i];
    return result;
  }

  void run(DType type) {
    const Shape& s = shape;
    PagedAttention args = {
        .q = q.data(),
        .k_pages = k.data(),
        .v_pages = v.data(),
        .block_table = table.data(),
        .sequence = sequence.data(),
        .position = position.data(),
        .plane = nullptr,
        .out = out.data(),
        .rows = static_cast<int64_t>(sequence.size()),
        .q_heads = s.q_heads,
        .kv_heads = s.kv_heads,
        .k_dim = s.k_dim,
        .v_dim = s.v_dim,
        .planes = 1,
        .blocks = blocks,
        .block_size = s.block_size,
        .sequences = 2,
        .max_blocks = pages,
        .q_row = s.q_heads * s.k_dim,
        .q_head = s.k_dim,
        .out_row = s.q_heads * s.v_dim,
        .out_head = s.v_dim,
        .table_row = pages,
        .k_stride = key_strides(),
        .v_stride = {0, s.block_size * s.kv_heads * s.v_dim, s.kv_heads * s.v_dim, s.v_dim, 1},
        .q_type = type,
        .k_type = type,
        .v_type = type,
        .scale = 0.2f,
        .softcap = 5.f,
        .window = s.window,
        .slots = 2,
        .scratch = nullptr,
    };
    scratch.resize(paged_attention_scratch(args) + 64);
    const auto at = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
    args.scratch = reinterpret_cast<void*>(at);
    paged_attention(args);
  }

  // out[row, head, :] in double.
  void expect(int64_t row, int64_t head, std::vector<double>& want) const {
    const Shape& s = shape;
    const int64_t last = position[row], kv_head = head / (s.q_heads / s.kv_heads);
    std::vector<double> sum(s.v_dim);
    double total = 0;
    for (int64_t t = s.window > 0 ? std::max<int64_t>(0, last - s.window + 1) : 0; t <= last; ++t) {
      const int64_t at = slot(sequence[row], t) * s.kv_heads + kv_head;
      double dot = 0;
      for (int64_t d = 0; d < s.k_dim; ++d)
        dot += double{scalar::get(&q[(row * s.q_heads + head) * s.k_dim + d])} *
               scalar::get(&k[key_at(slot(sequence[row], t), kv_head, d)]);
      const double weight = std::exp(5. * std::tanh(dot * 0.2 / 5.));
      total += weight;
      for (int64_t d = 0; d < s.v_dim; ++d)
        sum[d] += weight * double{scalar::get(&v[at * s.v_dim + d])};
    }
    for (double x : sum) want.push_back(last < 0 ? 0. : x / total);
  }
};

template <class T>
void expect_matches_float64(DType type, double bound, Shape shape) {
  Problem<T> p(shape);
  p.run(type);
  std::vector<double> want;
  for (size_t row = 0; row < p.sequence.size(); ++row)
    for (int64_t head = 0; head < shape.q_heads; ++head)
      p.expect(static_cast<int64_t>(row), head, want);
  EXPECT_LE(testing::relative_error(p.out, want), bound)
      << "heads " << shape.q_heads << "/" << shape.kv_heads << " dims " << shape.k_dim << ", "
      << shape.v_dim << " block " << shape.block_size << " window " << shape.window
      << (shape.columns ? " columns" : "");
}

TEST_P(PagedAttentionTest, MatchesFloat64) {
  for (Shape shape : {Shape{4, 2, 16, 16, 16, 0},
                      {3, 3, 20, 7, 1, 9},
                      {8, 1, 64, 64, 32, 0},
                      {14, 2, 40, 80, 5, 30},
                      {4, 4, 32, 32, 16, 0, true},
                      {14, 2, 20, 48, 32, 30, true},
                      {5, 5, 3, 7, 80, 0, true},
                      {1, 1, 1, 1, 128, 0}}) {
    expect_matches_float64<float>(DType::f32, 1e-6, shape);
    expect_matches_float64<bf16>(DType::bf16, 4e-3, shape);
    expect_matches_float64<f16>(DType::f16, 5e-4, shape);
  }
}

}  // namespace
}  // namespace effinfer
