#include "ops/rms_norm/rms_norm.h"

#include "norms.h"

namespace effinfer::bench {
namespace {

const Registration kRmsNorm("rms_norm", [] { return norm_cases(rms_norm, 4); });

}  // namespace
}  // namespace effinfer::bench
