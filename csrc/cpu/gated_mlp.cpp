// Gated activations on the CPU: fusewire::geglu, swiglu, quick_gelu, bias_activation and their gradients.
#include "cpu/gated_mlp.h"

#include <string>

#include "common/column_totals.h"
#include "common/empty.h"

namespace fusewire {

// Columns [at, at + F) of a tensor's rows.
static LeadingRows columns(const Tensor& x, int64_t at) {
  LeadingRows rows = leading_rows(x, x);
  rows.data = static_cast<const char*>(rows.data) + at * rows.channel * element_size(x);
  return rows;
}

// x holds both halves [..., 2 F], or, where `gate` is given, the hidden half alone.
static GatedTask task(const Tensor& x, const std::optional<Tensor>& gate, const std::optional<Tensor>& bias, bool gate_first, GatedActivation activation) {
  const int64_t last = x.size(x.dim() - 1), width = gate ? last : last / 2;
  const int64_t hidden_at = !gate && gate_first ? width : 0, gate_at = gate || gate_first ? 0 : width;
  GatedTask k{columns(x, hidden_at), gate ? columns(*gate, 0) : columns(x, gate_at), {}, {}, activation, width, nullptr};
  if (bias) {
    const int64_t half = width * bias->stride(0) * element_size(x);
    const char* first = static_cast<const char*>(bias->const_data_ptr());
    k.hidden_bias = {gate_first ? first + half : first, bias->stride(0)};
    k.gate_bias = {gate_first ? first : first + half, bias->stride(0)};
  }
  return k;
}

static Tensor run(GatedTask k, const Tensor& x) {
  const Tensor out = empty_contiguous(x, k.width);
  const int64_t rows = out.numel() ? out.numel() / k.width : 0, grain = 1 + 16384 / (1 + k.width);
  k.out = out.mutable_data_ptr();
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "gated activation", {
    const auto range = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GatedTask&, int64_t, int64_t, scalar_t), gated_rows);
    if (rows && rows <= grain) range(k, 0, rows, scalar_t{});
    else torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { range(k, begin, end, scalar_t{}); });
  });
  return out;
}

static void run_gradient(const GatedGradientTask& k, const Tensor& x) {
  if (x.numel() == 0) return;
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "gated gradient", {
    const auto range = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GatedGradientTask&, int64_t, int64_t, scalar_t), gated_gradient_blocks);
    const int64_t grain = 1 + 16384 / (1 + k.forward.width * k.blocks.height);
    torch::stable::parallel_for(0, k.blocks.count, grain, [&](int64_t begin, int64_t end) { range(k, begin, end, scalar_t{}); });
  });
}

// The gradients of x, gate and bias; that of the gate has no elements where x holds both halves, that of the bias where it is not wanted.
static std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& gate,
                                                    const std::optional<Tensor>& bias, bool gate_first, bool of_bias, GatedActivation activation) {
  const GatedTask forward = task(x, gate, bias, gate_first, activation);
  const int64_t width = forward.width, rows = x.numel() ? x.numel() / x.size(x.dim() - 1) : 0;
  const Tensor dx = empty_contiguous(x), dgate = gate ? empty_contiguous(x) : empty_vector(0, x);
  GatedGradientTask k{forward, leading_rows(grad, grad), nullptr, nullptr, gate ? width : 2 * width, nullptr,
                      gate_first ? width : 0, gate_first ? 0 : width, ColumnBlocks(rows)};
  char* data = static_cast<char*>(dx.mutable_data_ptr());
  k.dhidden = gate ? data : data + k.hidden_at * element_size(x);
  k.dgate = gate ? dgate.mutable_data_ptr() : data + k.gate_at * element_size(x);
  const ColumnSums sums(of_bias ? k.blocks.count : 0, 1, 2 * width, x);
  if (of_bias) k.sums = sums.data();
  run_gradient(k, x);
  return {dx, dgate, of_bias ? sums.total(0) : empty_vector(0, x)};
}

