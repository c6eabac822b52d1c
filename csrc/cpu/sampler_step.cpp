// Sampler steps on the CPU: fusewire::flow_euler_step.
#include "cpu/sampler_step.h"

#include <vector>

#include "common/empty.h"

namespace fusewire {

// A dimension of the latents, after neighbours that are one run of memory in every operand were merged.
struct Dim {
  int64_t size, sample, cond, uncond;
};

static std::vector<Dim> merged_dims(const Tensor& sample, const Tensor& cond, const Tensor& uncond) {
  std::vector<Dim> dims;
  for (int64_t i = 0; i < sample.dim(); ++i) {
    const Dim d{sample.size(i), sample.stride(i), cond.stride(i), uncond.stride(i)};
    if (d.size == 1) continue;
    if (!dims.empty() && dims.back().sample == d.size * d.sample && dims.back().cond == d.size * d.cond &&
        dims.back().uncond == d.size * d.uncond) {
      dims.back() = {dims.back().size * d.size, d.sample, d.cond, d.uncond};
    } else {
      dims.push_back(d);
    }
  }
  if (dims.empty()) dims.push_back({1, 1, 1, 1});
  return dims;
}

static Tensor flow_euler_step(const Tensor& sample, const Tensor& model_output, const std::optional<Tensor>& uncond, const Tensor& table,
                              int64_t step, const std::optional<Tensor>& counter, bool exact) {
  if (counter) step = *static_cast<const int64_t*>(counter->const_data_ptr());
  STD_TORCH_CHECK(step >= 0 && step < table.size(0), "step is ", step, "; it should be from 0 to ", table.size(0) - 1);
  const double* row = static_cast<const double*>(table.const_data_ptr()) + step * table.stride(0);
  const bool batched = !uncond && model_output.size(0) != sample.size(0);  // [uncond; cond]
  const int64_t total = sample.numel();
  const Tensor out = empty_contiguous(sample);
  const std::vector<Dim> dims = merged_dims(sample, model_output, uncond ? *uncond : model_output);
  const int64_t inner = dims.back().size;
  FUSEWIRE_SWITCH_FLOATS(sample.scalar_type(), "sampler_step", {
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const FlowEuler&, scalar_t), flow_euler);
    const scalar_t* x = static_cast<const scalar_t*>(sample.const_data_ptr());
    const scalar_t* first = static_cast<const scalar_t*>(model_output.const_data_ptr());
    const scalar_t* cond = batched ? first + sample.size(0) * model_output.stride(0) : first;
    const scalar_t* u = batched ? first : uncond ? static_cast<const scalar_t*>(uncond->const_data_ptr()) : nullptr;
    scalar_t* y = static_cast<scalar_t*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, total, 32768, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t at = i % inner, count = end - i < inner - at ? end - i : inner - at;
        int64_t outer = i / inner, o_sample = at * dims.back().sample, o_cond = at * dims.back().cond, o_uncond = at * dims.back().uncond;
        for (size_t d = dims.size() - 1; d-- > 0; outer /= dims[d].size) {
          const int64_t index = outer % dims[d].size;
          o_sample += index * dims[d].sample;
          o_cond += index * dims[d].cond;
          o_uncond += index * dims[d].uncond;
        }
        run(FlowEuler{x + o_sample, cond + o_cond, u ? u + o_uncond : nullptr, dims.back().sample, dims.back().cond, dims.back().uncond,
                      y + i, count, row[0], row[table.stride(1)], exact},
            scalar_t{});
        i += count;
      }
    });
  });
  return out;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("flow_euler_step", TORCH_BOX(&fusewire::flow_euler_step)); }
