// solver_step on the CPU: what solver_step.cpp (tensors) hands to solver_step_kernels.cpp (loops).
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace fusewire {

// A row of the table; kernels/sampler_step/solver_reference.py says what its columns are.
struct SolverRow {
  static constexpr int kColumns = 19;
  double guidance, x0_x, x_divisor, x0_m, x0_divisor, x0_limit, e_x, e_m, e_x0, e_divisor, e_previous, e_scale, x, x0, e, scale, noise, known, known_noise;
};
static_assert(sizeof(SolverRow) == SolverRow::kColumns * sizeof(double));

// Operands of the step, contiguous, of storage type T unless their flag says that they are of the type computed in. Null: not given.
struct SolverStep {
  const void *sample, *cond, *uncond, *previous, *base, *noise, *mask, *known, *known_noise;
  void *out, *x0, *slope;
  bool previous_wide, noise_wide, wide_x0, wide_out, reciprocal, exact;
};

// Elements [begin, end).
FUSEWIRE_DECLARE(void, solver_step, (const SolverStep&, const SolverRow&, int64_t, int64_t, float))
FUSEWIRE_DECLARE(void, solver_step, (const SolverStep&, const SolverRow&, int64_t, int64_t, double))
FUSEWIRE_DECLARE(void, solver_step, (const SolverStep&, const SolverRow&, int64_t, int64_t, bfloat16))
FUSEWIRE_DECLARE(void, solver_step, (const SolverStep&, const SolverRow&, int64_t, int64_t, float16))

}  // namespace fusewire
