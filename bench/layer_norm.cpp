#include "ops/layer_norm/layer_norm.h"

#include "norms.h"

namespace effinfer::bench {
namespace {

const Registration kLayerNorm("layer_norm", [] { return norm_cases(layer_norm, 7); });

}  // namespace
}  // namespace effinfer::bench
