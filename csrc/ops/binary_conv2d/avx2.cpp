#include "ops/binary_conv2d/generic.h"

void effinfer::binary_conv2d_avx2(const FixedTask& t) { finish_fixed(t); }
