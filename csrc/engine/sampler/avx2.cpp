#include "engine/sampler/generic.h"

const effinfer::engine::RowKernels& effinfer::engine::row_kernels_avx2() { return kRowKernels; }
