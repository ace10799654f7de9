#include "ops/lowbit_linear/lowbit_linear.h"

#include "base/scalar.h"
#include "shim/compare.h"

namespace effinfer {
namespace {

using linear_layout::kPanel;
using testing::Floats;
using testing::random_floats;

constexpr LowbitFormat kFormats[] = {
    LowbitFormat::int8,    LowbitFormat::int4,          LowbitFormat::int3,  LowbitFormat::int2,
    LowbitFormat::ternary, LowbitFormat::ternary_dense, LowbitFormat::binary};

struct Case {
  LowbitFormat format;
  int64_t rows, n, k, group;
  bool zero = false, offset = false;
  DType x_type = DType::bf16, scale_type = DType::f16;
  Epilogue epilogue = Epilogue::none;
  int64_t x_stride = k;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<uint8_t> in_type(const Floats& values, DType type) {
  std::vector<uint8_t> out(values.size() * size_of(type));
  for (size_t i = 0; i < values.size(); ++i)
    scalar::put(out.data(), type, static_cast<int64_t>(i), values[i]);
  return out;
}

// Random packed weights (every pattern of bits is one, but in ternary_dense) times random x.
class Problem {
 public:
  explicit Problem(const Case& c) : case_(c) {
    Linear& io = args_.io;
    io.rows = c.rows;
    io.n = c.n;
    io.k = c.k;
    io.x_type = c.x_type;
    io.epilogue = c.epilogue;
    io.x_stride = c.x_stride;
    io.residual_stride = c.n;
    io.y_stride = c.n + 3;
    const int64_t panels = linear_layout::panels(io), groups = ceil_div(c.k, c.group);
    const lowbit::Layout l = lowbit::layout(c.format);
    args_.weight.format = c.format;
    args_.weight.group = c.group;
    args_.weight.scale_type = c.scale_type;
    args_.weight.scale_stride = groups * kPanel;
    args_.weight.panel_stride = ceil_div(c.k, l.unit_k) * l.unit_bytes;
    std::mt19937 engine(1);
    packed_.resize(panels * args_.weight.panel_stride / 16);
    for (size_t i = 0; i < packed_.size() * 16; ++i) {
      uint8_t byte = static_cast<uint8_t>(engine());
      const bool magnitudes = i % l.unit_bytes < 128;
      if (c.format == LowbitFormat::ternary_dense && magnitudes)
        byte = byte % 14 | (byte / 14 % 14) << 4;
      reinterpret_cast<uint8_t*>(packed_.data())[i] = byte;
    }
    x_ = in_type(random_floats(c.rows * c.x_stride, 2), c.x_type);
    residual_ = in_type(random_floats(c.rows * c.n, 3), c.x_type);
    bias_ = random_floats(2 * c.n, 4);
    scale_ = in_type(random_floats(panels * groups * kPanel, 5, 0.01f), c.scale_type);
    offset_ = in_type(random_floats(panels * groups * kPanel, 6, 0.01f), c.scale_type);
    for (int64_t i = 0; i < panels * groups * kPanel; ++i)
      zero_.push_back(static_cast<uint8_t>(engine() % (l.max_code + 2)));
    io.x = x_.data();
    io.residual = residual_.data();
    io.bias = bias_.data();
    args_.weight.packed = reinterpret_cast<const uint8_t*>(packed_.data());
    args_.weight.scale = scale_.data();
    args_.weight.zero = c.zero ? zero_.data() : nullptr;
    args_.weight.offset = c.offset ? offset_.data() : nullptr;
  }

  LowbitLinear& args() { return args_; }

  // y by the scalar kernels, in float32.
  Floats scalar(bool int8) {
    return run(int8, [&](LowbitLinear& a) {
      const LinearTask all = {0, case_.rows, 0, linear_layout::panels(a.io), 1, nullptr};
      if (!int8) return lowbit_float_scalar(a, all);
      const int64_t groups = ceil_div(case_.k, case_.group), stride = ceil_div(case_.k, 192) * 192;
      std::vector<int8_t> codes(case_.rows * stride);
      Floats scale(case_.rows);
      std::vector<int32_t> sums(case_.rows * groups);
      const LowbitRows q = {codes.data(), scale.data(), sums.data(), stride,
                            groups,       nullptr,      0,           nullptr};
      lowbit_quantize_scalar(a, q, 0, case_.rows);
      lowbit_int8_scalar(a, q, all);
    });
  }
  // y by the GPU's kernels on the shim.
  Floats gpu(bool int8) {
    return run(int8, [&](LowbitLinear& a) {
      std::vector<std::max_align_t> scratch(lowbit_linear_cuda_scratch(a) / 4 + 1);
      a.io.scratch = reinterpret_cast<float*>(scratch.data());
      EXPECT_EQ(lowbit_linear_cuda(a, nullptr), 0) << gpu::shim::last_error();
    });
  }

 private:
  template <class F>
  Floats run(bool int8, F&& f) {
    const bool bytes = args_.multiplier != nullptr;
    std::vector<uint8_t> y(case_.rows * (case_.n + 3) * size_of(case_.x_type), 0x11);
    LowbitLinear a = args_;
    a.io.y = y.data();
    a.int8_activations = int8;
    f(a);
    Floats out;
    for (int64_t i = 0; i < case_.rows * (case_.n + 3); ++i)
      out.push_back(bytes ? static_cast<float>(static_cast<int8_t>(y[i]))
                          : scalar::get(y.data(), case_.x_type, i));
    return out;
  }

