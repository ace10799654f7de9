// selective_scan over vec.h. Channels lie in the vector lanes, kLanes of them a block. A unit of
// channels walks time tile by tile: the tile's steps and inputs are prepared row by row, then each
// block advances kRows states at a time over the whole tile with h in registers, then the tile's
// outputs are gated row by row.
#include "ops/selective_scan/signals.h"

namespace effinfer {
namespace {

// to[block][n][lane] = scale * from[channel][n], zero in lanes past the last channel.
template <class T>
void pack(float* to, const T* from, int64_t channel_stride, int64_t state_stride, int64_t channels,
          int64_t state, float scale) {
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t n = 0; n < state; ++n, to += kLanes)
      store(to, load_strided(from + c * channel_stride + n * state_stride, channel_stride,
                             least(kLanes, channels - c)) *
                    splat(scale));
}

void pack(float* to, const ScanMatrix& m, const ScanUnit& unit, int64_t state) {
  with_type(m.type, [&](auto t) {
    pack(to, static_cast<const decltype(t)*>(m.data) + unit.channel * m.group, m.group, m.state,
         unit.channels, state, 1.f);
  });
}

void unpack(float* to, const float* h, int64_t channels, int64_t state) {
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t n = 0; n < state; ++n, h += kLanes)
      store_strided(to + c * state + n, state, load(h), least(kLanes, channels - c));
}

// to[channel] = the largest |A|, over n.
void find_steepest(float* to, const float* A, int64_t channels, int64_t state) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vec largest{};
    for (int64_t n = 0; n < state; ++n, A += kLanes) largest = max(largest, abs(load(A)));
    store(to + c, largest);
  }
}

// What a block's loop is compiled for. Bounded: no |d A log2(e)| of the tile is above kExp2Bound.
struct Form {
  bool bounded, constant_b, constant_c;
};

// One block, states n..n+kRows, over the tile. A holds A * log2(e). A constant B or C is
// [n][lane], else [t][n].
template <int kRows, Form kForm>
void advance(const float* A, float* h_, const float* B, const float* C, const float* step,
             const float* input, float* y_, int64_t state, int64_t count) {
  Vec a[kRows], h[kRows], b[kRows], c[kRows], decay[kRows];
  EFFINFER_UNROLL
  for (int i = 0; i < kRows; ++i) {
    a[i] = load(A + i * kLanes);
    h[i] = load(h_ + i * kLanes);
    if (kForm.constant_b) b[i] = load(B + i * kLanes);
    if (kForm.constant_c) c[i] = load(C + i * kLanes);
  }
  const auto decays = [&](Vec d) {
    EFFINFER_UNROLL
    for (int i = 0; i < kRows; ++i)
      decay[i] = kForm.bounded ? exp2_bounded(d * a[i]) : exp2(d * a[i]);
  };
  const auto update = [&](int64_t t) {
    const Vec x = load(input + t * kLanes);
    Vec y = load(y_ + t * kLanes);
    EFFINFER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!kForm.constant_b) b[i] = splat(B[t * state + i]);
      if (!kForm.constant_c) c[i] = splat(C[t * state + i]);
      h[i] = fma(decay[i], h[i], x * b[i]);
      y = fma(c[i], h[i], y);
    }
    store(y_ + t * kLanes, y);
  };
  // The next step's decays wait for nothing here, and fill the waits of this step's sums.
  decays(load(step));
  for (int64_t t = 0; t + 1 < count; ++t) {
    const Vec d = load(step + (t + 1) * kLanes);
    update(t);
    decays(d);
  }
  update(count - 1);
  EFFINFER_UNROLL
  for (int i = 0; i < kRows; ++i) store(h_ + i * kLanes, h[i]);
}

template <Form kForm>
void advance_all(const float* A, float* h, const float* B, const float* C, const float* step,
                 const float* input, float* y, int64_t state, int64_t count) {
  constexpr int64_t kB = kForm.constant_b ? kLanes : 1, kC = kForm.constant_c ? kLanes : 1;
  int64_t n = 0;
  const auto rows = [&]<int kRows>() {
    advance<kRows, kForm>(A + n * kLanes, h + n * kLanes, B + n * kB, C + n * kC, step, input, y,
                          state, count);
    n += kRows;
  };
  while (n + 4 <= state) rows.template operator()<4>();
  if (n + 2 <= state) rows.template operator()<2>();
  if (n < state) rows.template operator()<1>();
}

using AdvanceFn = void (*)(const float*, float*, const float*, const float*, const float*,
                           const float*, float*, int64_t, int64_t);

template <bool kBounded>
AdvanceFn pick_advance(bool constant_b, bool constant_c) {
  if (constant_b)
    return constant_c ? advance_all<Form{kBounded, true, true}>
                      : advance_all<Form{kBounded, true, false}>;
  return constant_c ? advance_all<Form{kBounded, false, true}>
                    : advance_all<Form{kBounded, false, false}>;
}

// What prepare leaves for a tile, each [block][t][lane], and largest[block][lane] = max |step|.
struct Tile {
  float *step, *input, *y, *largest;
};

// step = softplus(delta + bias), input = step * u, y = D * u.
template <bool kSoftplus, class U, class Delta>
void prepare(const Tile& to, Rows<U> u, Rows<Delta> delta, const float* D, const float* bias,
             int64_t channels, int64_t count) {
  for (int64_t c = 0; c < channels; c += kLanes) store(to.largest + c, Vec{});
  for (int64_t t = 0; t < count; ++t) {
    const auto* u_row = u.row(t);
    const auto* delta_row = delta.row(t);
    int64_t at = t * kLanes;
    for (int64_t c = 0; c < channels; c += kLanes, at += kBlockTile) {
      u.prefetch(u_row + c);
      delta.prefetch(delta_row + c);
      const Vec x = load(u_row + c);
      Vec d = load(delta_row + c);
      if (bias != nullptr) d += load(bias + c);
      if (kSoftplus) d = softplus(d);
      store(to.largest + c, max(load(to.largest + c), abs(d)));
      store(to.step + at, d);
      store(to.input + at, d * x);
      store(to.y + at, D != nullptr ? load(D + c) * x : Vec{});
    }
  }
}

