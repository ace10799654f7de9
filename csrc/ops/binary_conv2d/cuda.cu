// binary_conv2d on a GPU: pixels' bits, patches of them, then binary_linear's counting.
#include "ops/binary_conv2d/binary_conv2d.h"
#include "ops/binary_linear/cuda_bits.h"

namespace effinfer {
namespace {

constexpr int64_t kPatchBytes = int64_t{64} << 20;  // of the patches held at a time, about

__device__ inline bool inside(int64_t at, int64_t size) { return at >= 0 && at < size; }

// Where the patches of some images lie in the input.
struct Patches {
  const uint8_t* pixels;  // bits of these images' pixels
  int64_t height, width, out_height, out_width, pixel_bytes, channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  // The input pixel under a tap of an output pixel's patch, or -1.
  __device__ int64_t pixel(int64_t row, int64_t tap) const {
    const int64_t place = row % (out_height * out_width);
    const int64_t y = place / out_width * stride[0] - padding[0] + tap / kernel[1] * dilation[0];
    const int64_t x = place % out_width * stride[1] - padding[1] + tap % kernel[1] * dilation[1];
    if (!inside(y, height) || !inside(x, width)) return -1;
    return (row / (out_height * out_width) * height + y) * width + x;
  }

  __device__ unsigned operator()(int64_t row, int64_t i) const {
    if (i >= kernel[0] * kernel[1] * pixel_bytes) return 0;
    const int64_t from = pixel(row, i / pixel_bytes);
    return from < 0 ? 0 : pixels[from * pixel_bytes + i % pixel_bytes];
  }
};

// The popcounts of each tap's weights, [taps, outputs].
__global__ void count_taps(const uint8_t* weight, int64_t panel_stride, int64_t taps,
                           int64_t pixel_bytes, int64_t outputs, int32_t* counts) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= taps * outputs) return;
  const int64_t tap = at / outputs, n = at % outputs;
  const uint8_t* w = weight + n / kOutputs * panel_stride + tap * pixel_bytes * kOutputs;
  int count = 0;
  for (int64_t i = 0; i < pixel_bytes; ++i) count += gpu::popcount(w[i * kOutputs + n % kOutputs]);
  counts[at] = count;
}

__device__ inline int32_t clamped(int32_t v) {
  return v > kFixedLimit ? kFixedLimit : v < -kFixedLimit ? -kFixedLimit : v;
}

struct FixedFinish {
  FixedEpilogue epilogue;
  const int32_t* residual;
  int32_t* y;
  int64_t y_stride;

  __device__ void operator()(int64_t row, int64_t n, int terms, int count) const {
    const int64_t at = row * y_stride + n;
    uint32_t sum = (static_cast<uint32_t>(terms - 2 * count) << epilogue.gain_shift[n]) +
                   static_cast<uint32_t>(epilogue.pre_bias[n]);
    if (residual != nullptr) sum += static_cast<uint32_t>(clamped(residual[at]));
    auto a = static_cast<int32_t>(sum);
    if (a < 0) a >>= epilogue.slope_shift[n];
    y[at] = clamped(a + epilogue.post_bias[n]);
  }
};

// Takes back what padded taps counted, then finishes.
template <class Finish>
struct ConvFinish {
  Finish finish;
  Patches patches;
  const int32_t* tap_counts;  // null where padding counts
  int64_t outputs;            // of tap_counts

  __device__ void operator()(int64_t row, int64_t n, int count) const {
    const int64_t taps = patches.kernel[0] * patches.kernel[1];
    int64_t terms = taps * patches.channels;
    for (int64_t tap = 0; tap_counts != nullptr && tap < taps; ++tap) {
      if (patches.pixel(row, tap) >= 0) continue;
      count -= tap_counts[tap * outputs + n];
      terms -= patches.channels;
    }
    finish(row, n, static_cast<int>(terms), count);
  }
};

// The scratch, in floats: popcounts of taps, bits of all pixels, patches of some images.
struct Scratch {
  int64_t patch_stride, images, outputs;
  int64_t pixels, patches, total;

  explicit Scratch(const BinaryConv2d& a) {
    const int64_t taps = a.kernel[0] * a.kernel[1];
    outputs = panels_of(a.n) * kOutputs;
    patch_stride = padded_bytes(taps * bytes_of(a.channels));
    const int64_t image = patch_stride * a.out_height * a.out_width;
    images = kPatchBytes / (image + 1) + 1;
    if (images > a.batch) images = a.batch;
    pixels = floats_of(taps * outputs * 4);
    patches = pixels + floats_of(a.batch * a.height * a.width * bytes_of(a.channels));
    total = patches + floats_of(images * image);
  }
};

bool empty(const BinaryConv2d& a) { return a.batch * a.out_height * a.out_width * a.n <= 0; }