  Case case_;
  LowbitLinear args_ = {};
  std::vector<std::max_align_t> packed_;  // aligned to 16 bytes, as the kernels want it
  std::vector<uint8_t> x_, residual_, scale_, offset_, zero_;
  Floats bias_;
};

Floats last_row(const Floats& y, int64_t n) { return {y.end() - (n + 3), y.end() - 3}; }

// Every format's cut of k (k past units, steps and segments), groups, zeros and offsets.
std::vector<Case> cases(LowbitFormat format, int64_t rows) {
  const bool dense = format == LowbitFormat::ternary_dense;
  const bool by_32 = lowbit::group_step(format) == 32;
  const bool zeros = lowbit::layout(format).step == 1;
  const auto group = [&](int64_t wanted) { return dense ? int64_t{1000} : wanted; };
  return {
      {.format = format, .rows = rows, .n = 1, .k = 1, .group = 1},
      {.format = format, .rows = rows, .n = 37, .k = 70, .group = group(by_32 ? 32 : 16)},
      {.format = format,
       .rows = rows,
       .n = 16,
       .k = 600,
       .group = group(128),
       .zero = zeros,
       .x_type = DType::f16,
       .epilogue = Epilogue::silu_mul},
      {.format = format,
       .rows = rows,
       .n = 33,
       .k = 250,
       .group = group(by_32 ? 96 : 48),
       .zero = zeros,
       .offset = true,
       .x_type = DType::f32,
       .scale_type = DType::f32},
      {.format = format,
       .rows = rows,
       .n = 20,
       .k = 648,
       .group = 700,
       .offset = true,
       .scale_type = DType::bf16,
       .x_stride = 656},
  };
}

// int8 activations: the contract's bits, for few and many rows.
TEST(ShimLowbitLinear, Int8HasTheContractsBits) {
  for (const LowbitFormat format : kFormats)
    for (const int64_t rows : {1, 9, 130})
      for (Case c : cases(format, rows)) {
        if (takes_two(c.epilogue)) c.epilogue = Epilogue::none;  // expf differs by an ulp
        Problem p(c);
        EXPECT_EQ(p.gpu(true), p.scalar(true))
            << static_cast<int>(format) << ", " << rows << " rows, k = " << c.k;
      }
}

TEST(ShimLowbitLinear, FloatsMatchScalar) {
  for (const LowbitFormat format : kFormats)
    for (const int64_t rows : {1, 17})
      for (const Case& c : cases(format, rows)) {
        Problem p(c);
        const Floats want = p.scalar(false);
        const double bound = c.x_type == DType::f32 ? 1e-6 : c.x_type == DType::bf16 ? 4e-3 : 5e-4;
        EXPECT_LE(testing::relative_error(p.gpu(false), {want.begin(), want.end()}), bound)
            << static_cast<int>(format) << ", " << rows << " rows, k = " << c.k;
      }
}

// A row's bits are those of that row alone, and do not depend on the order of the threads.
TEST(ShimLowbitLinear, RowsAndThreadsDoNotChangeABit) {
  for (const LowbitFormat format : kFormats)
    for (const bool int8 : {false, true})
      for (const Case& c : cases(format, 20)) {
        if (c.k > 300) continue;  // many fibers
        Problem p(c);
        const Floats all = p.gpu(int8);
        gpu::shim::set_reverse(true);
        EXPECT_EQ(p.gpu(int8), all) << static_cast<int>(format);
        gpu::shim::set_reverse(false);
        for (const int64_t rows : {1, 10}) {
          Case some = c;
          some.rows = rows;
          Problem few(some);  // the same weights, and the same first rows
          const Floats y = few.gpu(int8);
          EXPECT_EQ(last_row(y, c.n), last_row({all.begin(), all.begin() + rows * (c.n + 3)}, c.n))
              << static_cast<int>(format) << ", k = " << c.k << ", int8 " << int8;
        }
      }
}

// Codes straight in, codes straight out.
TEST(ShimLowbitLinear, IntegersOnly) {
  for (const int64_t rows : {3, 40}) {
    Problem p({.format = LowbitFormat::int2,
               .rows = rows,
               .n = 20,
               .k = 64,
               .group = 64,
               .x_type = DType::f32});
    std::vector<int8_t> x(rows * 64);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int8_t>(i * 37 % 255 - 127);
    const Floats scale = random_floats(rows, 7), multiplier = random_floats(20, 8, 30.f);
    LowbitLinear& a = p.args();
    a.io.x = x.data();
    a.io.residual = nullptr;
    a.x_scale = scale.data();
    EXPECT_EQ(p.gpu(true), p.scalar(true));
    a.multiplier = multiplier.data();
    a.low = -3;
    a.high = 100;
    EXPECT_EQ(p.gpu(true), p.scalar(true));
  }
}

TEST(ShimLowbitLinear, RowsOfZerosNanAndInfinity) {
  Problem p({.format = LowbitFormat::int4,
             .rows = 4,
             .n = 16,
             .k = 32,
             .group = 32,
             .x_type = DType::f32});
  std::vector<float> x(4 * 32, 0.f);
  x[32 + 5] = NAN;
  x[64 + 7] = -INFINITY;
  x[96] = 1e-44f;  // 127 / it is infinite
  p.args().io.x = x.data();
  p.args().io.residual = nullptr;
  p.args().io.bias = nullptr;
  const Floats y = p.gpu(true);
  for (int64_t n = 0; n < 16; ++n) {
    EXPECT_EQ(y[n], 0.f);
    EXPECT_TRUE(std::isnan(y[19 + n]));
    EXPECT_TRUE(std::isnan(y[38 + n]));
    EXPECT_EQ(y[57 + n], 0.f);
  }
}

}  // namespace
}  // namespace effinfer