static Tensor geglu(const Tensor& x, const std::optional<Tensor>& gate, const std::optional<Tensor>& bias, bool exact) {
  return run(task(x, gate, bias, false, GatedActivation::gelu_erf), x);
}

static Tensor swiglu(const Tensor& x, const std::optional<Tensor>& gate, const std::optional<Tensor>& bias, bool gate_first, bool exact) {
  return run(task(x, gate, bias, gate_first, GatedActivation::silu), x);
}

static std::tuple<Tensor, Tensor, Tensor> geglu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& gate,
                                                         const std::optional<Tensor>& bias, bool of_bias) {
  return gradients(grad, x, gate, bias, false, of_bias, GatedActivation::gelu_erf);
}

static std::tuple<Tensor, Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& gate,
                                                          const std::optional<Tensor>& bias, bool gate_first, bool of_bias) {
  return gradients(grad, x, gate, bias, gate_first, of_bias, GatedActivation::silu);
}

static GatedTask alone(const Tensor& x, const std::optional<Tensor>& bias, GatedActivation activation) {
  GatedTask k{};
  k.gate = leading_rows(x, x), k.activation = activation, k.width = x.size(x.dim() - 1);
  if (bias) k.gate_bias = {bias->const_data_ptr(), bias->stride(0)};
  return k;
}

// The gradients of x and of the bias, which has no elements where it is not wanted.
static std::tuple<Tensor, Tensor> gradients_alone(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, bool of_bias,
                                                  GatedActivation activation) {
  const Tensor dx = empty_contiguous(x);
  const GatedTask forward = alone(x, bias, activation);
  const int64_t rows = x.numel() ? x.numel() / forward.width : 0;
  GatedGradientTask k{forward, leading_rows(grad, grad), nullptr, dx.mutable_data_ptr(), forward.width, nullptr, 0, 0, ColumnBlocks(rows)};
  const ColumnSums sums(of_bias ? k.blocks.count : 0, 1, forward.width, x);
  if (of_bias) k.sums = sums.data();
  run_gradient(k, x);
  return {dx, of_bias ? sums.total(0) : empty_vector(0, x)};
}

static Tensor quick_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool exact) { return run(alone(x, bias, GatedActivation::quick_gelu), x); }

static std::tuple<Tensor, Tensor> quick_gelu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, bool of_bias) {
  return gradients_alone(grad, x, bias, bias && of_bias, GatedActivation::quick_gelu);
}

// The epilogue of a linear layer, act(x + bias), for which it shares these loops.
static GatedActivation named(const std::string& activation) {
  if (activation == "gelu_tanh") return GatedActivation::gelu_tanh;
  if (activation == "silu") return GatedActivation::silu;
  STD_TORCH_CHECK(activation == "gelu", "bias_activation: unknown activation");
  return GatedActivation::gelu_erf;
}

static Tensor bias_activation(const Tensor& x, const std::optional<Tensor>& bias, std::string activation) {
  return run(alone(x, bias, named(activation)), x);
}

static std::tuple<Tensor, Tensor> bias_activation_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                                           std::string activation, bool of_bias) {
  return gradients_alone(grad, x, bias, bias && of_bias, named(activation));
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("geglu", TORCH_BOX(&fusewire::geglu));
  m.impl("swiglu", TORCH_BOX(&fusewire::swiglu));
  m.impl("quick_gelu", TORCH_BOX(&fusewire::quick_gelu));
  m.impl("geglu_backward", TORCH_BOX(&fusewire::geglu_backward));
  m.impl("swiglu_backward", TORCH_BOX(&fusewire::swiglu_backward));
  m.impl("quick_gelu_backward", TORCH_BOX(&fusewire::quick_gelu_backward));
  m.impl("bias_activation", TORCH_BOX(&fusewire::bias_activation));
  m.impl("bias_activation_backward", TORCH_BOX(&fusewire::bias_activation_backward));
}
