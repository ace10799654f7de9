#include "ops/hidden_attention/hidden_attention.h"
#include "ops/selective_scan/selective_scan.h"
#include "ops/selective_scan_lmu/selective_scan_lmu.h"
#include "ops/selective_scan_lti/selective_scan_lti.h"
#include "ops/selective_state_update/selective_state_update.h"
#include "ops/ssd/ssd.h"
#include "ops/ssd_state_update/ssd_state_update.h"
#include "shim/compare.h"

namespace effinfer {
namespace {

using testing::expect_same;
using testing::Floats;
using testing::random_floats;

// Negative, as decays are.
Floats decays(size_t n, unsigned seed) {
  Floats values = random_floats(n, seed);
  for (float& v : values) v = -std::abs(v);
  return values;
}

class ShimScans : public ::testing::TestWithParam<int> {
 protected:
  const int64_t states = GetParam();
};

TEST_P(ShimScans, SelectiveScanMatchesScalar) {
  constexpr int64_t kBatch = 2, kDim = 19, kLength = 45, kSnapshots = 2;
  const int64_t size = kBatch * kDim * kLength, all = kBatch * kDim * states;
  const Floats u = random_floats(size, 1), delta = random_floats(size, 2),
               z = random_floats(size, 3), A = decays(kDim * states, 4),
               B = random_floats(kBatch * kLength * states, 5),
               C = random_floats(kBatch * kLength * states, 6), initial = random_floats(all, 7);
  std::vector<uint8_t> mask(kBatch * kLength, 1);
  mask[3] = mask[4] = mask[kLength] = 0;
  const auto args = [&](auto& out) {
    const auto signal = [&](const Floats& v) {
      return ScanSignal{const_cast<float*>(v.data()), kDim * kLength, 1, kDim, DType::f32};
    };
    const auto matrix = [&](const Floats& v) {
      return ScanMatrix{v.data(), kLength * states, 0, 1, states, 1, DType::f32, false};
    };
    SelectiveScan a = {};
    a.u = signal(u);
    a.delta = signal(delta);
    a.z = signal(z);
    a.y = signal(out[0]);
    a.A = A.data();
    a.B = matrix(B);
    a.C = matrix(C);
    a.initial_state = initial.data();
    a.mask = mask.data();
    a.mask_batch = kLength;
    a.mask_time = 1;
    a.last_state = out[1].data();
    a.snapshots = out[2].data();
    a.batch = a.sequences = kBatch;
    a.dim = kDim;
    a.length = kLength;
    a.state = states;
    a.num_snapshots = kSnapshots;
    a.softplus = true;
    return a;
  };
  expect_same(
      {Floats(size), Floats(all), Floats(all * kSnapshots)},
      [&](auto& out) {
        for (int64_t b = 0; b < kBatch; ++b)
          selective_scan_scalar(args(out), {b, b, 0, kLength, 0, kDim}, nullptr);
      },
      [&](auto& out) { return selective_scan_cuda(args(out), nullptr); });
}

TEST_P(ShimScans, SelectiveScanLtiMatchesScalar) {
  constexpr int64_t kBatch = 2, kDim = 19, kLength = 45, kSnapshots = 2;
  for (int64_t width : {1, 2}) {  // real, complex
    const int64_t size = kBatch * kDim * kLength, numbers = kDim * states * width;
    const Floats u = random_floats(size, 1), B = random_floats(numbers, 2),
                 C = random_floats(numbers, 3), initial = random_floats(kBatch * numbers, 4);
    Floats A = random_floats(numbers, 5);
    for (float& a : A) a = 0.7f * std::tanh(a);  // inside the unit circle
    std::vector<uint8_t> mask(kBatch * kLength, 1);
    mask[3] = mask[4] = mask[kLength] = 0;
    const auto args = [&](auto& out) {
      SelectiveScanLti a = {};
      a.u = {const_cast<float*>(u.data()), kDim * kLength, 1, kDim, DType::f32};
      a.y = {out[0].data(), kDim * kLength, 1, kDim, DType::f32};
      a.A = A.data();
      a.B = B.data();
      a.C = C.data();
      a.initial_state = initial.data();
      a.mask = mask.data();
      a.mask_batch = kLength;
      a.mask_time = 1;
      a.last_state = out[1].data();
      a.snapshots = out[2].data();
      a.batch = a.sequences = kBatch;
      a.dim = kDim;
      a.length = kLength;
      a.state = states;
      a.num_snapshots = kSnapshots;
      a.complex = width == 2;
      return a;
    };
    expect_same(
        {Floats(size), Floats(kBatch * numbers), Floats(kBatch * numbers * kSnapshots)},
        [&](auto& out) {
          for (int64_t b = 0; b < kBatch; ++b)
            selective_scan_lti_scalar(args(out), {b, b, 0, kLength, 0, kDim}, nullptr);
        },
        [&](auto& out) { return selective_scan_lti_cuda(args(out), nullptr); });
  }
}

TEST_P(ShimScans, SelectiveScanLmuMatchesScalar) {
  constexpr int64_t kBatch = 2, kDim = 3, kLength = 9, kSnapshots = 2;
  SelectiveScanLmu shape = {};
  shape.batch = kBatch;
  shape.dim = kDim;
  shape.length = kLength;
  shape.state = states;
  shape.chunk = 1;
  shape.num_snapshots = kSnapshots;
  const int64_t all = kBatch * kDim * states;
  const Floats u = random_floats(kBatch * kDim * kLength, 1), initial = random_floats(all, 2);
  Floats transition = random_floats(shape.panels() * shape.inner() * kLmuPanel, 3);
  for (float& x : transition) x /= static_cast<float>(states);
  const auto args = [&](auto& out) {
    SelectiveScanLmu a = shape;
    a.u = {const_cast<float*>(u.data()), kDim * kLength, 1, kDim, DType::f32};
    a.transition = transition.data();
    a.initial_state = initial.data();
    a.memories = out[0].data();
    a.last_state = out[1].data();
    a.snapshots = out[2].data();
    return a;
  };
  expect_same(
      {Floats(all * kLength), Floats(all), Floats(all * kSnapshots)},
      [&](auto& out) {
        Floats scratch(2 * shape.inner());
        selective_scan_lmu_scalar(args(out), 0, kBatch * kDim, scratch.data());
      },
      [&](auto& out) { return selective_scan_lmu_cuda(args(out), nullptr); });
}

TEST_P(ShimScans, HiddenAttentionMatchesScalar) {
  constexpr int64_t kBatch = 2, kDim = 2, kLength = 21;
  const Floats delta = random_floats(kBatch * kLength * kDim, 1), A = decays(kDim * states, 2),
               B = random_floats(kBatch * kLength * states, 3),
               C = random_floats(kBatch * kLength * states, 4);
  const auto args = [&](auto& out) {
    HiddenAttention a = {};
    a.delta = {const_cast<float*>(delta.data()), kDim * kLength, 1, kDim, DType::f32};
    a.A = A.data();
    a.B = {B.data(), kLength * states, 0, 1, states, 1, DType::f32, false};
    a.C = {C.data(), kLength * states, 0, 1, states, 1, DType::f32, false};
    a.alpha = out[0].data();
    a.batch = kBatch;
    a.dim = kDim;
    a.length = kLength;
    a.state = states;
    a.softplus = true;
    return a;
  };
  expect_same(
      {Floats(kBatch * kDim * kLength * kLength, NAN)},
      [&](auto& out) {
        Floats h(states);
        for (int64_t row = 0; row < kBatch * kDim; ++row)
          hidden_attention_scalar(args(out), row, h.data());
      },
      [&](auto& out) { return hidden_attention_cuda(args(out), nullptr); });
}

// Segments walked by blocks of their own give the bits of one block that walks them all; also of
// packed sequences, backwards, and with snapshots on both sides of a segment's start.
TEST(ShimSelectiveScan, SegmentsOnTheirOwnChangeNoBits) {
  constexpr int64_t kDim = 3, kStates = 2, kLength = 9000, kSequences = 3, kSnapshots = 4;
  const std::vector<int32_t> starts = {0, 4099, 4104, kLength};
  const Floats u = random_floats(kDim * kLength, 1), delta = random_floats(kDim * kLength, 2),
               A = decays(kDim * kStates, 3), B = random_floats(kLength * kStates, 4),
               C = random_floats(kDim * kStates, 5);
  SelectiveScan a = {};
  const auto signal = [&](const Floats& v) {
    return ScanSignal{const_cast<float*>(v.data()), kDim * kLength, kLength, 1, DType::f32};
  };
  a.u = signal(u);
  a.delta = signal(delta);
  a.A = A.data();
  a.B = {B.data(), kLength * kStates, 0, 1, kStates, 1, DType::f32, false};
  a.C = {C.data(), 0, kStates, 1, 0, kDim, DType::f32, true};
  a.cu_seqlens = starts.data();
  a.batch = 1;
  a.sequences = kSequences;
  a.dim = kDim;
  a.length = kLength;
  a.state = kStates;
  a.num_snapshots = kSnapshots;
  a.softplus = true;
  Floats scratch(selective_scan_cuda_scratch(a));
  ASSERT_FALSE(scratch.empty());
  for (const bool reverse : {false, true}) {
    a.reverse = reverse;
    std::vector<Floats> got[2];
    for (const bool apart : {false, true}) {
      auto& out = got[apart];
      out = {Floats(kDim * kLength), Floats(kSequences * kDim * kStates),
             Floats(kSequences * kSnapshots * kDim * kStates)};
      a.y = signal(out[0]);
      a.last_state = out[1].data();
      a.snapshots = out[2].data();
      a.scratch = apart ? scratch.data() : nullptr;
      std::fill(scratch.begin(), scratch.end(), NAN);
      ASSERT_EQ(selective_scan_cuda(a, nullptr), 0) << gpu::shim::last_error();
    }
    EXPECT_EQ(got[0], got[1]);
    for (int64_t s = 0; s < kSequences; ++s)
      selective_scan_scalar(a, {s, 0, starts[s], starts[s + 1], 0, kDim}, nullptr);
    for (size_t i = 0; i < 3; ++i)
      EXPECT_LE(testing::relative_error(got[0][i], {got[1][i].begin(), got[1][i].end()}), 1e-6);
  }
}

TEST_P(ShimScans, SelectiveStateUpdateMatchesScalar) {
  constexpr int64_t kBatch = 3, kDim = 19, kSlots = 4;
  const std::vector<int32_t> slots = {2, -1, 0};
  const Floats x = random_floats(kBatch * kDim, 1), dt = random_floats(kBatch * kDim, 2),
               z = random_floats(kBatch * kDim, 3), A = decays(kDim * states, 4),
               B = random_floats(kBatch * states, 5), C = random_floats(kBatch * states, 6);
  const auto args = [&](auto& out) {
    const auto signal = [&](const Floats& v) {
      return StepSignal{const_cast<float*>(v.data()), kDim, 1, DType::f32};
    };
    SelectiveStateUpdate a = {};
    a.state = out[0].data();
    a.state_slot = kDim * states;
    a.state_channel = states;
    a.state_n = 1;
    a.x = signal(x);
    a.dt = signal(dt);
    a.z = signal(z);
    a.y = signal(out[1]);
    a.A = A.data();
    a.B = {B.data(), states, 0, 1, DType::f32};
    a.C = {C.data(), states, 0, 1, DType::f32};
    a.state_indices = slots.data();
    a.batch = kBatch;
    a.dim = kDim;
    a.state_size = states;
    a.groups = 1;
    a.slots = kSlots;
    a.softplus = true;
    return a;
  };
  expect_same(
      {random_floats(kSlots * kDim * states, 7), Floats(kBatch * kDim)},
      [&](auto& out) {
        for (int64_t row = 0; row < kBatch; ++row)
          selective_state_update_scalar(args(out), row, 0, kDim);
      },
      [&](auto& out) { return selective_state_update_cuda(args(out), nullptr); });
}

TEST_P(ShimScans, SsdMatchesScalar) {
  constexpr int64_t kBatch = 2, kHeads = 2, kP = 19, kLength = 41, kSnapshots = 2;
  const int64_t size = kBatch * kLength * kHeads * kP, all = kBatch * kHeads * kP * states;
  const Floats x = random_floats(size, 1), dt = random_floats(kBatch * kLength * kHeads, 2),
               A = decays(kHeads, 3), B = random_floats(kBatch * kLength * states, 4),
               C = random_floats(kBatch * kLength * states, 5), z = random_floats(size, 6);
  std::vector<int32_t> ids(kBatch * kLength, 0);
  for (int64_t t = 20; t < kLength; ++t) ids[t] = 7;
  std::vector<uint8_t> mask(kBatch * kLength, 1);
  mask[3] = mask[2 * kLength - 1] = 0;
  const auto args = [&](auto& out) {
    Ssd a = {};
    a.x = x.data();
    a.dt = dt.data();
    a.A = A.data();
    a.B = B.data();
    a.C = C.data();
    a.z = z.data();
    a.seq_idx = ids.data();
    a.mask = mask.data();
    a.y = out[0].data();
    a.last_state = out[1].data();
    a.snapshots = out[2].data();
    a.batch = a.sequences = kBatch;
    a.length = kLength;
    a.heads = kHeads;
    a.head_dim = kP;
    a.groups = 1;
    a.state_dim = states;
    a.snapshot_count = kSnapshots;
    for (auto* strides : {a.x_strides, a.z_strides, a.y_strides}) {
      strides[0] = kLength * kHeads * kP;
      strides[1] = kHeads * kP;
      strides[2] = kP;
      strides[3] = 1;
    }
    for (auto* strides : {a.B_strides, a.C_strides}) {
      strides[0] = kLength * states;
      strides[1] = states;
      strides[3] = 1;
    }
    a.dt_strides[0] = kLength * kHeads;
    a.dt_strides[1] = kHeads;
    a.dt_strides[2] = a.A_stride = 1;
    a.seq_idx_strides[0] = a.mask_strides[0] = kLength;
    a.seq_idx_strides[1] = a.mask_strides[1] = 1;
    a.dt_max = 1e30f;
    a.dt_softplus = true;
    return a;
  };
  expect_same(
      {Floats(size), Floats(all), Floats(all * kSnapshots)},
      [&](auto& out) {
        for (int64_t b = 0; b < kBatch; ++b) ssd_scalar(args(out), b, 0, kHeads, nullptr);
      },
      [&](auto& out) { return ssd_cuda(args(out), nullptr); });
}

TEST_P(ShimScans, SsdStateUpdateMatchesScalar) {
  constexpr int64_t kBatch = 3, kHeads = 2, kP = 5, kSlots = 4;
  const std::vector<int32_t> slots = {3, -1, 1};
  const Floats x = random_floats(kBatch * kHeads * kP, 1), dt = random_floats(kBatch * kHeads, 2),
               A = decays(kHeads, 3), B = random_floats(kBatch * states, 4),
               C = random_floats(kBatch * states, 5);
  const auto args = [&](auto& out) {
    SsdStateUpdate a = {};
    a.state = out[0].data();
    a.x = x.data();
    a.dt = dt.data();
    a.A = A.data();
    a.B = B.data();
    a.C = C.data();
    a.state_indices = slots.data();
    a.y = out[1].data();
    a.batch = kBatch;
    a.heads = kHeads;
    a.head_dim = kP;
    a.groups = 1;
    a.state_dim = states;
    a.slots = kSlots;
    const int64_t state_strides[] = {kHeads * kP * states, kP * states, states, 1};
    std::copy_n(state_strides, 4, a.state_strides);
    for (auto* strides : {a.x_strides, a.y_strides}) {
      strides[0] = kHeads * kP;
      strides[1] = kP;
      strides[2] = 1;
    }
    a.dt_strides[0] = kHeads;
    a.dt_strides[1] = a.A_strides[0] = 1;
    a.B_strides[0] = a.C_strides[0] = states;
    a.B_strides[2] = a.C_strides[2] = 1;
    a.dt_max = 1e30f;
    a.dt_softplus = true;
    return a;
  };
  expect_same(
      {random_floats(kSlots * kHeads * kP * states, 7), Floats(kBatch * kHeads * kP)},
      [&](auto& out) {
        for (int64_t row = 0; row < kBatch; ++row)
          ssd_state_update_scalar(args(out), row, 0, kHeads);
      },
      [&](auto& out) { return ssd_state_update_cuda(args(out), nullptr); });
}

INSTANTIATE_TEST_SUITE_P(States, ShimScans, ::testing::Values(1, 16, 100, 260));

}  // namespace
}  // namespace effinfer
