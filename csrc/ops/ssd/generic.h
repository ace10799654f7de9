// ssd over vec.h: a block of heads of one group, chunk by chunk (see ssd.h).
#include "ops/scan/rows.h"
#include "ops/ssd/panels.h"
#include "ops/ssd/step.h"
#include "ops/ssd/tile.h"
#include "ops/ssd/tokens.h"
#include "ops/ssd/weights.h"

namespace effinfer {
namespace {

class BlockScan {
 public:
  BlockScan(const Ssd& args, int64_t sequence, int64_t head_begin, int64_t head_end, float* scratch)
      : a(args),
        sequence_(sequence),
        head_begin_(head_begin),
        head_end_(head_end),
        at_(args, head_end - head_begin),
        scratch_(scratch),
        walk_(args, sequence),
        one_skip_(args.D != nullptr && args.D_strides[1] == 0),
        plain_y_(args.x_type == DType::f32 && args.z == nullptr &&
                 (args.D == nullptr || one_skip_)) {}

  void run() {
    zero_masked(a, walk_, head_begin_, head_end_);
    bool any = false;
    while ((tokens_ = walk_.next(kSsdChunk, positions_)) > 0) {
      any = true;
      load_group();
      for (int64_t head = head_begin_; head < head_end_; ++head) {
        load_head(head);
        if (steps())
          scan_short(head);
        else
          scan_chunk(head);
      }
    }
    if (any) return;
    for (int64_t head = head_begin_; head < head_end_; ++head) {
      const float* start = initial_state(a, sequence_, head);
      copy_state(a, start, last_state(a, sequence_, head));
      snapshot_start(a, sequence_, head, 0, start);
    }
  }

 private:
  bool steps() const { return a.one_by_one || tokens_ < kSsdShort; }

  // ---- what the heads of a group share ----------------------------------------------------------

  void load_group() {
    const int64_t N = a.state_dim, stride = at_.group_stride, group = head_begin_ / per_group();
    float* const B = scratch_ + at_.B;
    float* const C = scratch_ + at_.C;
    for (int64_t i = 0; i < tokens_; ++i) {
      const auto offset = [&](const int64_t* strides) {
        return walk_.row * strides[0] + positions_[i] * strides[1] + group * strides[2];
      };
      load_row(B + i * stride, a.B, a.B_type, offset(a.B_strides), a.B_strides[3], N);
      load_row(C + i * stride, a.C, a.B_type, offset(a.C_strides), a.C_strides[3], N);
      // Whole tiles of the packed state are updated: its padding stays zero.
      for (int64_t n = N; n < stride; ++n) B[i * stride + n] = 0.f;
    }
    if (steps()) return;
    float* const Bt = scratch_ + at_.Bt;
    const int64_t panel_floats = at_.state_rows * kPanel;
    for (int64_t j = 0; j < tokens_; j += kPanel)
      transpose(B + j * stride, stride, least(kPanel, tokens_ - j), N,
                Bt + j / kPanel * panel_floats, kPanel);
    float* const G = scratch_ + at_.G;
    for (int64_t i = 0; i < tokens_; i += kTileRows)
      for (int64_t j = 0; j < i + kTileRows; j += kPanel)
        scores_tile(C + i * stride, stride, Bt + j / kPanel * panel_floats, N,
                    G + i * kSsdChunk + j);
  }

  // ---- one head's tokens ------------------------------------------------------------------------

  void load_head(int64_t head) {
    float* const D = scratch_ + at_.D;
    for (int64_t p = 0; p < a.head_dim && a.D != nullptr; ++p)
      D[p] = a.D[head * a.D_strides[0] + p * a.D_strides[1]];
    load_steps(head);
    load_x(head);
  }

  // Where a head's part of x, z or y begins, or a group's of B or C, in elements.
  int64_t begin_of(const int64_t* strides, int64_t column) const {
    return walk_.row * strides[0] + column * strides[2];
  }

  bool dense(int64_t panel, int64_t step) const {
    return step == 1 && (panel + 1) * kPanel <= a.head_dim;
  }

  void load_x(int64_t head) {
    const int64_t time = a.x_strides[1], step = a.x_strides[3];
    const int64_t from = begin_of(a.x_strides, head);
    float* const X = scratch_ + at_.X;
    const int64_t whole = step == 1 ? a.head_dim / kPanel : 0;
    load_panels(a.x, a.x_type, from, time, positions_, tokens_, whole, X);
    for (int64_t p = whole * kPanel; p < a.head_dim; p += kPanel) {
      const int64_t columns = least(kPanel, a.head_dim - p);
      for (int64_t i = 0; i < tokens_; ++i) {
        float* const row = X + p * kSsdChunk + i * kPanel;
        for (int64_t c = columns; c < kPanel; ++c) row[c] = 0.f;
        load_row(row, a.x, a.x_type, from + positions_[i] * time + p * step, step, columns);
      }
    }
  }