template <class Y, class Z>
void gate(Rows<Y> to, const float* y, Rows<Z> z, int64_t channels, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    Y* const row = to.row(t);
    const Z* const z_row = z.row(t);
    const float* from = y + t * kLanes;
    for (int64_t c = 0; c < channels; c += kLanes, from += kBlockTile) {
      z.prefetch(z_row + c);
      store(row + c, load(from) * silu(load(z_row + c)));
    }
  }
}

template <class Y>
void copy(Rows<Y> to, const float* y, int64_t channels, int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    Y* const row = to.row(t);
    const float* from = y + t * kLanes;
    for (int64_t c = 0; c < channels; c += kLanes, from += kBlockTile) store(row + c, load(from));
  }
}

void scan_unit(const SelectiveScan& args, const ScanUnit& unit, float* scratch) {
  const SelectiveScan a = args;
  const int64_t state = a.state, channels = unit.channels, matrix = kScanUnit * state;
  const bool constant_b = a.B.constant, constant_c = a.C.constant;
  // scratch_floats() of selective_scan.cpp counts these.
  float* const A = scratch;
  float* const h = A + matrix;
  float* const fixed_b = h + matrix;
  float* const fixed_c = fixed_b + matrix;
  float* const rows_b = fixed_c + matrix;
  float* const rows_c = rows_b + kScanTile * state + kLanes;
  float* const D_row = rows_c + kScanTile * state + kLanes;
  float* const bias_row = D_row + kScanUnit;
  float* const largest = bias_row + kScanUnit;
  float* const steepest = largest + kScanUnit;
  float* const step = steepest + kScanUnit;
  const Tile tile = {step, step + kUnitTile, step + 2 * kUnitTile, largest};
  float* const buffer = step + 3 * kUnitTile;  // two signals whose channels are not adjacent
  const int64_t first = (unit.sequence * a.dim + unit.channel) * state;

  pack(A, a.A + unit.channel * state, state, 1, channels, state, kLog2e);
  find_steepest(steepest, A, channels, state);
  if (a.initial_state != nullptr)
    pack(h, a.initial_state + first, state, 1, channels, state, 1.f);
  else
    std::memset(h, 0, static_cast<size_t>(matrix) * sizeof(float));
  if (constant_b) pack(fixed_b, a.B, unit, state);
  if (constant_c) pack(fixed_c, a.C, unit, state);
  const AdvanceFn bounded = pick_advance<true>(constant_b, constant_c);
  const AdvanceFn unbounded = pick_advance<false>(constant_b, constant_c);

  // This unit's part of D or the bias, with zeros in the lanes past the last channel.
  const auto parameter = [&](const float* from, float* to) -> const float* {
    if (from == nullptr) return nullptr;
    load_row(to, from + unit.channel, 1, channels);
    return to;
  };
  const float* const D = parameter(a.D, D_row);
  const float* const bias = parameter(a.delta_bias, bias_row);

  Walk walk(a, unit);
  int64_t left = walk.tokens();
  if (left < unit.end - unit.begin) clear_masked(a.y, unit, walk);
  const auto snapshot = [&](int64_t k) {
    const int64_t row = (unit.sequence * a.num_snapshots + k) * a.dim + unit.channel;
    unpack(a.snapshots + row * state, h, channels, state);
  };
  for (int64_t k = left; k < a.num_snapshots; ++k) snapshot(k);

  while (left > 0) {
    // The last num_snapshots tokens go one by one: where tiles end changes no bits.
    const int64_t before_snapshots = left - a.num_snapshots;
    walk.fill(before_snapshots > 0 ? least(before_snapshots, kScanTile) : 1);
    if (!constant_b) gather_rows(rows_b, a.B, unit, a.dim, state, walk);
    if (!constant_c) gather_rows(rows_c, a.C, unit, a.dim, state, walk);
    with_rows(a.u, unit, walk, buffer, [&](auto u) {
      with_rows(a.delta, unit, walk, buffer + kUnitTile, [&](auto delta) {
        if (a.softplus)
          prepare<true>(tile, u, delta, D, bias, channels, walk.count);
        else
          prepare<false>(tile, u, delta, D, bias, channels, walk.count);
      });
    });
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t rows = c * state, at = c * kScanTile;
      const Vec steepest_step = load(tile.largest + c) * load(steepest + c);
      const auto run = all(steepest_step <= splat(kExp2Bound)) ? bounded : unbounded;
      run(A + rows, h + rows, constant_b ? fixed_b + rows : rows_b,
          constant_c ? fixed_c + rows : rows_c, tile.step + at, tile.input + at, tile.y + at, state,
          walk.count);
    }
    with_output_rows(a.y, unit, walk, buffer, [&](auto to) {
      if (a.z.data == nullptr) return copy(to, tile.y, channels, walk.count);
      with_rows(a.z, unit, walk, buffer + kUnitTile,
                [&](auto z) { gate(to, tile.y, z, channels, walk.count); });
    });
    left -= walk.count;
    if (left < a.num_snapshots) snapshot(left);
  }
  unpack(a.last_state + first, h, channels, state);
}

}  // namespace
}  // namespace effinfer
