#include "ops/causal_conv1d/causal_conv1d.h"
#include "ops/causal_conv1d_update/causal_conv1d_update.h"
#include "ops/state_copy/state_copy.h"
#include "shim/compare.h"

namespace effinfer {
namespace {

using testing::expect_same;
using testing::Floats;
using testing::random_floats;

constexpr int64_t kDim = 5, kLength = 33, kWidth = 4, kDilation = 2, kPast = 6;

TEST(ShimConv, CausalConv1dMatchesScalar) {
  constexpr int64_t kSequences = 3, kStates = 2;
  const std::vector<int32_t> starts = {0, 4, 4, kLength};
  const Floats x = random_floats(kDim * kLength, 1), weight = random_floats(kDim * kWidth, 2),
               bias = random_floats(kDim, 3), initial = random_floats(kSequences * kDim * kPast, 4);
  std::vector<uint8_t> mask(kLength, 1);
  mask[1] = mask[20] = 0;
  for (const bool time_major : {false, true}) {
    const auto args = [&](auto& out) {
      CausalConv1d a = {};
      a.x = x.data();
      a.weight = weight.data();
      a.bias = bias.data();
      a.initial_state = initial.data();
      a.cu_seqlens = starts.data();
      a.mask = mask.data();
      a.y = out[0].data();
      a.states = out[1].data();
      a.sequences = kSequences;
      a.dim = kDim;
      a.length = kLength;
      a.width = kWidth;
      a.dilation = kDilation;
      a.num_states = kStates;
      a.x_dim = a.y_dim = time_major ? 1 : kLength;
      a.x_time = a.y_time = time_major ? kDim : 1;
      a.initial_sequence = kDim * kPast;
      a.initial_dim = kPast;
      a.initial_column = 1;
      a.mask_time = 1;
      a.silu = true;
      return a;
    };
    expect_same(
        {Floats(kDim * kLength), Floats(kSequences * kStates * kDim * kPast)},
        [&](auto& out) {
          for (int64_t s = 0; s < kSequences; ++s)
            causal_conv1d_scalar(args(out), {s, 0, kDim, 0, starts[s + 1] - starts[s]});
        },
        [&](auto& out) { return causal_conv1d_cuda(args(out), nullptr); });
  }
}

TEST(ShimConv, CausalConv1dUpdateMatchesScalar) {
  constexpr int64_t kBatch = 3, kSlots = 4, kSteps = 9, kColumns = kPast + 1;
  const std::vector<int32_t> slots = {1, -1, 3};
  const Floats x = random_floats(kBatch * kDim * kSteps, 1),
               weight = random_floats(kDim * kWidth, 2);
  const auto args = [&](auto& out) {
    CausalConv1dUpdate a = {};
    a.x = x.data();
    a.state = out[0].data();
    a.weight = weight.data();
    a.slots = slots.data();
    a.y = out[1].data();
    a.batch = kBatch;
    a.dim = kDim;
    a.length = kSteps;
    a.width = kWidth;
    a.dilation = kDilation;
    a.columns = kColumns;
    a.pool = kSlots;
    a.x_batch = a.y_batch = kDim * kSteps;
    a.x_dim = a.y_dim = kSteps;
    a.x_time = a.y_time = 1;
    a.state_slot = kDim * kColumns;
    a.state_dim = kColumns;
    a.state_column = 1;
    return a;
  };
  expect_same(
      {random_floats(kSlots * kDim * kColumns, 3), Floats(kBatch * kDim * kSteps)},
      [&](auto& out) { causal_conv1d_update_scalar(args(out), 0, kDim); },
      [&](auto& out) { return causal_conv1d_update_cuda(args(out), nullptr); });
}

// Dense states, and ones whose rows are strided, in units from 16 bytes down to one.
TEST(ShimConv, StateCopyMatchesScalar) {
  constexpr int64_t kSlots = 4, kRows = 3;
  const std::vector<int32_t> to = {2, -1, 0}, from = {1, 0, 3};
  for (const int64_t run : {16, 12, 6, 5}) {
    const Floats source = random_floats(kSlots * kRows * 16, 1);
    const auto args = [&](auto& out) {
      StateCopy a = {};
      a.dst = out[0].data();
      a.src = source.data();
      a.dst_slots = to.data();
      a.src_slots = from.data();
      a.count = 3;
      a.dst_pool = a.src_pool = kSlots;
      a.dst_slot = a.src_slot = kRows * 2 * run;
      a.run = run;
      std::fill_n(a.size, kStateDims, 1);
      a.size[kStateDims - 1] = kRows;
      a.dst_stride[kStateDims - 1] = a.src_stride[kStateDims - 1] = 2 * run;
      return a;
    };
    expect_same(
        {Floats(kSlots * kRows * 16)}, [&](auto& out) { state_copy_scalar(args(out), 0, 3); },
        [&](auto& out) { return state_copy_cuda(args(out), nullptr); }, 0);
  }
}

}  // namespace
}  // namespace effinfer
