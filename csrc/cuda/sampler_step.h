// Sampler steps on CUDA: what sampler_step.cpp (tensors) hands to sampler_step_kernels.cu (device code).
#pragma once
#include "cuda/views.h"

namespace fusewire::cuda {

constexpr int kMaxDims = 8;

// An operand over `dims` dimensions of the latents, the last of which is a run of `count` elements.
struct Run {
  void* data = nullptr;
  int64_t strides[kMaxDims] = {};
  bool vector = false;  // whole chunks can be moved in accesses of 16 bytes
};

// out = sample + dt * (uncond + guidance * (cond - uncond)), or sample + dt * cond where uncond is absent. cond, uncond and out have one dtype.
struct FlowEuler {
  Run sample, cond, uncond, out;
  const double* table;  // [steps, 2]: dt, guidance
  int64_t table_row, table_column, steps, step;
  const int64_t* counter;  // where the step is read on the device, or nullptr
  int64_t count;
  int64_t sizes[kMaxDims];
  int dims;
  unsigned blocks;  // of a run
  bool exact;       // rounds as the stock code does
};

// nullptr, or what went wrong. `outer`: how many runs there are.
const char* launch_flow_euler(FlowEuler task, int64_t outer, Type sample, Type output, void* stream);

}  // namespace fusewire::cuda
