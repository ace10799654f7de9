// selective_scan over vec.h. Channels lie in the vector lanes, `kLanes` of them a block. A unit of
// channels walks time tile by tile: the tile's operands are converted to float32 block by block,
// then each block advances kRows states at a time over the whole tile with h in registers.
#include "base/vec.h"
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kBlocks = kScanUnit / kLanes;
constexpr int64_t kBlockTile = kScanTile * kLanes;  // floats of one signal: a block over a tile

EFFINFER_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Valid positions of the unit, in walking order, a tile at a time.
struct Walk {
  const uint8_t* mask;  // at position 0, or null
  int64_t mask_stride;
  int64_t next, end, direction;  // runs from next up or down to just before end
  int64_t count;                 // positions of the current tile
  int64_t at[kScanTile];

  bool valid(int64_t t) const { return mask == nullptr || mask[t * mask_stride] != 0; }

  void fill(int64_t limit) {
    for (count = 0; count < limit && next != end; next += direction)
      if (valid(next)) at[count++] = next;
  }
};

// to[block][t][lane] = signal at the tile's positions, zero in lanes past the last channel.
template <class T>
void gather(float* to, const T* from, int64_t channel_stride, int64_t time_stride, const Walk& walk,
            int64_t channels) {
  const int64_t count = walk.count;
  for (int64_t t = 0; t < count; ++t) {
    const T* row = from + walk.at[t] * time_stride;
    float* out = to + t * kLanes;
    int64_t c = 0;
    if (channel_stride == 1) {
      for (; c + kLanes <= channels; c += kLanes, out += kBlockTile) store(out, load(row + c));
      if (c < channels) store(out, load_n(row + c, channels - c));
    } else {
      for (; c < channels; c += kLanes, out += kBlockTile)
        store(out,
              load_strided(row + c * channel_stride, channel_stride, least(kLanes, channels - c)));
    }
  }
}

void gather(float* to, const ScanSignal& signal, const ScanUnit& unit, const Walk& walk) {
  const int64_t offset = unit.batch * signal.batch + unit.channel * signal.channel;
  with_type(signal.type, [&](auto t) {
    gather(to, static_cast<const decltype(t)*>(signal.data) + offset, signal.channel, signal.time,
           walk, unit.channels);
  });
}

template <class T>
void scatter(T* to, const float* from, int64_t channel_stride, int64_t time_stride,
             const Walk& walk, int64_t channels) {
  const int64_t count = walk.count;
  for (int64_t t = 0; t < count; ++t) {
    T* row = to + walk.at[t] * time_stride;
    const float* in = from + t * kLanes;
    int64_t c = 0;
    if (channel_stride == 1) {
      for (; c + kLanes <= channels; c += kLanes, in += kBlockTile) store(row + c, load(in));
      if (c < channels) store_n(row + c, load(in), channels - c);
    } else {
      for (; c < channels; c += kLanes, in += kBlockTile)
        store_strided(row + c * channel_stride, channel_stride, load(in),
                      least(kLanes, channels - c));
    }
  }
}

void scatter(const ScanSignal& signal, const float* from, const ScanUnit& unit, const Walk& walk) {
  const int64_t offset = unit.batch * signal.batch + unit.channel * signal.channel;
  with_type(signal.type, [&](auto t) {
    scatter(static_cast<decltype(t)*>(signal.data) + offset, from, signal.channel, signal.time,
            walk, unit.channels);
  });
}

// y = 0 at masked positions.
void clear_masked(const ScanSignal& y, const ScanUnit& unit, const Walk& walk) {
  with_type(y.type, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(y.data) + unit.batch * y.batch + unit.channel * y.channel;
    for (int64_t t = unit.begin; t < unit.end; ++t)
      for (int64_t c = 0; !walk.valid(t) && c < unit.channels; ++c)
        to[c * y.channel + t * y.time] = T{};
  });
}

