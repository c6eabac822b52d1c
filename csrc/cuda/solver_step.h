// solver_step on CUDA: what solver_step.cpp (tensors) hands to solver_step_kernels.cu (device code).
#pragma once
#include "cuda/views.h"

namespace fusewire::cuda {

// The places of a table's columns; kernels/sampler_step/solver_reference.py says what they are.
enum class Column : int {
  guidance, x0_x, x_divisor, x0_m, x0_divisor, x0_limit, e_x, e_m, e_x0, e_divisor, e_previous, e_scale, x, x0, e, scale, noise, known, known_noise
};
constexpr int kColumns = static_cast<int>(Column::known_noise) + 1;

// Operands of `count` elements, contiguous, of the sample's dtype unless their flag says float32. nullptr: not given.
struct SolverStep {
  const void *sample, *cond, *uncond, *previous, *base, *noise, *mask, *known, *known_noise;
  void *out, *x0, *slope;
  bool previous_wide, noise_wide, wide_x0, wide_out, reciprocal;
  bool vector;          // every operand starts where 16 bytes may
  const double* table;  // [steps, kColumns]
  int64_t table_row, table_column, steps, step;
  const int64_t* counter;  // where the step is read on the device, or nullptr
  int64_t count;
  bool exact;  // rounds as a chain of calls does
};

// nullptr, or what went wrong.
const char* launch_solver_step(const SolverStep& task, Type type, void* stream);

}  // namespace fusewire::cuda
