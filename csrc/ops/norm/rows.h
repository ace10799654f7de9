// What the norms share over vec.h: a row with its residual, sums in a fixed order, and loops whose
// last vector is a part. Included by generic.h files only.
#pragma once
#include "base/vec.h"
#include "ops/norm/types.h"

namespace effinfer {
namespace {

// How a loop body touches memory: whole vectors, or the n elements that are left.
struct Whole {
  template <class T>
  EFFINFER_INLINE Vec get(const T* p) const {
    return load(p);
  }
  template <class T>
  EFFINFER_INLINE void put(T* p, Vec x) const {
    store(p, x);
  }
};
struct Part {
  int64_t n;
  template <class T>
  EFFINFER_INLINE Vec get(const T* p) const {
    return load_n(p, n);
  }
  template <class T>
  EFFINFER_INLINE void put(T* p, Vec x) const {
    store_n(p, x, n);
  }
};

// body(access, i) for each vector of a row.
template <class Body>
EFFINFER_INLINE void each_vector(int64_t dim, Body body) {
  const int64_t full = dim / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) body(Whole{}, i);
  if (full < dim) body(Part{dim - full}, full);
}

// The sum over a row of term(row(access, i)), in kLanes * 4 interleaved partial sums;
// add(value, sum) returns sum + term(value).
template <class Row, class Add>
EFFINFER_INLINE float sum_row(int64_t dim, Row row, Add add) {
  Vec s0{}, s1{}, s2{}, s3{};
  const Whole whole;
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    s0 = add(row(whole, i), s0);
    s1 = add(row(whole, i + kLanes), s1);
    s2 = add(row(whole, i + 2 * kLanes), s2);
    s3 = add(row(whole, i + 3 * kLanes), s3);
  }
  for (; i + kLanes <= dim; i += kLanes) s0 = add(row(whole, i), s0);
  if (i < dim) {
    float kept[kLanes];
    const Vec last = add(row(Part{dim - i}, i), Vec{});
    store(kept, last);
    s1 += load_n(kept, dim - i);  // lanes past the row may hold a term of their own
  }
  return sum((s0 + s1) + (s2 + s3));
}

// x, plus the residual where there is one.
template <class X, class R>
struct Residual {
  const X* x;
  const R* residual;
  template <class Access>
  EFFINFER_INLINE Vec operator()(Access access, int64_t i) const {
    return residual != nullptr ? access.get(x + i) + access.get(residual + i) : access.get(x + i);
  }
};

}  // namespace
}  // namespace effinfer