// to[t][n] = B or C at the tile's positions.
template <class T>
void gather_rows(float* to, const T* from, int64_t state_stride, int64_t time_stride,
                 const Walk& walk, int64_t state) {
  const int64_t count = walk.count;
  for (int64_t t = 0; t < count; ++t, to += state) {
    const T* row = from + walk.at[t] * time_stride;
    int64_t n = 0;
    if (state_stride == 1)
      for (; n + kLanes <= state; n += kLanes) store(to + n, load(row + n));
    for (; n < state; ++n) to[n] = load1(row + n * state_stride);
  }
}

void gather_rows(float* to, const ScanMatrix& m, const ScanUnit& unit, int64_t dim, int64_t state,
                 const Walk& walk) {
  const int64_t group = unit.channel / (dim / m.groups);
  with_type(m.type, [&](auto t) {
    const auto from = static_cast<const decltype(t)*>(m.data) + unit.batch * m.batch;
    gather_rows(to, from + group * m.group, m.state, m.time, walk, state);
  });
}

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

// One block, states n..n+kRows, over the tile. A holds A * log2(e). A constant B or C is
// [n][lane], else [t][n].
template <int kRows, bool kConstantB, bool kConstantC>
void advance(const float* A, float* h_, const float* B, const float* C, const float* step,
             const float* input, float* y_, int64_t state, int64_t count) {
  Vec a[kRows], h[kRows], b[kRows], c[kRows];
  EFFINFER_UNROLL
  for (int i = 0; i < kRows; ++i) {
    a[i] = load(A + i * kLanes);
    h[i] = load(h_ + i * kLanes);
    if (kConstantB) b[i] = load(B + i * kLanes);
    if (kConstantC) c[i] = load(C + i * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    const Vec d = load(step + t * kLanes), x = load(input + t * kLanes);
    Vec y = load(y_ + t * kLanes);
    EFFINFER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!kConstantB) b[i] = splat(B[t * state + i]);
      if (!kConstantC) c[i] = splat(C[t * state + i]);
      h[i] = fma(exp2(d * a[i]), h[i], x * b[i]);
      y = fma(c[i], h[i], y);
    }
    store(y_ + t * kLanes, y);
  }
  EFFINFER_UNROLL
  for (int i = 0; i < kRows; ++i) store(h_ + i * kLanes, h[i]);
}

template <bool kConstantB, bool kConstantC>
void advance_all(const float* A, float* h, const float* B, const float* C, const float* step,
                 const float* input, float* y, int64_t state, int64_t count) {
  constexpr int64_t kB = kConstantB ? kLanes : 1, kC = kConstantC ? kLanes : 1;
  int64_t n = 0;
  const auto rows = [&]<int kRows>() {
    advance<kRows, kConstantB, kConstantC>(A + n * kLanes, h + n * kLanes, B + n * kB, C + n * kC,
                                           step, input, y, state, count);
    n += kRows;
  };
  while (n + 4 <= state) rows.template operator()<4>();
  if (n + 2 <= state) rows.template operator()<2>();
  if (n < state) rows.template operator()<1>();
}

using AdvanceFn = void (*)(const float*, float*, const float*, const float*, const float*,
                           const float*, float*, int64_t, int64_t);

// step = softplus(delta + bias), input = step * u, y = D * u; in place over delta and u.
void prepare(float* step, float* input, float* y, const float* D, const float* bias, int64_t lanes,
             bool with_softplus, int64_t count) {
  const Vec skip = D != nullptr ? load_n(D, lanes) : Vec{};
  const Vec offset = bias != nullptr ? load_n(bias, lanes) : Vec{};
  for (int64_t t = 0; t < count * kLanes; t += kLanes) {
    const Vec u = load(input + t);
    Vec d = load(step + t) + offset;
    if (with_softplus) d = softplus(d);
    store(step + t, d);
    store(input + t, d * u);
    store(y + t, D != nullptr ? skip * u : Vec{});
  }
}

void gate(float* y, const float* z, int64_t count) {
  for (int64_t t = 0; t < count * kLanes; t += kLanes)
    store(y + t, load(y + t) * silu(load(z + t)));
}

