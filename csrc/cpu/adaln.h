// adaLN modulation on the CPU: what adaln.cpp (tensors) hands to adaln_kernels.cpp (loops).
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace fusewire {

// One row of channels. Strides are in elements; shift and scale may be strided chunks of one projection.
struct AdalnRow {
  const void* x;
  int64_t x_stride;
  const void* shift;
  int64_t shift_stride;
  const void* scale;
  int64_t scale_stride;
  const void* weight;  // may be null
  const void* bias;    // may be null
  void* out;           // contiguous
  int64_t channels;
  double eps;
  bool rms, exact;
};

FUSEWIRE_DECLARE(void, adaln_row, (const AdalnRow&, float))
FUSEWIRE_DECLARE(void, adaln_row, (const AdalnRow&, double))
FUSEWIRE_DECLARE(void, adaln_row, (const AdalnRow&, bfloat16))
FUSEWIRE_DECLARE(void, adaln_row, (const AdalnRow&, float16))

}  // namespace fusewire
