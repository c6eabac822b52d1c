// A step of a solver on the CPU: fusewire::solver_step.
#include "cpu/solver_step.h"

#include "common/empty.h"

namespace fusewire {

static Tensor empty_float(int64_t dims, const int64_t* sizes) {
  int64_t strides[64], total = 1;  // PyTorch's own limit
  for (int64_t i = dims; i-- > 0;) {
    strides[i] = total;
    total *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// What x0 and e are stored in: the dtype of x, or (`wide`, for 16 bits) float32.
static Tensor empty_x0(const Tensor& x, bool wide) {
  if (!wide) return empty_contiguous(x);
  int64_t sizes[64];
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return empty_float(x.dim(), sizes);
}

static std::tuple<Tensor, Tensor, Tensor> solver_step(
    const Tensor& sample, const Tensor& model_output, const std::optional<Tensor>& uncond, const std::optional<Tensor>& previous,
    const std::optional<Tensor>& base, const std::optional<Tensor>& noise, const std::optional<Tensor>& mask, const std::optional<Tensor>& known,
    const std::optional<Tensor>& known_noise, const Tensor& table, int64_t step, const std::optional<Tensor>& counter, bool wide_x0, bool wide_out,
    bool keep_slope, bool reciprocal, bool exact) {
  if (counter) step = *static_cast<const int64_t*>(counter->const_data_ptr());
  STD_TORCH_CHECK(step >= 0 && step < table.size(0), "step is ", step, "; it should be from 0 to ", table.size(0) - 1);
  STD_TORCH_CHECK(table.size(1) == SolverRow::kColumns, "table has ", table.size(1), " columns; it should have ", SolverRow::kColumns);
  double columns[SolverRow::kColumns];
  const double* from = static_cast<const double*>(table.const_data_ptr()) + step * table.stride(0);
  for (int i = 0; i < SolverRow::kColumns; ++i) columns[i] = from[i * table.stride(1)];
  SolverRow row;
  std::memcpy(&row, columns, sizeof(row));

  // Latents are small and nearly always contiguous; what is not is copied
  std::optional<Tensor> held[9];
  int count = 0;
  const auto flat = [&](const Tensor& x) {
    held[count] = x.is_contiguous() ? x : torch::stable::contiguous(x);
    return held[count++]->const_data_ptr();
  };
  const auto flat_if = [&](const std::optional<Tensor>& x) -> const void* { return x ? flat(*x) : nullptr; };
  const ScalarType dtype = model_output.scalar_type();
  const auto is_wide = [&](const std::optional<Tensor>& x) { return x && x->scalar_type() != dtype; };
  const bool two_bytes = element_size(model_output) == 2, wide = wide_x0 && two_bytes;
  const int64_t total = sample.numel();

  SolverStep s{};
  s.sample = flat(sample);
  s.cond = flat(model_output);
  s.uncond = flat_if(uncond);
  if (!uncond && model_output.size(0) != sample.size(0)) {  // [uncond; cond]
    s.uncond = s.cond;
    s.cond = static_cast<const char*>(s.uncond) + total * element_size(model_output);
  }
  s.previous = flat_if(previous);
  s.base = flat_if(base);
  s.noise = flat_if(noise);
  s.mask = flat_if(mask);
  s.known = flat_if(known);
  s.known_noise = flat_if(known_noise);
  s.previous_wide = is_wide(previous);
  s.noise_wide = is_wide(noise);
  s.wide_x0 = wide;
  s.wide_out = wide_out;
  s.reciprocal = reciprocal;
  s.exact = exact;
  const int64_t nothing = 0;
  const Tensor out = empty_contiguous(sample), x0 = empty_x0(sample, wide);
  const Tensor slope = keep_slope ? empty_x0(sample, wide) : wide ? empty_float(1, &nothing) : empty_vector(0, sample);
  s.out = out.mutable_data_ptr();
  s.x0 = x0.mutable_data_ptr();
  if (keep_slope) s.slope = slope.mutable_data_ptr();
  FUSEWIRE_SWITCH_FLOATS(dtype, "solver_step", {
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const SolverStep&, const SolverRow&, int64_t, int64_t, scalar_t), solver_step);
    torch::stable::parallel_for(0, total, 32768, [&](int64_t begin, int64_t end) { run(s, row, begin, end, scalar_t{}); });
  });
  return {out, x0, slope};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("solver_step", TORCH_BOX(&fusewire::solver_step)); }
