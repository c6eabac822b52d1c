// Global response normalisation on the CPU, in close: fusewire::global_response_norm and its gradients.
#include "cpu/global_response_norm.h"

#include <memory>

#include "common/column_totals.h"
#include "common/empty.h"

namespace fusewire {

// Memory for `count` elements of x's compute type.
static std::unique_ptr<double[]> scratch(int64_t count, const Tensor& x) {
  return std::unique_ptr<double[]>(new double[x.scalar_type() == ScalarType::Double ? count : (count + 1) / 2]);
}

static void run_task(const ResponseTask& k, ScalarType type) {
  FUSEWIRE_SWITCH_FLOATS(type, "global response norm", {
    using Run = void (*)(const ResponseTask&, int64_t, int64_t, scalar_t);
    const auto pass = [&](Run run, int64_t count, int64_t grain) {
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { run(k, begin, end, scalar_t{}); });
    };
    pass(FUSEWIRE_PICK_UP_TO_AVX512(Run, response_blocks), k.samples * k.blocks.count, 1 + 32768 / (k.channels * k.blocks.height));
    pass(FUSEWIRE_PICK_UP_TO_AVX512(Run, response_samples), k.samples, 1 + 32768 / (k.channels * k.blocks.count));
    if (k.out) pass(FUSEWIRE_PICK_UP_TO_AVX512(Run, response_rows), k.samples * k.blocks.rows, 1 + 32768 / k.channels);
  });
}

static Tensor global_response_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const Tensor out = empty_contiguous(x);
  if (x.numel() == 0) return out;
  ResponseTask k{leading_rows(x, x), {}, x.size(0), x.size(3), ColumnBlocks(x.size(1) * x.size(2)), weight.const_data_ptr(), bias.const_data_ptr(),
                 weight.stride(0), bias.stride(0), eps, nullptr, nullptr, out.mutable_data_ptr()};
  const auto sums = scratch(k.samples * k.blocks.count * k.kinds() * k.channels, x), factors = scratch(k.samples * k.factor_kinds() * k.channels, x);
  k.sums = sums.get();
  k.factors = factors.get();
  run_task(k, x.scalar_type());
  return out;
}

// The gradients of x, weight and bias; that of x has no elements where it is not wanted.
static std::tuple<Tensor, Tensor, Tensor> global_response_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps,
                                                                        bool of_x) {
  const Tensor dx = of_x ? empty_contiguous(x) : empty_vector(0, x);
  const int64_t samples = x.numel() ? x.size(0) : 0, channels = x.size(3);
  const ColumnSums factors(samples, 4, channels, x);
  if (samples) {
    ResponseTask k{leading_rows(x, x), leading_rows(grad, x), samples, channels, ColumnBlocks(x.size(1) * x.size(2)),
                   weight.const_data_ptr(), nullptr, weight.stride(0), 0, eps, nullptr, factors.data(), of_x ? dx.mutable_data_ptr() : nullptr};
    const auto sums = scratch(samples * k.blocks.count * k.kinds() * channels, x);
    k.sums = sums.get();
    run_task(k, x.scalar_type());
  }
  return {dx, factors.total(2), factors.total(3)};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("global_response_norm", TORCH_BOX(&fusewire::global_response_norm));
  m.impl("global_response_norm_backward", TORCH_BOX(&fusewire::global_response_norm_backward));
}
