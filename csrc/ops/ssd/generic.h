// ssd over vec.h: a block of heads of one group, chunk by chunk (see ssd.h).
#include "ops/scan/rows.h"
#include "ops/ssd/panels.h"
#include "ops/ssd/step.h"
#include "ops/ssd/tile.h"
#include "ops/ssd/tokens.h"

namespace effinfer {
namespace {

constexpr float kLogDecayBound = 200.f;  // exp of it is 0 or inf in float32 whatever it multiplies
constexpr float kSmallestNormal = 1.17549435e-38f;

class BlockScan {
 public:
  BlockScan(const Ssd& args, int64_t sequence, int64_t head_begin, int64_t head_end, float* scratch)
      : a(args),
        sequence_(sequence),
        head_begin_(head_begin),
        head_end_(head_end),
        at_(args, head_end - head_begin),
        scratch_(scratch),
        walk_(args, sequence) {}

  void run() {
    zero_masked(a, walk_, head_begin_, head_end_);
    bool any = false;
    while ((tokens_ = walk_.next(kSsdChunk, positions_)) > 0) {
      any = true;
      load_group();
      load_x(head_begin_);
      for (int64_t head = head_begin_; head < head_end_; ++head) {
        load_head(head);
        if (tokens_ < kSsdShort) {
          if (head > head_begin_) load_x(head);
          scan_short(head);
        } else {
          scan_chunk(head);
        }
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
    if (tokens_ < kSsdShort) return;
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
  }

  // Two heads' x are held: this one's, and the next one's as it is loaded between tiles.
  float* packed_x(int64_t head) const {
    return scratch_ + ((head - head_begin_) % 2 == 0 ? at_.X : at_.next_X);
  }

  // Where a head's part of x, z or y begins, in elements.
  int64_t begin_of(const int64_t* strides, int64_t head) const {
    return walk_.row * strides[0] + head * strides[2];
  }

  bool dense(int64_t panel, int64_t step) const {
    return step == 1 && (panel + 1) * kPanel <= a.head_dim;
  }

  void load_x(int64_t head) {
    for (int64_t panel = 0; panel < at_.panels; ++panel) load_x(head, panel, 0, tokens_);
  }

  void load_x(int64_t head, int64_t panel, int64_t begin, int64_t end) const {
    const int64_t time = a.x_strides[1], step = a.x_strides[3], p = panel * kPanel;
    const int64_t from = begin_of(a.x_strides, head) + p * step;
    float* const to = packed_x(head) + p * kSsdChunk + begin * kPanel;
    if (dense(panel, step))
      return load_panel_rows(a.x, a.x_type, from, time, positions_ + begin, end - begin, to);
    const int64_t columns = least(kPanel, a.head_dim - p);
    for (int64_t i = begin; i < end; ++i) {
      float* const row = to + (i - begin) * kPanel;
      for (int64_t c = columns; c < kPanel; ++c) row[c] = 0.f;
      load_row(row, a.x, a.x_type, from + positions_[i] * time, step, columns);
    }
  }

  // delta, its decay, and the running sum of the decays' logarithms.
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
    const Vec rate = splat(a.A[head * a.A_stride]), bound = splat(kLogDecayBound);
    const Vec lo = splat(a.dt_min), hi = splat(a.dt_max);
    for (int64_t i = tokens_; i % kLanes != 0; ++i) delta[i] = 0.f;
    for (int64_t i = 0; i < tokens_; i += kLanes) {
      Vec d = load(delta + i) + bias;
      if (a.dt_softplus) d = softplus(d);
      d = min(hi, max(lo, d));  // NaN stays: it is the second operand
      const Vec log_decay = min(bound, max(-bound, d * rate));
      store(delta + i, d);
      store(decay + i, exp(log_decay));
      store(pre + i, log_decay);
    }
    double sum = 0;
    for (int64_t i = 0; i < tokens_; ++i) {
      sum += double{pre[i]};
      log_decay_[i] = sum;
      pre[i] = static_cast<float>(sum);
    }
    for (int64_t i = 0; i < tokens_; i += kLanes) store(pre + i, exp(load(pre + i)));
  }

  // y = (Y + D x) silu(z) for tokens [begin, end) of a panel.
  void store_y(int64_t head, int64_t panel, int64_t begin, int64_t end) const {
    const int64_t p = panel * kPanel, y_step = a.y_strides[3], z_step = a.z_strides[3];
    const int64_t y = begin_of(a.y_strides, head) + p * y_step;
    const int64_t z = begin_of(a.z_strides, head) + p * z_step;
    const float* const D = a.D != nullptr ? scratch_ + at_.D + p : nullptr;
    float* const Y = scratch_ + at_.Y + begin * kPanel;
    const float* const X = packed_x(head) + p * kSsdChunk + begin * kPanel;
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

  // ---- few tokens: one by one -------------------------------------------------------------------

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
    } else {
      unpack_state(a, at_, state(head), last);
    }
    float* to[kSsdShort];
    const int64_t keep = a.snapshot_count;
    for (int64_t i = 0; i < tokens_; ++i) {
      const int64_t k = walk_.after + tokens_ - 1 - i;
      to[i] = k > 0 && k < keep ? snapshot(a, sequence_, k, head) : last;
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
      const float* const X = packed_x(head) + p / kPanel * kPanel * kSsdChunk + p % kPanel;
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
      if (want_y && panel_done) store_y(head, p / kPanel, 0, tokens);
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
    weigh_scores();
    OutputTile tile = {scratch_ + at_.C,   at_.group_stride, nullptr, a.state_dim,
                       scratch_ + at_.pre, scratch_ + at_.M, nullptr, scratch_ + at_.Y};
    const bool more = head + 1 < head_end_;
    for (int64_t panel = 0; panel < at_.panels; ++panel) {
      tile.S = zero_ ? nullptr : S + panel * at_.state_rows * kPanel;
      tile.X = packed_x(head) + panel * kSsdChunk * kPanel;
      for (int64_t i = 0; i < tokens_; i += kTileRows) {
        const int64_t end = least(i + kTileRows, tokens_);
        // What misses the nearest cache moves a little at a time, hidden behind the tiles.
        fetch<1>(a.y, a.y_strides, head, panel, i, end);
        if (a.z != nullptr) fetch<0>(a.z, a.z_strides, head, panel, i, end);
        if (more) fetch<0>(a.x, a.x_strides, head + 1, panel, i, end);
        output_tile(tile, i);
        store_y(head, panel, i, end);
        if (more) load_x(head + 1, panel, i, end);
      }
    }
    advance(head, S, S, tokens_);
    if (walk_.after == 0) unpack_state(a, at_, S, last_state(a, sequence_, head));
    if (walk_.after < a.snapshot_count)
      unpack_state(a, at_, S, snapshot(a, sequence_, walk_.after, head));
  }

  // Heads and tokens lie too far apart for the hardware to guess what is needed next. Inlined,
  // because gcc takes a function that only prefetches for one without effect and drops its calls.
  template <int kWrite>
  EFFINFER_INLINE void fetch(const void* data, const int64_t* strides, int64_t head, int64_t panel,
                             int64_t begin, int64_t end) const {
    const int64_t size = size_of(a.x_type), time = strides[1] * size;
    const char* const from = static_cast<const char*>(data) +
                             (begin_of(strides, head) + panel * kPanel * strides[3]) * size;
    for (int64_t i = begin; i < end; ++i) __builtin_prefetch(from + positions_[i] * time, kWrite);
  }

  // M_ij = G_ij d_j prod_{j < k <= i} decay_k, the products by columns, j <= i.
  void weigh_scores() {
    const float* const G = scratch_ + at_.G;
    float* const M = scratch_ + at_.M;
    const float* const decay = scratch_ + at_.decay;
    const int64_t tokens = tokens_;
    IVec lane{};
    for (int l = 0; l < kLanes; ++l) lane[l] = l;
    for (int64_t j = 0; j < tokens; j += kLanes) {
      const Vec delta = load(scratch_ + at_.delta + j);
      Vec weight{};
      for (int64_t i = j; i < tokens; ++i) {
        weight = weight * splat(decay[i]);
        // Denormals are slow on some CPUs; what they would add is below any rounding.
        weight = select(abs(weight) < splat(kSmallestNormal), Vec{}, weight);
        if (i < j + kLanes)
          weight = select(lane == splat_i(static_cast<int>(i - j)), delta, weight);
        store(M + i * kSsdChunk + j, load(G + i * kSsdChunk + j) * weight);
      }
    }
  }

  // The packed state `tokens` into this chunk.
  void advance(int64_t head, const float* from, float* to, int64_t tokens) {
    float* const post = scratch_ + at_.post;
    const float* const delta = scratch_ + at_.delta;
    const double end = log_decay_[tokens - 1];
    for (int64_t j = 0; j < tokens; ++j) post[j] = static_cast<float>(end - log_decay_[j]);
    for (int64_t j = 0; j < tokens; j += kLanes)
      store(post + j, exp(load(post + j)) * load(delta + j));
    const int64_t N = a.state_dim, rows = at_.state_rows;
    const float* const B = scratch_ + at_.B;
    const float factor = (scratch_ + at_.pre)[tokens - 1];
    for (int64_t panel = 0; panel < at_.panels; ++panel) {
      const float* const X = packed_x(head) + panel * kSsdChunk * kPanel;
      float* const Xw = scratch_ + at_.Xw;
      for (int64_t j = 0; j < tokens; ++j) EFFINFER_UNROLL
      for (int v = 0; v < kVecs; ++v)
        store(Xw + j * kPanel + v * kLanes, load(X + j * kPanel + v * kLanes) * splat(post[j]));
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
        advance(head, S, scratch_ + at_.spare, tokens);
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
  int64_t tokens_ = 0;
  int64_t positions_[kSsdChunk];
  double log_decay_[kSsdChunk];
  bool zero_ = false;  // the head's state at the chunk's start is zero
};

void scan_block(const Ssd& a, int64_t sequence, int64_t head_begin, int64_t head_end,
                float* scratch) {
  BlockScan(a, sequence, head_begin, head_end, scratch).run();
}

}  // namespace
}  // namespace effinfer
