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

}  // namespace effinfer
