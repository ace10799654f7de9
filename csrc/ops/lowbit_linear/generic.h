// lowbit_linear on float activations over vec.h: linear's walk over panels and its tiles, on
// weights that become float32 on the way.
#pragma once
#include "ops/linear/multiply.h"
#include "ops/linear/panels.h"
#include "ops/lowbit_linear/decode_dense.h"
#include "ops/lowbit_linear/stream.h"

namespace effinfer {
namespace {

constexpr int64_t kStreamed = 2;  // panels side by side in registers

// How a row's weights may be computed in registers.
enum class Exact { not_folded, folded, fused };

Exact exactness(const LowbitWeight& w, int64_t panel, int64_t panels, int64_t k) {
  IVec fused = splat_i(-1), folded = fused;
  const int64_t count = (k + w.group - 1) / w.group * kPanel;
  for (int64_t p = panel; p < panel + panels; ++p) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec scale = load_as(w.scale, w.scale_type, p * w.scale_stride + i);
      fused &= fuses(scale);
      folded &= ~(abs(scale) < splat(kLeastFolded)) | (scale == Vec{});
    }
  }
  if (w.scale_type != DType::f32 && all(fused)) return Exact::fused;
  return all(folded) ? Exact::folded : Exact::not_folded;
}

// How a weight's panels are decoded: to [terms, 16] floats, or kStreamed of them times one row.
struct Decode {
  void (*block)(const PackedBlock&, float* out);
  void (*stream)(const PackedBlock&, const float* x, float* sums);  // or null
};

template <Codes kCodes, bool kOffset>
Decode decode_as(Exact how) {
  using Plain = Decoder<kCodes, kOffset, false>;
  Decode d = {decode<Plain>, nullptr};
  if (how != Exact::not_folded) d.stream = stream<Decoder<kCodes, kOffset, true>, kStreamed>;
  if constexpr (kCodes == Codes::four || kCodes == Codes::three || kCodes == Codes::two) {
    if (how == Exact::fused) d.stream = stream<FusedDecoder<kCodes, kOffset>, kStreamed>;
  }
  return d;
}

template <bool kOffset>
Decode decode_of(const LowbitWeight& w, Exact how) {
  switch (w.format) {
    case LowbitFormat::int8:
      return w.zero != nullptr ? decode_as<Codes::eight_with_zero, kOffset>(how)
                               : decode_as<Codes::eight, kOffset>(how);
    case LowbitFormat::int4:
      return decode_as<Codes::four, kOffset>(how);
    case LowbitFormat::int3:
      return decode_as<Codes::three, kOffset>(how);
    case LowbitFormat::int2:
    case LowbitFormat::ternary:
      return decode_as<Codes::two, kOffset>(how);
    case LowbitFormat::binary:
      return decode_as<Codes::one, kOffset>(how);
    case LowbitFormat::ternary_dense:
      break;
  }
  return {decode_dense<kOffset>, nullptr};
}

// after = before + sums, for one row of adjacent panels
void add_row(const Place& before, const Place& after, int64_t panels, const float* sums) {
  for (int64_t p = 0; p < panels; ++p) {
    EFFINFER_UNROLL
    for (int64_t v = 0; v < kPanel; v += kLanes) {
      const Vec sum = load(sums + p * kPanel + v);
      const float* const held = before.at + p * before.panel + v;
      store(after.at + p * after.panel + v, before.at != nullptr ? load(held) + sum : sum);
    }
  }
}

// A block of `panels` panels times all rows, panel by panel: decoded, then as linear's.
void decode_and_multiply(const Decode& d, PackedBlock b, TileArgs<float> args, int64_t panels,
                         int64_t rows, float* wide) {
  float* const strip_sums = wide + kTerms * kPanel;
  for (; panels >= kTilePanels && rows > kTileHeight; panels -= kTilePanels) {
    for (int64_t p = 0; p < kTilePanels; ++p, ++b.panel) d.block(b, wide + p * kTerms * kPanel);
    args.w = wide;
    args.panel_stride = kTerms * kPanel;
    sweep_rows<kTilePanels, float>(args, rows, 0);
    if (args.before.at != nullptr) args.before.at += kTilePanels * args.before.panel;
    args.after.at += kTilePanels * args.after.panel;
  }
  for (; panels > 0; --panels, ++b.panel) {
    d.block(b, wide);
    args.w = wide;
    multiply(args, 1, rows, strip_sums);
    if (args.before.at != nullptr) args.before.at += args.before.panel;
    args.after.at += args.after.panel;
  }
}

// Panels p to p + width of a task walk down a stretch, block by block.
void walk_down(const LowbitLinear& a, const LinearTask& t, const Decode& d, const Stretch& s,
               int64_t p, int64_t width, const Place& held, const Place& out, float* wide) {
  TileArgs<float> args = {};
  args.x = s.x;
  args.before = args.after = held;
  if (s.begin == 0) args.before.at = nullptr;
  PackedBlock block = {&a.weight, t.panel + p, s.begin, 0};
  for (;;) {
    block.terms = args.terms = least(kTerms, s.end - block.begin);
    const bool last = block.begin + block.terms == s.end;
    if (last) args.after = out;
    int64_t streamed = 0;
    if (t.rows == 1 && d.stream != nullptr) {
      streamed = width / kStreamed * kStreamed;
      for (int64_t i = 0; i < streamed; i += kStreamed) {
        const PackedBlock pair = {&a.weight, block.panel + i, block.begin, block.terms};
        d.stream(pair, args.x, wide + i * kPanel);
      }
      add_row(args.before, args.after, streamed, wide);
    }
    if (streamed < width) {
      TileArgs<float> rest = args;
      if (rest.before.at != nullptr) rest.before.at += streamed * rest.before.panel;
      rest.after.at += streamed * rest.after.panel;
      const PackedBlock others = {&a.weight, block.panel + streamed, block.begin, block.terms};
      decode_and_multiply(d, others, rest, width - streamed, t.rows, wide);
    }
    if (last) return;
    block.begin += block.terms;
    args.x += s.block_stride;
    args.before = held;
  }
}

void float_task(const LowbitLinear& a, const LinearTask& t) {
  const Exact how =
      t.rows == 1 ? exactness(a.weight, t.panel, t.panels, a.io.k) : Exact::not_folded;
  const Decode d =
      a.weight.offset != nullptr ? decode_of<true>(a.weight, how) : decode_of<false>(a.weight, how);
  const int64_t group = t.rows <= kTileHeight      ? kMaxGroup
                        : takes_two(a.io.epilogue) ? 2
                                                   : kTilePanels;
  const auto walk = [&](const Stretch& s, int64_t p, int64_t width, const Place& held,
                        const Place& out,
                        float* wide) { walk_down(a, t, d, s, p, width, held, out, wide); };
  with_type(a.io.x_type, [&](auto x) { run_panels<decltype(x)>(a.io, t, group, walk); });
}

}  // namespace
}  // namespace effinfer
