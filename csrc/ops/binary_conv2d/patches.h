// Patches of pixels' bits, and what padding takes back. Plain C++, for binary_conv2d.cpp alone.
#pragma once
#include "ops/binary_conv2d/binary_conv2d.h"

namespace effinfer {

inline int64_t patch_bytes(const BinaryConv2d& a) {
  return a.kernel[0] * a.kernel[1] * binary_layout::bytes_of(a.channels);
}

// The patches of output pixels [row, row + rows) of the images whose bits these are, one after the
// other, zeros (+1) where a tap lies outside; and how many products each one's dot product has.
void take_patches(const BinaryConv2d& a, const uint8_t* bits, int64_t row, int64_t rows,
                  uint8_t* patches, int32_t* terms);

// Whether taps may lie outside and then contribute nothing.
inline bool zero_padded(const BinaryConv2d& a) {
  return !a.pad_ones && a.padding[0] + a.padding[1] > 0;
}

// The popcounts of each tap's weights, [taps, 32 panels].
int64_t tap_counts_size(const BinaryConv2d& a);
void count_taps(const BinaryConv2d& a, const BinaryKernels& kernels, int32_t* tap_counts);

// Subtracts from the counts of these rows and panels those of taps that lie outside.
void take_back_padding(const BinaryConv2d& a, const int32_t* tap_counts, int64_t row, int64_t rows,
                       int64_t panel, int64_t panels, const int32_t* terms, int32_t* counts);

}  // namespace effinfer
