// Sampler steps on the CPU: what sampler_step.cpp (tensors) hands to sampler_step_kernels.cpp (loops).
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace fusewire {

// `count` elements of a flow-matching Euler step with guidance. Strides are in elements; out is contiguous.
struct FlowEuler {
  const void* sample;
  const void* cond;
  const void* uncond;  // null: no guidance
  int64_t sample_stride, cond_stride, uncond_stride;
  void* out;
  int64_t count;
  double dt, guidance;
  bool exact;
};

FUSEWIRE_DECLARE(void, flow_euler, (const FlowEuler&, float))
FUSEWIRE_DECLARE(void, flow_euler, (const FlowEuler&, double))
FUSEWIRE_DECLARE(void, flow_euler, (const FlowEuler&, bfloat16))
FUSEWIRE_DECLARE(void, flow_euler, (const FlowEuler&, float16))

}  // namespace fusewire
