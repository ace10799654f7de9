#include "vec/generic.h"

const effinfer::vec_check::Vectors& effinfer::vec_check::avx2() { return kVectors; }
