#include "vec/generic.h"

const effinfer::vec_check::Vectors& effinfer::vec_check::avx512() { return kVectors; }
