// linear over vec.h: one task. A few panels at a time walk down k together, block by block, each
// block against all rows; x lies ready in L2, the sums of those panels in L1.
#pragma once
#include "ops/linear/multiply.h"
#include "ops/linear/panels.h"

namespace effinfer {
namespace {

// The first lines of a stream of weights: hardware prefetchers follow what is being read only.
template <class W>
void prefetch_start(const W* w) {
  const char* const start = reinterpret_cast<const char*>(w);
  EFFINFER_UNROLL
  for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(start + line * kLine, 0, 2);
}

// Panels p to p + width of a task walk down a stretch. Sums are held in `held`; those of the last
// block go to `out`.
template <class W>
void walk_down(const Linear& a, const LinearTask& t, const Stretch& s, int64_t p, int64_t width,
               const Place& held, const Place& out, float* wide) {
  const int64_t k = a.k;
  const W* const weight = static_cast<const W*>(a.weight) + t.panel * k * kPanel;
  // What is read next: panels of this task, the rest of its k, or the next task.
  const W* const following = p + width < t.panels ? weight + ((p + width) * k + s.begin) * kPanel
                             : s.end < k          ? weight + s.end * kPanel
                                                  : weight + t.panels * k * kPanel;
  TileArgs<W> args = {};
  args.panel_stride = k * kPanel;
  args.w = weight + (p * k + s.begin) * kPanel;
  args.x = s.x;
  args.before = args.after = held;
  if (s.begin == 0) args.before.at = nullptr;
  for (int64_t left = s.end - s.begin;;) {
    args.terms = least(kTerms, left);
    left -= args.terms;
    const W* const next = left > 0 ? args.w + args.terms * kPanel : following;
    args.ahead = reinterpret_cast<const char*>(next);
    if (left == 0) {
      args.after = out;
      for (int64_t i = 0; i < width && !strips_prefetch<W>(t.rows, width); ++i)
        prefetch_start(following + i * args.panel_stride);
    }
    multiply<W>(args, width, t.rows, wide);
    if (left == 0) return;
    args.w = next;
    args.x += s.block_stride;
    args.before = held;
  }
}

template <class X, class W>
void run(const Linear& a, const LinearTask& t) {
  const bool streams = t.rows <= 2 || in_strips<W>(t.rows) || in_turns<W>(t.rows);
  const int64_t group = streams ? kMaxGroup : takes_two(a.epilogue) ? 2 : kTilePanels;
  run_panels<X>(a, t, group,
                [&](const Stretch& s, int64_t p, int64_t width, const Place& held, const Place& out,
                    float* wide) { walk_down<W>(a, t, s, p, width, held, out, wide); });
}

void dispatch(const Linear& a, const LinearTask& t) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.weight_type, [&](auto w) { run<decltype(x), decltype(w)>(a, t); });
  });
}

}  // namespace
}  // namespace effinfer
