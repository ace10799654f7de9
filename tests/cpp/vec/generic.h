// The table of vec_check.h over vec.h; compiled once per instruction set.
#include "base/vec.h"
#include "vec/vec_check.h"

namespace effinfer {
namespace {

template <Vec (*F)(Vec)>
void map(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, F(load(x + i)));
}

template <class T>
void widen(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, load(reinterpret_cast<const T*>(x + i)));
}

template <class T>
void narrow(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(reinterpret_cast<T*>(y + i), load(x + i));
}

void copy_part(const float* x, float* y, int64_t n) { store_n(y, load_n(x, n), n); }
void copy_strided(const float* x, float* y, int64_t stride, int64_t n) {
  store_strided(y, stride, load_strided(x, stride, n), n);
}
float sum_of(const float* x) { return sum(load(x)); }

constexpr vec_check::Vectors kVectors = {
    .lanes = kLanes,
    .exp = map<exp>,
    .exp2 = map<exp2>,
    .log1p_unit = map<log1p_unit>,
    .softplus = map<softplus>,
    .sigmoid = map<sigmoid>,
    .silu = map<silu>,
    .load_bf16 = widen<bf16>,
    .load_f16 = widen<f16>,
    .store_bf16 = narrow<bf16>,
    .store_f16 = narrow<f16>,
    .copy_part = copy_part,
    .copy_strided = copy_strided,
    .sum = sum_of,
};

}  // namespace
}  // namespace effinfer