int take_signs(const BinaryConv2d& a, uint8_t* bits, void* stream) {
  const int64_t pixels = a.batch * a.height * a.width, stride = bytes_of(a.channels);
  if (a.x_is_bits) {
    const CopiedBytes source = {static_cast<const uint8_t*>(a.x), stride, a.channels};
    return launch_bits(source, bits, pixels, stride, stream);
  }
  if (a.x_is_integer) {
    const SignBytes<int32_t, int32_t> source = {static_cast<const int32_t*>(a.x),
                                                static_cast<const int32_t*>(a.threshold),
                                                a.channels, a.channels};
    return launch_bits(source, bits, pixels, stride, stream);
  }
  int status = 0;
  with_type(a.x_type, [&](auto x) {
    using X = decltype(x);
    const SignBytes<X, float> source = {
        static_cast<const X*>(a.x), static_cast<const float*>(a.threshold), a.channels, a.channels};
    status = launch_bits(source, bits, pixels, stride, stream);
  });
  return status;
}

template <class Finish>
int convolve(const BinaryConv2d& a, const BitProblem& problem, const Patches& patches,
             const int32_t* tap_counts, const Finish& finish, void* stream) {
  const ConvFinish<Finish> whole = {finish, patches, tap_counts, panels_of(a.n) * kOutputs};
  return launch_count(problem, whole, stream);
}

// The images from `image` on whose patches the scratch holds.
int run_images(const BinaryConv2d& a, const Scratch& s, int64_t image, int64_t images,
               const int32_t* tap_counts, void* stream) {
  float* const scratch = static_cast<float*>(a.scratch);
  const int64_t pixel_bytes = bytes_of(a.channels), out_pixels = a.out_height * a.out_width;
  Patches patches = {};
  patches.pixels = reinterpret_cast<const uint8_t*>(scratch + s.pixels) +
                   image * a.height * a.width * pixel_bytes;
  patches.height = a.height;
  patches.width = a.width;
  patches.out_height = a.out_height;
  patches.out_width = a.out_width;
  patches.pixel_bytes = pixel_bytes;
  patches.channels = a.channels;
  for (int i = 0; i < 2; ++i) {
    patches.kernel[i] = a.kernel[i];
    patches.stride[i] = a.stride[i];
    patches.padding[i] = a.padding[i];
    patches.dilation[i] = a.dilation[i];
  }
  auto* const bits = reinterpret_cast<uint8_t*>(scratch + s.patches);
  const int64_t rows = images * out_pixels;
  const int status = launch_bits(patches, bits, rows, s.patch_stride, stream);
  if (status != 0) return status;
  const BitProblem problem = {
      bits, a.weight, s.patch_stride, a.panel_stride, a.kernel[0] * a.kernel[1] * pixel_bytes,
      rows, a.n};
  const int64_t first = image * out_pixels * a.n;
  if (a.fixed) {
    const auto* residual = static_cast<const int32_t*>(a.residual);
    const FixedFinish finish = {a.fixed_epilogue, residual != nullptr ? residual + first : nullptr,
                                static_cast<int32_t*>(a.y) + first, a.n};
    return convolve(a, problem, patches, tap_counts, finish, stream);
  }
  const int64_t offset = first * size_of(a.y_type);
  const auto* residual = static_cast<const char*>(a.residual);
  const FloatFinish finish = {a.weight_scale,
                              a.bias,
                              nullptr,
                              residual != nullptr ? residual + offset : nullptr,
                              static_cast<char*>(a.y) + offset,
                              a.n,
                              a.n,
                              a.y_type,
                              a.epilogue};
  return convolve(a, problem, patches, tap_counts, finish, stream);
}

}  // namespace

int64_t binary_conv2d_cuda_scratch(const BinaryConv2d& a) {
  return empty(a) ? 0 : Scratch(a).total;
}

int binary_conv2d_cuda(const BinaryConv2d& a, void* stream) {
  if (empty(a)) return 0;
  const Scratch s(a);
  float* const scratch = static_cast<float*>(a.scratch);
  const int32_t* tap_counts = nullptr;
  int status = take_signs(a, reinterpret_cast<uint8_t*>(scratch + s.pixels), stream);
  if (status == 0 && !a.pad_ones && a.padding[0] + a.padding[1] > 0) {
    auto* const counts = static_cast<int32_t*>(a.scratch);
    const int64_t taps = a.kernel[0] * a.kernel[1];
    const int64_t blocks = ceil_div(taps * s.outputs, kThreads);
    if (blocks > gpu::kMaxGridX) return gpu::kInvalidValue;
    status = gpu::launch(count_taps, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
                         a.weight, a.panel_stride, taps, bytes_of(a.channels), s.outputs, counts);
    tap_counts = counts;
  }
  for (int64_t image = 0; image < a.batch && status == 0; image += s.images) {
    const int64_t left = a.batch - image;
    status = run_images(a, s, image, left < s.images ? left : s.images, tap_counts, stream);
  }
  return status;
}

}  // namespace effinfer
