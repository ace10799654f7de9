#include "ops/binary_conv2d/binary_conv2d.h"

#include <algorithm>

#include "base/parallel.h"
#include "bench.h"

namespace effinfer::bench::binary_conv {
namespace {

using namespace binary_layout;

// Channels in and out, an image's height and width, and the kernel's: a ResNet-18's layers.
Case conv_case(int64_t channels, int64_t size, int64_t kernel, int64_t batch) {
  const int64_t pixels = size * size, taps = kernel * kernel, n = channels;
  const int64_t panel = taps * bytes_of(channels) * kOutputs, matrix = panels_of(n) * panel;
  const auto x = values(batch * pixels * channels), y = values(batch * pixels * n);
  const auto scale = values(n), weight = values(matrix / 4);
  auto scratch = std::make_shared<std::vector<char>>();
  return {
      .shape = "B" + std::to_string(batch) + " C" + std::to_string(channels) + " " +
               std::to_string(size) + "x" + std::to_string(size) + " k" + std::to_string(kernel),
      .dtype = DType::f32,
      .flops = 2.0 * static_cast<double>(batch * pixels * n) * static_cast<double>(taps * channels),
      .bytes = static_cast<double>(matrix + 2 * batch * pixels * n * size_of(DType::f32)),
      .run =
          [=] {
            BinaryConv2d args = {};
            args.x = x.get();
            args.weight = static_cast<const uint8_t*>(weight.get());
            args.weight_scale = floats(scale);
            args.y = y.get();
            args.batch = batch;
            args.height = args.width = args.out_height = args.out_width = size;
            args.channels = channels;
            args.n = n;
            for (int i = 0; i < 2; ++i) {
              args.kernel[i] = kernel;
              args.stride[i] = args.dilation[i] = 1;
              args.padding[i] = kernel / 2;
            }
            args.panel_stride = panel;
            args.slots = num_threads();
            scratch->resize(std::max(scratch->size(), binary_conv2d_scratch(args) + 64));
            const auto at = reinterpret_cast<uintptr_t>(scratch->data());
            args.scratch = reinterpret_cast<void*>((at + 63) / 64 * 64);
            binary_conv2d(args);
          },
  };
}

std::vector<Case> binary_conv2d_cases() {
  constexpr int64_t kLayers[][2] = {{64, 56}, {128, 28}, {256, 14}, {512, 7}};
  std::vector<Case> cases;
  for (const auto& [channels, size] : kLayers)
    for (const int64_t kernel : {3, 1})
      for (const int64_t batch : {1, 8}) cases.push_back(conv_case(channels, size, kernel, batch));
  return cases;
}

const Registration kBinaryConv2d("binary_conv2d", binary_conv2d_cases);

}  // namespace
}  // namespace effinfer::bench::binary_conv
