#include "ops/binary_conv2d/patches.h"

#include <algorithm>
#include <cstring>

namespace effinfer {
namespace {

using namespace binary_layout;

// The first input pixel of an output pixel's patch; outside where it is padding.
struct Corner {
  int64_t image, y, x;

  Corner(const BinaryConv2d& a, int64_t row) {
    const int64_t pixel = row % (a.out_height * a.out_width);
    image = row / (a.out_height * a.out_width);
    y = pixel / a.out_width * a.stride[0] - a.padding[0];
    x = pixel % a.out_width * a.stride[1] - a.padding[1];
  }
};

bool inside(int64_t at, int64_t size) { return at >= 0 && at < size; }

// Copies the bits of one patch; returns how many of its taps are inside.
int64_t take_patch(const BinaryConv2d& a, const uint8_t* bits, const Corner& corner,
                   uint8_t* patch) {
  const int64_t pixel = bytes_of(a.channels), line = a.kernel[1] * pixel;
  const int64_t right = corner.x + (a.kernel[1] - 1) * a.dilation[1];
  const bool whole = corner.x >= 0 && right < a.width;
  int64_t taps = 0;
  for (int64_t ky = 0; ky < a.kernel[0]; ++ky, patch += line) {
    const int64_t y = corner.y + ky * a.dilation[0];
    if (!inside(y, a.height)) {
      std::memset(patch, 0, line);
      continue;
    }
    const uint8_t* from = bits + ((corner.image * a.height + y) * a.width + corner.x) * pixel;
    if (whole && a.dilation[1] == 1) {
      std::memcpy(patch, from, line);
      taps += a.kernel[1];
      continue;
    }
    for (int64_t kx = 0; kx < a.kernel[1]; ++kx) {
      if (inside(corner.x + kx * a.dilation[1], a.width)) {
        std::memcpy(patch + kx * pixel, from + kx * a.dilation[1] * pixel, pixel);
        ++taps;
      } else {
        std::memset(patch + kx * pixel, 0, pixel);
      }
    }
  }
  return taps;
}

}  // namespace

void take_patches(const BinaryConv2d& a, const uint8_t* bits, int64_t row, int64_t rows,
                  uint8_t* patches, int32_t* terms) {
  const int64_t bytes = patch_bytes(a), all = a.kernel[0] * a.kernel[1];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t taps = take_patch(a, bits, Corner(a, row + r), patches + r * bytes);
    terms[r] = static_cast<int32_t>((zero_padded(a) ? taps : all) * a.channels);
  }
}

int64_t tap_counts_size(const BinaryConv2d& a) {
  return a.kernel[0] * a.kernel[1] * panels_of(a.n) * kOutputs;
}

void count_taps(const BinaryConv2d& a, const BinaryKernels& kernels, int32_t* tap_counts) {
  constexpr int64_t kPiece = 256;  // bytes of a tap at a time
  constexpr uint8_t kZeros[kPiece] = {};
  const int64_t all = panels_of(a.n), bytes = bytes_of(a.channels);
  std::memset(tap_counts, 0, tap_counts_size(a) * sizeof(int32_t));
  int32_t counts[counts_of(1)];
  for (int64_t tap = 0; tap < a.kernel[0] * a.kernel[1]; ++tap, tap_counts += all * kOutputs) {
    for (int64_t panel = 0; panel < all; panel += kGroup) {
      const int64_t panels = std::min(kGroup, all - panel);
      for (int64_t begin = 0; begin < bytes; begin += kPiece) {
        kernels.count(
            {.x = kZeros,
             .weight = a.weight + panel * a.panel_stride + (tap * bytes + begin) * kOutputs,
             .counts = counts,
             .rows = 1,
             .panels = panels,
             .bytes = std::min(kPiece, bytes - begin),
             .x_stride = 0,
             .panel_stride = a.panel_stride});
        for (int64_t i = 0; i < panels * kOutputs; ++i)
          tap_counts[panel * kOutputs + i] += counts[i];
      }
    }
  }
}

void take_back_padding(const BinaryConv2d& a, const int32_t* tap_counts, int64_t row, int64_t rows,
                       int64_t panel, int64_t panels, const int32_t* terms, int32_t* counts) {
  const int64_t taps = a.kernel[0] * a.kernel[1], outputs = panels_of(a.n) * kOutputs;
  for (int64_t r = 0; r < rows; ++r) {
    if (terms[r] == taps * a.channels) continue;
    const Corner corner(a, row + r);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = corner.y + tap / a.kernel[1] * a.dilation[0];
      const int64_t x = corner.x + tap % a.kernel[1] * a.dilation[1];
      if (inside(y, a.height) && inside(x, a.width)) continue;
      const int32_t* const padded = tap_counts + tap * outputs + panel * kOutputs;
      for (int64_t part = 0; part < 2 * panels; ++part)
        for (int64_t j = 0; j < kPart; ++j)
          counts[(part * rows + r) * kPart + j] -= padded[part * kPart + j];
    }
  }
}

}  // namespace effinfer