  // delta, its decay, and the running product of the decays.
  void load_steps(int64_t head) {
    float* const delta = scratch_ + at_.delta;
    float* const decay = scratch_ + at_.decay;
    float* const pre = scratch_ + at_.pre;
    const int64_t offset = walk_.row * a.dt_strides[0] + head * a.dt_strides[2];
    with_type(a.dt_type, [&](auto t) {
      const auto* dt = static_cast<const decltype(t)*>(a.dt) + offset;
      for (int64_t i = 0; i < tokens_; ++i) delta[i] = load1(dt + positions_[i] * a.dt_strides[1]);
    });
    const Vec bias = splat(a.dt_bias != nullptr ? a.dt_bias[head * a.dt_bias_stride] : 0.f);
    const Vec rate = splat(a.A[head * a.A_stride]);
    const Vec lo = splat(a.dt_min), hi = splat(a.dt_max);
    for (int64_t i = tokens_; i < kSsdChunk; ++i) delta[i] = 0.f;
    for (int64_t i = 0; i < tokens_; i += kLanes) {
      Vec d = load(delta + i) + bias;
      if (a.dt_softplus) d = softplus(d);
      d = min(hi, max(lo, d));  // NaN stays: it is the second operand
      store(delta + i, d);
      store(decay + i, exp(d * rate));
    }
    float product = 1.f;
    for (int64_t i = 0; i < tokens_; ++i) {
      product *= decay[i];
      if (product < kSmallestNormal) product = 0.f;
      pre[i] = product;
    }
  }

  // y = (Y + D x) silu(z) for tokens [begin, end) of a panel, D null where Y has it.
  void store_y(int64_t head, int64_t panel, int64_t begin, int64_t end, const float* D) const {
    const int64_t p = panel * kPanel, y_step = a.y_strides[3], z_step = a.z_strides[3];
    const int64_t y = begin_of(a.y_strides, head) + p * y_step;
    const int64_t z = begin_of(a.z_strides, head) + p * z_step;
    if (D != nullptr) D += p;
    float* const Y = scratch_ + at_.Y + begin * kPanel;
    const float* const X = scratch_ + at_.X + p * kSsdChunk + begin * kPanel;
    if (dense(panel, y_step) && (a.z == nullptr || z_step == 1))
      return store_panel_rows({Y, X, D}, a, y, z, positions_ + begin, end - begin);
    const int64_t columns = least(kPanel, a.head_dim - p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = positions_[i];
      float* const row = Y + (i - begin) * kPanel;
      float gate[kPanel];
      if (a.z != nullptr) load_row(gate, a.z, a.x_type, z + at * a.z_strides[1], z_step, columns);
      for (int64_t c = 0; c < columns; c += kLanes) {
        Vec out = load(row + c);
        if (D != nullptr) out = fma(load(D + c), load(X + (i - begin) * kPanel + c), out);
        if (a.z != nullptr) out = out * silu(load(gate + c));
        store(row + c, out);
      }
      store_row(a.y, a.x_type, y + at * a.y_strides[1], row, y_step, columns);
    }
  }

  // ---- one by one -------------------------------------------------------------------

  void scan_short(int64_t head) {
    float* const last = last_state(a, sequence_, head);
    const float* from = last;
    if (walk_.restart) {
      from = start(head);
      if (from == nullptr) {
        copy_state(a, nullptr, last);
        from = last;
      }
      snapshots_before(head, from);
    } else if (!a.one_by_one) {
      unpack_state(a, at_, state(head), last);
    }
    float* to[kSsdChunk];
    const int64_t keep = a.snapshot_count;
    for (int64_t i = 0; i < tokens_; ++i) {
      const int64_t k = walk_.after + tokens_ - 1 - i;
      to[i] = k > walk_.after && k < keep ? snapshot(a, sequence_, k, head) : last;
    }
    step_tokens(head, from, to, tokens_, true);
    if (walk_.after < keep) copy_state(a, last, snapshot(a, sequence_, walk_.after, head));
  }

