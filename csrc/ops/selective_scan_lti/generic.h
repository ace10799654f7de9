// selective_scan_lti over vec.h. Channels lie in the vector lanes, kLanes of them a block. A unit
// of channels walks time tile by tile; each block advances a few states at a time over the whole
// tile, with h in registers and the coefficients in registers or L1.
#include "ops/selective_scan/signals.h"
#include "ops/selective_scan_lti/selective_scan_lti.h"

namespace effinfer {
namespace {

// to[block][n][part][lane] = from[channel][n][part], `width` parts; zero in lanes past the last
// channel.
void pack(float* to, const float* from, int64_t width, int64_t channels, int64_t state) {
  const int64_t stride = state * width;
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t i = 0; i < stride; ++i, to += kLanes)
      store(to, load_strided(from + c * stride + i, stride, least(kLanes, channels - c)));
}

void unpack(float* to, const float* from, int64_t width, int64_t channels, int64_t state) {
  const int64_t stride = state * width;
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t i = 0; i < stride; ++i, from += kLanes)
      store_strided(to + c * stride + i, stride, load(from), least(kLanes, channels - c));
}

// What a block's loop reads, from one state on: each [n][part][lane].
struct Coefficients {
  const float *A, *B, *C;
};

// States n..n+kRows of one block over the tile: u and y are [t][lane].
template <int kRows>
void advance_real(const Coefficients& from, float* h_, const float* u, float* y, int64_t count) {
  Vec a[kRows], b[kRows], c[kRows], h[kRows];
  EFFINFER_UNROLL
  for (int i = 0; i < kRows; ++i) {
    a[i] = load(from.A + i * kLanes);
    b[i] = load(from.B + i * kLanes);
    c[i] = load(from.C + i * kLanes);
    h[i] = load(h_ + i * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    const Vec x = load(u + t * kLanes);
    Vec sum = load(y + t * kLanes);
    EFFINFER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      h[i] = fma(a[i], h[i], b[i] * x);
      sum = fma(c[i], h[i], sum);
    }
    store(y + t * kLanes, sum);
  }
  EFFINFER_UNROLL
  for (int i = 0; i < kRows; ++i) store(h_ + i * kLanes, h[i]);
}

// The same for complex numbers, whose parts are the even and odd vectors.
template <int kRows>
void advance_complex(const Coefficients& from, float* h_, const float* u, float* y, int64_t count) {
  Vec a[2 * kRows], b[2 * kRows], c[2 * kRows], h[2 * kRows];
  EFFINFER_UNROLL
  for (int i = 0; i < 2 * kRows; ++i) {
    a[i] = load(from.A + i * kLanes);
    b[i] = load(from.B + i * kLanes);
    c[i] = load(from.C + i * kLanes);
    h[i] = load(h_ + i * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    const Vec x = load(u + t * kLanes);
    Vec sum = load(y + t * kLanes);
    EFFINFER_UNROLL
    for (int re = 0; re < 2 * kRows; re += 2) {
      const int im = re + 1;
      const Vec next = fma(a[re], h[re], fnma(a[im], h[im], b[re] * x));
      h[im] = fma(a[re], h[im], fma(a[im], h[re], b[im] * x));
      h[re] = next;
      sum = fnma(c[im], h[im], fma(c[re], h[re], sum));
    }
    store(y + t * kLanes, sum);
  }
  EFFINFER_UNROLL
  for (int i = 0; i < 2 * kRows; ++i) store(h_ + i * kLanes, h[i]);
}

// All states of one block over the tile.
void advance(bool complex, const Coefficients& from, float* h, const float* u, float* y,
             int64_t state, int64_t count) {
  const int64_t width = complex ? 2 : 1;
  int64_t n = 0;
  const auto rows = [&](auto run, int64_t many) {
    for (; n + many <= state; n += many) {
      const int64_t at = n * width * kLanes;
      run({from.A + at, from.B + at, from.C + at}, h + at, u, y, count);
    }
  };
  if (complex) {
    rows(advance_complex<4>, 4);
    rows(advance_complex<1>, 1);
  } else {
    rows(advance_real<4>, 4);
    rows(advance_real<1>, 1);
  }
}

void scan_unit(const SelectiveScanLti& args, const ScanUnit& unit, float* scratch) {
  const SelectiveScanLti a = args;
  const int64_t state = a.state, channels = unit.channels, width = a.complex ? 2 : 1;
  const int64_t matrix = kScanUnit * state * width;
  // scratch_floats() of selective_scan_lti.cpp counts these.
  float* const A = scratch;
  float* const B = A + matrix;
  float* const C = B + matrix;
  float* const h = C + matrix;
  float* const D = h + matrix;
  float* const u_tile = D + kScanUnit;  // [block][t][lane], as y_tile
  float* const y_tile = u_tile + kUnitTile;
  float* const buffer = y_tile + kUnitTile;  // a signal whose channels are not adjacent
  const int64_t coefficients = unit.channel * state * width;
  const int64_t states = unit.sequence * a.dim * state * width + coefficients;

  pack(A, a.A + coefficients, width, channels, state);
  pack(B, a.B + coefficients, width, channels, state);
  pack(C, a.C + coefficients, width, channels, state);
  std::memset(h, 0, static_cast<size_t>(matrix + kScanUnit) * sizeof(float));  // and D
  if (a.initial_state != nullptr) pack(h, a.initial_state + states, width, channels, state);
  if (a.D != nullptr) load_row(D, a.D + unit.channel, 1, channels);

  Walk walk(a, unit);
  int64_t left = walk.tokens();
  if (left < unit.end - unit.begin) clear_masked(a.y, unit, walk);
  const auto snapshot = [&](int64_t k) {
    const int64_t row = (unit.sequence * a.num_snapshots + k) * a.dim * state * width;
    unpack(a.snapshots + row + coefficients, h, width, channels, state);
  };
  for (int64_t k = left; k < a.num_snapshots; ++k) snapshot(k);

  while (left > 0) {
    // The last num_snapshots tokens go one by one: where tiles end changes no bits.
    const int64_t before_snapshots = left - a.num_snapshots;
    walk.fill(before_snapshots > 0 ? least(before_snapshots, kScanTile) : 1);
    with_rows(a.u, unit, walk, buffer, [&](auto u) {
      for (int64_t t = 0; t < walk.count; ++t) {
        const auto* const row = u.row(t);
        int64_t at = t * kLanes;
        for (int64_t c = 0; c < channels; c += kLanes, at += kBlockTile) {
          u.prefetch(row + c);
          const Vec x = load(row + c);
          store(u_tile + at, x);
          store(y_tile + at, a.D != nullptr ? load(D + c) * x : Vec{});
        }
      }
    });
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t at = c * state * width, tile = c * kScanTile;
      advance(a.complex, {A + at, B + at, C + at}, h + at, u_tile + tile, y_tile + tile, state,
              walk.count);
    }
    with_output_rows(a.y, unit, walk, buffer, [&](auto to) {
      for (int64_t t = 0; t < walk.count; ++t) {
        auto* const row = to.row(t);
        const float* from = y_tile + t * kLanes;
        for (int64_t c = 0; c < channels; c += kLanes, from += kBlockTile)
          store(row + c, load(from));
      }
    });
    left -= walk.count;
    if (left < a.num_snapshots) snapshot(left);
  }
  unpack(a.last_state + states, h, width, channels, state);
}

}  // namespace
}  // namespace effinfer
