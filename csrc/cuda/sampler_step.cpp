// Sampler steps on CUDA: fusewire::cuda_flow_euler, which kernels/sampler_step/cuda.py calls.
#include "cuda/sampler_step.h"

#include "cuda/tensor.h"

namespace fusewire::cuda {

// The dimensions of the latents, after neighbours that are one run of memory in every operand were merged.
static int64_t merge(FlowEuler& k, std::initializer_list<std::pair<const Tensor*, Run*>> operands, const Tensor& like) {
  int64_t outer = 1;
  k.dims = 0;
  for (int64_t d = 0; d < like.dim(); ++d) {
    const int64_t size = like.size(d);
    if (size == 1) continue;
    bool runs_on = k.dims > 0;
    for (const auto& [tensor, run] : operands) runs_on = runs_on && run->strides[k.dims - 1] == tensor->stride(d) * size;
    if (!runs_on) k.sizes[k.dims++] = 1;
    k.sizes[k.dims - 1] *= size;
    for (const auto& [tensor, run] : operands) run->strides[k.dims - 1] = tensor->stride(d);
  }
  if (k.dims == 0) {  // one element
    k.dims = 1, k.sizes[0] = 1;
    for (const auto& [tensor, run] : operands) run->strides[0] = 1;
  }
  k.count = k.sizes[k.dims - 1];
  for (int d = 0; d < k.dims - 1; ++d) outer *= k.sizes[d];
  for (const auto& [tensor, run] : operands) {
    run->vector = run->strides[k.dims - 1] == 1 && reinterpret_cast<uintptr_t>(run->data) % 16 == 0;
    for (int d = 0; d < k.dims - 1; ++d) run->vector = run->vector && run->strides[d] * element_size(*tensor) % 16 == 0;
  }
  return outer;
}

static void cuda_flow_euler(const Tensor& sample, const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& table, int64_t step,
                            const std::optional<Tensor>& counter, const Tensor& out, bool exact) {
  if (sample.numel() == 0) return;
  STD_TORCH_CHECK(sample.dim() <= kMaxDims, "cuda_flow_euler: sample has too many dimensions");
  FlowEuler k{};
  k.sample.data = const_cast<void*>(sample.const_data_ptr()), k.cond.data = const_cast<void*>(cond.const_data_ptr());
  k.out.data = out.mutable_data_ptr();
  int64_t outer;
  if (uncond) {
    k.uncond.data = const_cast<void*>(uncond->const_data_ptr());
    outer = merge(k, {{&sample, &k.sample}, {&cond, &k.cond}, {&*uncond, &k.uncond}, {&out, &k.out}}, sample);
  } else {
    outer = merge(k, {{&sample, &k.sample}, {&cond, &k.cond}, {&out, &k.out}}, sample);
  }
  k.table = static_cast<const double*>(table.const_data_ptr());
  k.table_row = table.stride(0), k.table_column = table.stride(1), k.steps = table.size(0), k.step = step;
  k.counter = counter ? static_cast<const int64_t*>(counter->const_data_ptr()) : nullptr;
  k.exact = exact;
  const OnDevice device(sample);
  check_launch("cuda_flow_euler", launch_flow_euler(k, outer, type_of(sample), type_of(out), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_flow_euler", TORCH_BOX(&fusewire::cuda::cuda_flow_euler)); }
