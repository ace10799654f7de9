// lowbit_linear on tensor cores. Two panels' 32 outputs are the rows of two products of 16 x 8 x 16
// (a gate and its up projection lie side by side), rows of x the columns. With g = lane / 4 and
// t = lane % 4 a thread reads quads of outputs 4g .. 4g + 3 of the two panels, 16 bytes in one
// access, for one k of its own per step; x is read in the same order, so k needs no shuffling.
//
// Weights enter the products as integers (value - zero, exact in every type), scales multiply
// finished sums: t = fma(scale, sum, t), then t = fma(offset, sum of x, t), for one segment after
// another. That order is the same in both kernels, so a row's bits do not depend on the number of
// rows; with int8 activations it is the op's contract, and the bits are every other kernel's.
#pragma once
#include "ops/lowbit_linear/cuda_problem.h"

namespace effinfer::lowbit {
namespace {

// ---- activations of 16-bit floats ---------------------------------------------------------------

template <class T>
struct Floats {
  using Number = float;
  using Sum = gpu::FragmentC;
  using Weights = gpu::FragmentA;
  using X = gpu::FragmentB;
  static constexpr int kBytes = 2;  // of an element of x
  static constexpr bool kWholeGroups = false;
  static constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static constexpr uint32_t kOnes = kBf16 ? 0x3f803f80u : 0x3c003c00u;

  // A byte under these bits is the float 128 + byte (bf16, which ends at 255) or 1024 + byte.
  static constexpr uint32_t kBase = kBf16 ? 0x43 : 0x64;

  // Minus a zero code, as weights() adds it.
  template <LowbitFormat F>
  static __device__ uint32_t minus(int zero) {
    if constexpr (!kBf16) return (0xe400u + static_cast<uint32_t>(zero)) * 0x10001u;
    const float value =
        F == LowbitFormat::int8 ? -8388608.f - static_cast<float>(zero) : -static_cast<float>(zero);
    if constexpr (F == LowbitFormat::int8) return gpu::float_to_bits(value);
    return (gpu::float_to_bits(value) >> 16) * 0x10001u;
  }

  // A quad less its zero, as two pairs.
  template <LowbitFormat F>
  static __device__ void pairs(uint32_t quad, uint32_t minus_zero, uint32_t& low, uint32_t& high) {
    if constexpr (kBf16 && F == LowbitFormat::int8) {  // through 2^23 + byte in float32
      uint32_t wide[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        wide[i] = gpu::float_to_bits(
            gpu::bits_to_float(gpu::permute_bytes(quad, 0x4b000000u, 0x7440u + i)) +
            gpu::bits_to_float(minus_zero));
      low = gpu::permute_bytes(wide[0], wide[1], 0x7632);
      high = gpu::permute_bytes(wide[2], wide[3], 0x7632);
      return;
    }
    low = gpu::permute_bytes(quad, kBase, 0x4140);
    high = gpu::permute_bytes(quad, kBase, 0x4342);
    if constexpr (kBf16) {
      low = gpu::fma_pairs<T>(low, kOnes, 0xc300c300u);
      high = gpu::fma_pairs<T>(high, kOnes, 0xc300c300u);
    }
    low = gpu::fma_pairs<T>(low, kOnes, minus_zero);
    high = gpu::fma_pairs<T>(high, kOnes, minus_zero);
  }

  template <LowbitFormat F>
  static __device__ Weights weights(const uint32_t (&quad)[2], const uint32_t* minus_zero) {
    Weights w;
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs<F>(quad[i], minus_zero[i], w.word[i], w.word[2 + i]);
    return w;
  }

  static __device__ void multiply(Sum& c, const Weights& w, const X& x) { gpu::mma<T>(c, w, x); }

  // Elements k to k + 3 of a row, zeros outside.
  static __device__ X x_at(const Problem& p, int64_t row, int k) {
    const Linear& a = p.args.io;
    const int64_t left = row < a.rows ? a.k - k : 0;
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride + k;
    if (p.aligned && left >= 4) return four(x);
    uint32_t bits[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) bits[i] = x[i].bits;
    return {{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}};
  }
  static __device__ X x_at(const uint8_t* shared_row, int k) { return four(shared_row + 2 * k); }
  static __device__ X four(const void* x) {
    const Words<2> words = *static_cast<const Words<2>*>(x);
    return {{words.v[0], words.v[1]}};
  }

  // 16 bytes of a row, from k on, to shared memory.
  static __device__ void copy_x(uint8_t* to, const Problem& p, int64_t row, int k) {
    const Linear& a = p.args.io;
    const int64_t left = row < a.rows ? a.k - k : 0;
    const T* x = static_cast<const T*>(a.x) + (left > 0 ? row * a.x_stride + k : 0);
    if (p.aligned && (left >= 8 || left <= 0)) return gpu::copy16(to, x, left > 0);
    for (int i = 0; i < 8; ++i) reinterpret_cast<T*>(to)[i] = i < left ? x[i] : T{0};
  }

  static __device__ float value(Number sum, int, Number) { return sum; }
};

// ---- activations of int8 ------------------------------------------------------------------------

struct Bytes {
  using Number = int32_t;
  using Sum = gpu::FragmentS;
  struct Weights {
    uint32_t word[2];
  };
  using X = uint32_t;
  static constexpr int kBytes = 1;
  static constexpr bool kWholeGroups = true;  // sums are exact: scales wait for a group's end