  // The state after token i goes to to[i], where it is read from again.
  void step_tokens(int64_t head, const float* start, float* const* to, int64_t tokens,
                   bool want_y) {
    const int64_t N = a.state_dim, P = a.head_dim, stride = at_.group_stride;
    const float* const delta = scratch_ + at_.delta;
    const float* const decay = scratch_ + at_.decay;
    for (int64_t p = 0; p < P; p += kLanes) {
      const float* const X = scratch_ + at_.X + p / kPanel * kPanel * kSsdChunk + p % kPanel;
      float* const Y = scratch_ + at_.Y + p % kPanel;
      const float* from = start + p * N;
      for (int64_t i = 0; i < tokens; ++i) {
        const StepArgs s = {.from = from,
                            .to = to[i] + p * N,
                            .from_stride = N,
                            .to_stride = N,
                            .N = N,
                            .B = scratch_ + at_.B + i * stride,
                            .C = scratch_ + at_.C + i * stride,
                            .A = nullptr,
                            .A_stride = 0};
        const Vec xd = splat(delta[i]) * load(X + i * kPanel);
        const Vec y = step_rows<false>(s, least(kLanes, P - p), splat(decay[i]), xd);
        store(Y + i * kPanel, y);
        from = s.to;
      }
      const bool panel_done = (p + kLanes) % kPanel == 0 || p + kLanes >= P;
      if (want_y && panel_done)
        store_y(head, p / kPanel, 0, tokens, a.D != nullptr ? scratch_ + at_.D : nullptr);
    }
  }

  // ---- many tokens: three products --------------------------------------------------------------

  void scan_chunk(int64_t head) {
    float* const S = state(head);
    zero_ = false;
    if (walk_.restart) {
      const float* from = start(head);
      snapshots_before(head, from);
      zero_ = from == nullptr;
      if (!zero_) pack_state(a, at_, from, S);
    }
    if (walk_.after + 1 < a.snapshot_count) snapshots_inside(head);
    weigh(tokens_);
    if (one_skip_)
      for (int64_t i = 0; i < tokens_; ++i)
        (scratch_ + at_.M)[i * kSsdChunk + i] += (scratch_ + at_.D)[0];
    fetch_next_chunk(head);
    write_y(head, S);
    advance(S, S, tokens_);
    if (walk_.after == 0) unpack_state(a, at_, S, last_state(a, sequence_, head));
    if (walk_.after < a.snapshot_count)
      unpack_state(a, at_, S, snapshot(a, sequence_, walk_.after, head));
  }

  void write_y(int64_t head, const float* S) {
    const bool in_a_row = positions_[tokens_ - 1] - positions_[0] == tokens_ - 1;
    const float* const D = a.D != nullptr && !one_skip_ ? scratch_ + at_.D : nullptr;
    OutputTile tile = {.C = scratch_ + at_.C,
                       .C_stride = at_.group_stride,
                       .N = a.state_dim,
                       .pre = scratch_ + at_.pre,
                       .M = scratch_ + at_.M};
    const int64_t parts = at_.panels * ((tokens_ + kTileRows - 1) / kTileRows);
    int64_t part = 0;
    for (int64_t panel = 0; panel < at_.panels; ++panel) {
      const int64_t p = panel * kPanel;
      const bool straight = plain_y_ && in_a_row && dense(panel, a.y_strides[3]);
      tile.S = zero_ ? nullptr : S + p * at_.state_rows;
      tile.X = scratch_ + at_.X + p * kSsdChunk;
      for (int64_t i = 0; i < tokens_; i += kTileRows) {
        const int64_t end = least(i + kTileRows, tokens_);
        fetch_next_head(head, part++, parts);
        if (straight && end == i + kTileRows) {
          float* const y = static_cast<float*>(a.y) + begin_of(a.y_strides, head) + p;
          output_tile(tile, i, y + positions_[i] * a.y_strides[1], a.y_strides[1]);
        } else {
          output_tile(tile, i, scratch_ + at_.Y + i * kPanel, kPanel);
          store_y(head, panel, i, end, D);
        }
      }
    }
  }

  // Heads and tokens lie too far apart for the hardware to guess what is needed next, so what a
  // head begins with is fetched a little at a time between the tiles of the one before. Inlined,
  // because gcc takes a function that only prefetches for one without effect and drops its calls.
  EFFINFER_INLINE void fetch_next_head(int64_t head, int64_t part, int64_t parts) const {
    if (++head == head_end_) return;
    for (int64_t i = tokens_ * part / parts; i < tokens_ * (part + 1) / parts; ++i) {
      const int64_t at = positions_[i];
      fetch<0>(a.x, a.x_type, a.x_strides, at, head, a.head_dim);
      fetch<1>(a.y, a.x_type, a.y_strides, at, head, a.head_dim);
      if (a.z != nullptr) fetch<0>(a.z, a.x_type, a.z_strides, at, head, a.head_dim);
    }
  }