void scan_unit(const SelectiveScan& args, const ScanUnit& unit, float* scratch) {
  const SelectiveScan a = args;
  const int64_t state = a.state, channels = unit.channels, matrix = kScanUnit * state;
  const bool constant_b = a.B.constant, constant_c = a.C.constant, gated = a.z.data != nullptr;
  float* const A = scratch;
  float* const h = A + matrix;
  float* const fixed_b = h + matrix;
  float* const fixed_c = fixed_b + matrix;
  float* const rows_b = fixed_c + matrix;
  float* const rows_c = rows_b + kScanTile * state;
  float* const step = rows_c + kScanTile * state;
  float* const input = step + kBlocks * kBlockTile;
  float* const y = input + kBlocks * kBlockTile;
  float* const z = y + kBlocks * kBlockTile;
  const int64_t first = (unit.sequence * a.dim + unit.channel) * state;

  pack(A, a.A + unit.channel * state, state, 1, channels, state, kLog2e);
  if (a.initial_state != nullptr)
    pack(h, a.initial_state + first, state, 1, channels, state, 1.f);
  else
    std::memset(h, 0, static_cast<size_t>(matrix) * sizeof(float));
  if (constant_b) pack(fixed_b, a.B, unit, state);
  if (constant_c) pack(fixed_c, a.C, unit, state);
  const AdvanceFn advance_block =
      constant_b   ? constant_c ? advance_all<true, true> : advance_all<true, false>
        : constant_c ? advance_all<false, true>
                   : advance_all<false, false>;

  Walk walk{.mask = a.mask != nullptr ? a.mask + unit.batch * a.mask_batch : nullptr,
            .mask_stride = a.mask_time,
            .next = a.reverse ? unit.end - 1 : unit.begin,
            .end = a.reverse ? unit.begin - 1 : unit.end,
            .direction = a.reverse ? -1 : 1,
            .count = 0,
            .at = {}};
  int64_t left = 0;  // tokens still to walk
  for (int64_t t = unit.begin; t < unit.end; ++t) left += walk.valid(t);
  if (left < unit.end - unit.begin) clear_masked(a.y, unit, walk);
  const auto snapshot = [&](int64_t k) {
    float* to =
        a.snapshots + ((unit.sequence * a.num_snapshots + k) * a.dim + unit.channel) * state;
    unpack(to, h, channels, state);
  };
  for (int64_t k = left; k < a.num_snapshots; ++k) snapshot(k);

  while (left > 0) {
    // The last num_snapshots tokens go one by one: where tiles end changes no bits.
    const int64_t before_snapshots = left - a.num_snapshots;
    walk.fill(before_snapshots > 0 ? least(before_snapshots, kScanTile) : 1);
    gather(step, a.delta, unit, walk);
    gather(input, a.u, unit, walk);
    if (gated) gather(z, a.z, unit, walk);
    if (!constant_b) gather_rows(rows_b, a.B, unit, a.dim, state, walk);
    if (!constant_c) gather_rows(rows_c, a.C, unit, a.dim, state, walk);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t tile = c / kLanes * kBlockTile, rows = c * state;
      const int64_t lanes = least(kLanes, channels - c);
      prepare(step + tile, input + tile, y + tile,
              a.D != nullptr ? a.D + unit.channel + c : nullptr,
              a.delta_bias != nullptr ? a.delta_bias + unit.channel + c : nullptr, lanes,
              a.softplus, walk.count);
      advance_block(A + rows, h + rows, constant_b ? fixed_b + rows : rows_b,
                    constant_c ? fixed_c + rows : rows_c, step + tile, input + tile, y + tile,
                    state, walk.count);
      if (gated) gate(y + tile, z + tile, walk.count);
    }
    scatter(a.y, y, unit, walk);
    left -= walk.count;
    if (left < a.num_snapshots) snapshot(left);
  }
  unpack(a.last_state + first, h, channels, state);
}

}  // namespace
}  // namespace effinfer