  template <LowbitFormat F>
  static __device__ uint32_t minus(int) {
    return 0;  // value() sees to zeros
  }
  template <LowbitFormat F>
  static __device__ Weights weights(const uint32_t (&quad)[2], const uint32_t*) {
    return {{quad[0], quad[1]}};
  }
  static __device__ void multiply(Sum& c, const Weights& w, X x) { gpu::mma_bytes(c, w.word, x); }

  static __device__ X x_at(const Problem& p, int64_t row, int k) {
    return row < p.args.io.rows ? words_at<1>(code_at(p, row, k)).v[0] : 0;
  }
  static __device__ X x_at(const uint8_t* shared_row, int k) {
    return words_at<1>(shared_row + k).v[0];
  }
  static __device__ void copy_x(uint8_t* to, const Problem& p, int64_t row, int k) {
    const bool in = row < p.args.io.rows && k < p.k_end;
    gpu::copy16(to, in ? code_at(p, row, k) : code_at(p, 0, 0), in);
  }
  static __device__ const uint8_t* code_at(const Problem& p, int64_t row, int k) {
    return reinterpret_cast<const uint8_t*>(p.codes) + row * p.k_end + k;
  }

  static __device__ float value(Number sum, int zero, Number x_sum) {
    return static_cast<float>(sum - zero * x_sum);
  }
};

// ---- what both kernels do -----------------------------------------------------------------------

// The k of a step that thread t of four reads: four to four threads, or in ternary_dense, whose
// triples lie side by side, a third of the twelve that are a thread's in the unit.
template <LowbitFormat F>
__device__ int k_of(int step, int t) {
  if constexpr (F != LowbitFormat::ternary_dense) return step + 4 * t;
  constexpr int kUnit = layout(F).unit_k;
  return step / kUnit * kUnit + 12 * t + step % kUnit / 4;
}

// Quads of outputs `first` to `first + 3` at k, from units that begin with k = 0.
template <LowbitFormat F>
__device__ Words<4> quads_at(const uint8_t* units, int k, int last_unit, int first) {
  constexpr Layout l = layout(F);
  const int unit = k / l.unit_k < last_unit ? k / l.unit_k : last_unit;
  return quads<F, 4>(units + int64_t{unit} * l.unit_bytes, first, k % l.unit_k / 4);
}

template <class A, LowbitFormat F>
__device__ void minus_zeros(const Problem& p, int64_t panel, int64_t group, int first,
                            uint32_t (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    out[i] = A::template minus<F>(zero_at(p.args.weight, panel, group, first + i));
}

template <class A, LowbitFormat F>
__device__ void both_weights(const Words<4>& quads, const uint32_t (&minus_zero)[4],
                             typename A::Weights (&out)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t two[2] = {quads.v[2 * i], quads.v[2 * i + 1]};
    out[i] = A::template weights<F>(two, minus_zero + 2 * i);
  }
}

// One output's numbers for a group, and what they make of a finished sum.
struct Affine {
  float scale, offset;
  int zero;
  bool has_offset;

  __device__ Affine(const LowbitWeight& w, int64_t panel, int64_t group, int lane)
      : scale(scale_at(w, panel, group, lane)),
        offset(w.offset != nullptr ? offset_at(w, panel, group, lane) : 0.f),
        zero(zero_at(w, panel, group, lane)),
        has_offset(w.offset != nullptr) {}

  // Rounded once on the shim too, where gpu::fma is not: the contract is about these bits.
  template <class A>
  __device__ float add(float t, typename A::Number sum, typename A::Number x_sum) const {
    t = fmaf(scale, A::value(sum, zero, x_sum), t);
    return has_offset ? fmaf(offset, static_cast<float>(x_sum), t) : t;
  }
};

template <class A>
__device__ typename A::Number sum_of_x(const Problem& p, int64_t section, int64_t row) {
  const int64_t rows = p.args.io.rows;
  if (p.sums == nullptr) return 0;
  return static_cast<const typename A::Number*>(
      p.sums)[section * rows + (row < rows ? row : rows - 1)];
}

// From t to y.
__device__ inline void finish(const Problem& p, int64_t row, int64_t n, float first, float second) {
  const LowbitLinear& args = p.args;
  if (args.int8_activations) {
    first = gpu::mul(p.x_scale[row], first);
    second = gpu::mul(p.x_scale[row], second);
  }
  if (args.multiplier == nullptr) return effinfer::finish(args.io, row, n, first, second);
  float v = gpu::mul(finished(args.io, row, n, first, second), args.multiplier[n]);
  v = v >= args.low ? v : args.low;
  v = v <= args.high ? v : args.high;
  static_cast<int8_t*>(args.io.y)[row * args.io.y_stride + n] = static_cast<int8_t>(rintf(v));
}

}  // namespace
}  // namespace effinfer::lowbit