  // A head's share of what the next chunk begins with.
  EFFINFER_INLINE void fetch_next_chunk(int64_t head) const {
    const int64_t part = head - head_begin_, parts = head_end_ - head_begin_;
    const int64_t group = head / per_group();
    for (int64_t i = tokens_ * part / parts; i < tokens_ * (part + 1) / parts; ++i) {
      const int64_t at = positions_[i] + tokens_;
      if (at >= walk_.end()) return;
      fetch<0>(a.B, a.B_type, a.B_strides, at, group, a.state_dim);
      fetch<0>(a.C, a.B_type, a.C_strides, at, group, a.state_dim);
      fetch<0>(a.x, a.x_type, a.x_strides, at, head_begin_, a.head_dim);
    }
  }

  template <int kWrite>
  EFFINFER_INLINE void fetch(const void* data, DType type, const int64_t* strides, int64_t at,
                             int64_t column, int64_t count) const {
    const int64_t size = size_of(type);
    const char* const from =
        static_cast<const char*>(data) + (begin_of(strides, column) + at * strides[1]) * size;
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i, kWrite);
  }

  void weigh(int64_t tokens) {
    weigh_scores(scratch_ + at_.G, scratch_ + at_.delta, scratch_ + at_.decay, tokens,
                 scratch_ + at_.M, scratch_ + at_.post);
  }

  // The packed state `tokens` into this chunk, which have been weighed.
  void advance(const float* from, float* to, int64_t tokens) {
    const float* const post = scratch_ + at_.post;
    const int64_t N = a.state_dim, rows = at_.state_rows;
    const float* const B = scratch_ + at_.B;
    const float factor = (scratch_ + at_.pre)[tokens - 1];
    for (int64_t panel = 0; panel < at_.panels; ++panel) {
      float* const Xw = scratch_ + at_.Xw;
      weigh_rows(scratch_ + at_.X + panel * kSsdChunk * kPanel, post, tokens, Xw);
      const int64_t part = panel * rows * kPanel;
      for (int64_t n = 0; n < N; n += kTileRows)
        state_tile(zero_ ? nullptr : from + part + n * kPanel, factor, B + n, at_.group_stride, Xw,
                   tokens, to + part + n * kPanel);
    }
  }

  // Snapshots due before this chunk's last token, each as a run that ends there would leave it.
  void snapshots_inside(int64_t head) {
    const float* const S = state(head);
    for (int64_t k = walk_.after + 1; k < a.snapshot_count && k < walk_.after + tokens_; ++k) {
      float* const to = snapshot(a, sequence_, k, head);
      const int64_t tokens = walk_.after + tokens_ - k;
      if (tokens >= kSsdShort) {
        weigh(tokens);
        advance(S, scratch_ + at_.spare, tokens);
        unpack_state(a, at_, scratch_ + at_.spare, to);
        continue;
      }
      if (zero_)
        copy_state(a, nullptr, to);
      else
        unpack_state(a, at_, S, to);
      float* each[kSsdShort];
      for (float*& t : each) t = to;
      step_tokens(head, to, each, tokens, false);
    }
  }

  // ---- states -----------------------------------------------------------------------------------

  // The state this run starts from when it restarts: null for zeros.
  const float* start(int64_t head) const {
    return walk_.first ? initial_state(a, sequence_, head) : nullptr;
  }

  void snapshots_before(int64_t head, const float* from) {
    if (walk_.after != TokenWalk::kNotLast)
      snapshot_start(a, sequence_, head, walk_.after + tokens_, from);
  }

  float* state(int64_t head) const {
    return scratch_ + at_.states + (head - head_begin_) * at_.state_floats;
  }

  int64_t per_group() const { return a.heads / a.groups; }

  const Ssd& a;
  const int64_t sequence_, head_begin_, head_end_;
  const SsdScratch at_;
  float* const scratch_;
  TokenWalk walk_;
  const bool one_skip_;  // D is one value per head, which the products take in
  const bool plain_y_;   // so that y is what they give
  int64_t tokens_ = 0;
  int64_t positions_[kSsdChunk];
  bool zero_ = false;  // the head's state at the chunk's start is zero
};

void scan_block(const Ssd& a, int64_t sequence, int64_t head_begin, int64_t head_end,
                float* scratch) {
  BlockScan(a, sequence, head_begin, head_end, scratch).run();
}

}  // namespace
}  // namespace effinfer
