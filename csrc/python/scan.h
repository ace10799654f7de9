// Signals of the scan ops as their bindings take them.
#pragma once
#include "ops/selective_scan/selective_scan.h"
#include "python/checks.h"

namespace effinfer {

// A signal (B,D,L) of the same shape as `like`.
inline ScanSignal want_signal(const char* op, const char* arg, py::handle object,
                              const Tensor& like) {
  const Tensor t = want(op, arg, object, kFloats, {like.shape[0], like.shape[1], like.shape[2]});
  return {t.data, t.stride[0], t.stride[1], t.stride[2], t.dtype()};
}

// B or C: (D,N), (B,N,L) or (B,G,N,L), for signals of the shape of `like`.
inline ScanMatrix want_matrix(const char* op, const char* arg, py::handle object,
                              const Tensor& like, int64_t state) {
  const Tensor t = want(op, arg, object, kFloats);
  const int64_t batch = like.shape[0], dim = like.shape[1], length = like.shape[2];
  const auto fits = [&](std::initializer_list<int64_t> shape) {
    return std::equal(shape.begin(), shape.end(), t.shape);
  };
  if (t.ndim == 2 && fits({dim, state}))
    return {t.data, 0, t.stride[0], t.stride[1], 0, dim, t.dtype(), true};
  if (t.ndim == 3 && fits({batch, state, length}))
    return {t.data, t.stride[0], 0, t.stride[1], t.stride[2], 1, t.dtype(), false};
  const int64_t groups = t.ndim == 4 ? t.shape[1] : 0;
  if (groups > 0 && dim % groups == 0 && fits({batch, groups, state, length}))
    return {t.data, t.stride[0], t.stride[1], t.stride[2], t.stride[3], groups, t.dtype(), false};
  const auto text = [](int64_t n) { return std::to_string(n); };
  const std::string tail = text(state) + ", " + text(length) + ")";
  reject(op, arg,
         "have shape (" + text(dim) + ", " + text(state) + "), (" + text(batch) + ", " + tail +
             " or (" + text(batch) + ", G, " + tail + " with G dividing " + text(dim),
         shape_text(t));
}

}  // namespace effinfer
