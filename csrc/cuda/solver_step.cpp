// A step of a solver on CUDA: fusewire::cuda_solver_step, which kernels/sampler_step/solver_cuda.py calls.
#include "cuda/solver_step.h"

#include "cuda/tensor.h"

namespace fusewire::cuda {

using Optional = std::optional<Tensor>;

// All tensors but the table are contiguous.
static void cuda_solver_step(const Tensor& sample, const Tensor& cond, const Optional& uncond, const Optional& previous, const Optional& base,
                             const Optional& noise, const Optional& mask, const Optional& known, const Optional& known_noise, const Tensor& table,
                             int64_t step, const Optional& counter, const Tensor& out, const Tensor& x0, const Optional& slope, bool wide_out,
                             bool reciprocal, bool exact) {
  if (sample.numel() == 0) return;
  STD_TORCH_CHECK(table.size(1) == kColumns, "cuda_solver_step: table has ", table.size(1), " columns");
  SolverStep k{};
  k.vector = true;
  const auto place = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == sample.numel(), "cuda_solver_step: an operand is not contiguous, or of another size");
    k.vector = k.vector && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
    return const_cast<void*>(tensor.const_data_ptr());
  };
  const auto place_if = [&](const Optional& tensor) { return tensor ? place(*tensor) : nullptr; };
  const auto is_wide = [&](const Tensor& tensor) { return tensor.scalar_type() != sample.scalar_type(); };
  k.sample = place(sample), k.cond = place(cond), k.uncond = place_if(uncond), k.previous = place_if(previous), k.base = place_if(base);
  k.noise = place_if(noise), k.mask = place_if(mask), k.known = place_if(known), k.known_noise = place_if(known_noise);
  k.out = place(out), k.x0 = place(x0), k.slope = place_if(slope);
  k.previous_wide = previous && is_wide(*previous), k.noise_wide = noise && is_wide(*noise);
  k.wide_x0 = is_wide(x0), k.wide_out = wide_out, k.reciprocal = reciprocal, k.exact = exact;
  k.table = static_cast<const double*>(table.const_data_ptr());
  k.table_row = table.stride(0), k.table_column = table.stride(1), k.steps = table.size(0), k.step = step;
  k.counter = counter ? static_cast<const int64_t*>(counter->const_data_ptr()) : nullptr;
  k.count = sample.numel();
  const OnDevice device(sample);
  check_launch("cuda_solver_step", launch_solver_step(k, type_of(sample), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_solver_step", TORCH_BOX(&fusewire::cuda::cuda_solver_step)); }
