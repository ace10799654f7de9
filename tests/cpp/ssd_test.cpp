#include "ops/ssd/ssd.h"

#include <algorithm>
#include <array>

#include "ops/ssd_state_update/ssd_state_update.h"
#include "testing.h"

namespace effinfer {
namespace {

class SsdTest : public testing::PerIsa {};
EFFINFER_PER_ISA(SsdTest);

// One layer's buffers, exactly as large as the op may touch.
template <class T>
struct Layer {
  int64_t length, heads, P, groups, N;
  std::vector<T> x, B, C, z, y, dt;
  std::vector<float> A, D, bias, first, last, snapshots;

  Layer(int64_t length, int64_t heads, int64_t P, int64_t groups, int64_t N)
      : length(length), heads(heads), P(P), groups(groups), N(N) {
    auto random = [seed = 1u](int64_t n, float scale = 1.f) mutable {
      return testing::random_floats(static_cast<size_t>(n), ++seed, scale);
    };
    x = testing::to_type<T>(random(length * heads * P));
    z = testing::to_type<T>(random(length * heads * P));
    B = testing::to_type<T>(random(length * groups * N));
    C = testing::to_type<T>(random(length * groups * N));
    dt = testing::to_type<T>(random(length * heads, 0.5f));
    A = random(heads);
    for (float& v : A) v = -std::abs(v) - 0.5f;
    D = random(heads);
    bias = random(heads);
    for (float& v : bias) v -= 2.f;
    first = random(heads * P * N);
    last.resize(first.size());
    y.resize(x.size());
  }

  // The scan of the first `tokens` tokens.
  void scan(DType type, int64_t tokens, int64_t keep = 0) {
    snapshots.assign(static_cast<size_t>(keep) * first.size(), 0.f);
    Ssd a = {};
    a.x = x.data();
    a.dt = dt.data();
    a.A = A.data();
    a.B = B.data();
    a.C = C.data();
    a.D = D.data();
    a.z = z.data();
    a.dt_bias = bias.data();
    a.initial_state = first.data();
    a.y = y.data();
    a.last_state = last.data();
    a.snapshots = snapshots.data();
    a.batch = a.sequences = 1;
    a.length = tokens;
    a.heads = heads;
    a.head_dim = P;
    a.groups = groups;
    a.state_dim = N;
    a.snapshot_count = keep;
    for (auto* strides : {a.x_strides, a.z_strides, a.y_strides}) set(strides, heads * P, P);
    for (auto* strides : {a.B_strides, a.C_strides}) set(strides, groups * N, N);
    a.dt_strides[1] = heads;
    a.dt_strides[2] = a.D_strides[0] = a.A_stride = a.dt_bias_stride = 1;
    a.x_type = a.dt_type = a.B_type = type;
    a.dt_max = 1.f;
    a.dt_softplus = true;
    a.slots = 1;
    std::vector<float> scratch(static_cast<size_t>(ssd_scratch(a)));
    a.scratch = scratch.data();
    ssd(a);
  }

  static void set(int64_t* strides, int64_t time, int64_t head) {
    strides[0] = 0;
    strides[1] = time;
    strides[2] = head;
    strides[3] = 1;
  }

  // One decode step with token t, from and to `first`.
  void update(DType type, int64_t t) {
    const auto row = [&](auto& v, int64_t width) { return v.data() + t * width; };
    SsdStateUpdate a = {};
    a.state = first.data();
    a.x = row(x, heads * P);
    a.dt = row(dt, heads);
    a.A = A.data();
    a.B = row(B, groups * N);
    a.C = row(C, groups * N);
    a.D = D.data();
    a.z = row(z, heads * P);
    a.dt_bias = bias.data();
    a.y = row(y, heads * P);
    a.batch = a.slots = 1;
    a.heads = heads;
    a.head_dim = P;
    a.groups = groups;
    a.state_dim = N;
    a.state_strides[1] = P * N;
    a.state_strides[2] = N;
    a.state_strides[3] = 1;
    for (auto* strides : {a.x_strides, a.z_strides, a.y_strides}) {
      strides[1] = P;
      strides[2] = 1;
    }
    for (auto* strides : {a.B_strides, a.C_strides}) {
      strides[1] = N;
      strides[2] = 1;
    }
    a.dt_strides[1] = a.A_strides[0] = a.D_strides[0] = a.dt_bias_strides[0] = 1;
    a.x_type = a.dt_type = a.B_type = type;
    a.dt_max = 1.f;
    a.dt_softplus = true;
    ssd_state_update(a);
  }

  // The definition in double.
  void expect(std::vector<double>& want_y, std::vector<double>& want_state) const {
    want_y.resize(y.size());
    want_state.assign(first.begin(), first.end());
    const auto at = [](const std::vector<T>& v, int64_t i) { return double{scalar::get(&v[i])}; };
    for (int64_t t = 0; t < length; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t g = t * groups + h / (heads / groups);
        const double step =
            std::min(1.0, std::log1p(std::exp(at(dt, t * heads + h) + double{bias[h]})));
        const double decay = std::exp(step * A[h]);
        for (int64_t p = 0; p < P; ++p) {
          const int64_t i = (t * heads + h) * P + p;
          double out = D[h] * at(x, i);
          for (int64_t n = 0; n < N; ++n) {
            double& s = want_state[(h * P + p) * N + n];
            s = decay * s + step * at(x, i) * at(B, g * N + n);
            out += s * at(C, g * N + n);
          }
          const double gate = at(z, i);
          want_y[i] = out * gate / (1 + std::exp(-gate));
        }
      }
  }
};

template <class T>
void expect_matches_float64(DType type, double bound) {
  for (int64_t length : {1, 7, 8, 48, 61, 100})
    for (auto [heads, P, groups, N] : {std::array<int64_t, 4>{2, 5, 1, 3}, {4, 33, 2, 26}}) {
      Layer<T> scan(length, heads, P, groups, N), steps = scan;
      std::vector<double> want_y, want_state;
      scan.expect(want_y, want_state);
      scan.scan(type, length);
      EXPECT_LE(testing::relative_error(scan.y, want_y), bound) << length << " tokens, P " << P;
      EXPECT_LE(testing::relative_error(scan.last, want_state), 1e-6) << length << " tokens";
      for (int64_t t = 0; t < length; ++t) steps.update(type, t);
      EXPECT_LE(testing::relative_error(steps.y, want_y), bound) << length << " steps, P " << P;
      EXPECT_LE(testing::relative_error(steps.first, want_state), 1e-6) << length << " steps";
    }
}

TEST_P(SsdTest, MatchesFloat64) {
  expect_matches_float64<float>(DType::f32, 1e-6);
  expect_matches_float64<bf16>(DType::bf16, 4e-3);
  expect_matches_float64<f16>(DType::f16, 5e-4);
}

TEST_P(SsdTest, SnapshotsAreRunsThatEndedThere) {
  constexpr int64_t kKeep = 14;
  for (int64_t length : {5, 48, 53, 60}) {
    Layer<float> layer(length, 2, 20, 1, 18);
    layer.scan(DType::f32, length, kKeep);
    const auto snapshots = layer.snapshots;
    const auto size = layer.first.size();
    for (int64_t k = 0; k < kKeep; ++k) {
      layer.scan(DType::f32, std::max<int64_t>(length - k, 0));
      EXPECT_TRUE(std::equal(layer.last.begin(), layer.last.end(),
                             snapshots.begin() + static_cast<int64_t>(size) * k))
          << length << " tokens, snapshot " << k;
    }
  }
}

}  // namespace
}  // namespace effinfer
