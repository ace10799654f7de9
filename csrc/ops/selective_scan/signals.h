// How selective_scan reads and writes its signals: all channels of a unit, a tile of positions at a
// time, row by row: a row is a few whole cache lines.
#pragma once
#include "ops/scan/rows.h"
#include "ops/selective_scan/selective_scan.h"

namespace effinfer {
namespace {

constexpr int64_t kBlockTile = kScanTile * kLanes;    // floats of one block over a tile
constexpr int64_t kUnitTile = kScanTile * kScanUnit;  // floats of the whole unit over a tile

// The valid positions of a unit in walking order, a tile at a time.
struct Walk {
  const uint8_t* mask;  // of position 0, or null
  int64_t mask_stride;
  int64_t next, end, direction;  // from next, up or down, to just before end
  int64_t count = 0;             // positions of the current tile
  int64_t at[kScanTile], in_order[kScanTile];

  template <class Args>  // of selective_scan or selective_scan_lti
  Walk(const Args& a, const ScanUnit& unit)
      : mask(a.mask != nullptr ? a.mask + unit.batch * a.mask_batch : nullptr),
        mask_stride(a.mask_time),
        next(a.reverse ? unit.end - 1 : unit.begin),
        end(a.reverse ? unit.begin - 1 : unit.end),
        direction(a.reverse ? -1 : 1) {
    for (int64_t t = 0; t < kScanTile; ++t) in_order[t] = t;
  }

  bool valid(int64_t t) const { return mask == nullptr || mask[t * mask_stride] != 0; }

  int64_t tokens() const {
    int64_t n = 0;
    for (int64_t t = next; t != end; t += direction) n += valid(t);
    return n;
  }

  void fill(int64_t limit) {
    for (count = 0; count < limit && next != end; next += direction)
      if (valid(next)) at[count++] = next;
  }

  bool rises_by_one() const { return at[count - 1] - at[0] == count - 1; }
};

// The unit over the tile: row t is data + at[t] * stride, adjacent channels up to a multiple of
// kLanes.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  const int64_t* at;
  int64_t ahead;  // elements from a row to the one of the next tile

  EFFINFER_INLINE T* row(int64_t t) const { return data + at[t] * stride; }
  // Rows are too short and too far apart for the hardware's prefetcher.
  EFFINFER_INLINE void prefetch(const T* p) const { __builtin_prefetch(p + ahead, 0, 2); }
};

// to[t][channel] = signal; lanes past the last channel are zero.
template <class T>
void gather(float* to, const T* from, int64_t channel_stride, int64_t time_stride, const Walk& walk,
            int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes, to += kLanes, from += kLanes * channel_stride) {
    const int64_t lanes = least(kLanes, channels - c);
    int64_t t = 0;
    if (time_stride == 1 && lanes == kLanes && walk.rises_by_one()) {
      for (; t + kLanes <= walk.count; t += kLanes) {
        Vec rows[kLanes];
        EFFINFER_UNROLL
        for (int i = 0; i < kLanes; ++i) rows[i] = load(from + i * channel_stride + walk.at[t]);
        transpose(rows);
        EFFINFER_UNROLL
        for (int i = 0; i < kLanes; ++i) store(to + (t + i) * kScanUnit, rows[i]);
      }
    }
    for (; t < walk.count; ++t)
      store(to + t * kScanUnit,
            load_strided(from + walk.at[t] * time_stride, channel_stride, lanes));
  }
}

template <class T>
void scatter(T* to, const float* from, int64_t channel_stride, int64_t time_stride,
             const Walk& walk, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes, from += kLanes, to += kLanes * channel_stride) {
    const int64_t lanes = least(kLanes, channels - c);
    int64_t t = 0;
    if (time_stride == 1 && lanes == kLanes && walk.rises_by_one()) {
      for (; t + kLanes <= walk.count; t += kLanes) {
        Vec rows[kLanes];
        EFFINFER_UNROLL
        for (int i = 0; i < kLanes; ++i) rows[i] = load(from + (t + i) * kScanUnit);
        transpose(rows);
        EFFINFER_UNROLL
        for (int i = 0; i < kLanes; ++i) store(to + i * channel_stride + walk.at[t], rows[i]);
      }
    }
    for (; t < walk.count; ++t)
      store_strided(to + walk.at[t] * time_stride, channel_stride, load(from + t * kScanUnit),
                    lanes);
  }
}

EFFINFER_INLINE bool in_place(const ScanSignal& s, const ScanUnit& unit) {
  return s.channel == 1 && unit.channels % kLanes == 0;
}

// Calls f with the rows of a signal: in place where channels are adjacent, else from `buffer`
// (kUnitTile floats), filled here.
template <class F>
EFFINFER_INLINE void with_rows(const ScanSignal& s, const ScanUnit& unit, const Walk& walk,
                               float* buffer, F&& f) {
  with_type(s.type, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(s.data) + unit.batch * s.batch + unit.channel * s.channel;
    if (in_place(s, unit))
      return f(Rows<const T>{from, s.time, walk.at, walk.direction * walk.count * s.time});
    gather(buffer, from, s.channel, s.time, walk, unit.channels);
    f(Rows<const float>{buffer, kScanUnit, walk.in_order, 0});
  });
}

// The same for a signal to write: f fills the rows.
template <class F>
EFFINFER_INLINE void with_output_rows(const ScanSignal& s, const ScanUnit& unit, const Walk& walk,
                                      float* buffer, F&& f) {
  with_type(s.type, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(s.data) + unit.batch * s.batch + unit.channel * s.channel;
    if (in_place(s, unit)) return f(Rows<T>{to, s.time, walk.at, 0});
    f(Rows<float>{buffer, kScanUnit, walk.in_order, 0});
    scatter(to, buffer, s.channel, s.time, walk, unit.channels);
  });
}

// y = 0 at masked positions.
inline void clear_masked(const ScanSignal& y, const ScanUnit& unit, const Walk& walk) {
  with_type(y.type, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(y.data) + unit.batch * y.batch + unit.channel * y.channel;
    for (int64_t t = unit.begin; t < unit.end; ++t)
      for (int64_t c = 0; !walk.valid(t) && c < unit.channels; ++c)
        to[c * y.channel + t * y.time] = T{};
  });
}

// to[t][n] = B or C at the tile's positions; writes up to kLanes - 1 floats past the last row.
inline void gather_rows(float* to, const ScanMatrix& m, const ScanUnit& unit, int64_t dim,
                        int64_t state, const Walk& walk) {
  const int64_t group = unit.channel / (dim / m.groups);
  with_type(m.type, [&](auto t) {
    const auto from = static_cast<const decltype(t)*>(m.data) + unit.batch * m.batch;
    for (int64_t i = 0; i < walk.count; ++i)
      load_row(to + i * state, from + group * m.group + walk.at[i] * m.time, m.state, state);
  });
}

}  // namespace
}  // namespace effinfer
