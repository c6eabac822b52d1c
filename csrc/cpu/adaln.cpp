// adaLN on the CPU: fusewire::adaln_modulate, adaln_modulate_dual, gate_residual, gate_residual_adaln.
#include "cpu/adaln.h"

#include "common/empty.h"
#include "common/torch_order.h"
#include "cpu/processor.h"
#include "cpu/stream.h"

namespace fusewire {

static AdalnTask task(const Tensor& x, double eps, bool rms, bool exact) {
  AdalnTask k{};
  k.batch = x.size(0), k.tokens = x.size(1), k.channels = x.size(2);
  k.x = rows(x);
  k.eps = eps, k.rms = rms, k.exact = exact;
  k.order = exact && !rms ? known_order(x.scalar_type()) : order_of(x.scalar_type()).load();
  return k;
}

static void run(AdalnTask& k, ScalarType type) {
  const int64_t total = k.batch * k.tokens, grain = 1 + 32768 / (k.channels + 1);
  if (total == 0 || k.channels == 0) return;
  FUSEWIRE_SWITCH_FLOATS(type, "adaln", {
    const int64_t row = k.channels * static_cast<int64_t>(sizeof(scalar_t)), outputs = k.modulations + (k.residual ? 1 : 0);
    const bool compiled = sizeof(scalar_t) < sizeof(double) && !(k.exact && k.order == StockOrder::portable);  // adaln_kernels.cpp streams no others
    k.streams = compiled && row % kLine == 0 && on_lines(k.residual) && on_lines(k.out[0]) && on_lines(k.out[1]) && streams(outputs * total * row);
    // AMD's Zen 5 gains by it. Intel's sees the rows coming by itself, and loses up to a sixth, but where there is most to compute for each byte
    k.asks_ahead = !cpu_is_intel() || (k.exact && sizeof(scalar_t) == 2 && k.modulations);
    const auto range = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const AdalnTask&, int64_t, int64_t, scalar_t), adaln_rows);
    if (total <= grain) return range(k, 0, total, scalar_t{});
    torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) { range(k, begin, end, scalar_t{}); });
  });
}

static void set_modulation(AdalnTask& k, int i, const Tensor& shift, const Tensor& scale, const Tensor& out) {
  k.shift[i] = modulation(shift), k.scale[i] = modulation(scale), k.out[i] = out.mutable_data_ptr();
  k.modulations = i + 1;
}

static void set_affine(AdalnTask& k, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  if (weight) k.weight = {weight->const_data_ptr(), 0, 0, weight->stride(0)};
  if (bias) k.bias = {bias->const_data_ptr(), 0, 0, bias->stride(0)};
}

static Tensor adaln_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, double eps, bool rms, bool exact) {
  Tensor out = empty_contiguous(x);
  AdalnTask k = task(x, eps, rms, exact);
  set_affine(k, weight, bias);
  set_modulation(k, 0, shift, scale, out);
  run(k, x.scalar_type());
  return out;
}

static std::tuple<Tensor, Tensor> adaln_modulate_dual(const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& shift2,
                                                      const Tensor& scale2, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, double eps, bool rms, bool exact) {
  Tensor out = empty_contiguous(x), out2 = empty_contiguous(x);
  AdalnTask k = task(x, eps, rms, exact);
  set_affine(k, weight, bias);
  set_modulation(k, 0, shift, scale, out);
  set_modulation(k, 1, shift2, scale2, out2);
  run(k, x.scalar_type());
  return {out, out2};
}

static Tensor gate_residual(const Tensor& x, const Tensor& y, const Tensor& gate, bool exact) {
  Tensor residual = empty_contiguous(x);
  AdalnTask k = task(x, 0, true, exact);
  k.y = rows(y), k.gate = modulation(gate), k.residual = residual.mutable_data_ptr();
  run(k, x.scalar_type());
  return residual;
}

static std::tuple<Tensor, Tensor> gate_residual_adaln(const Tensor& x, const Tensor& y, const Tensor& gate, const std::optional<Tensor>& y2,
                                                      const std::optional<Tensor>& gate2, const Tensor& shift, const Tensor& scale,
                                                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                                      bool rms, bool exact) {
  Tensor residual = empty_contiguous(x), out = empty_contiguous(x);
  AdalnTask k = task(x, eps, rms, exact);
  k.y = rows(y), k.gate = modulation(gate), k.residual = residual.mutable_data_ptr();
  if (y2) k.y2 = rows(*y2), k.gate2 = modulation(*gate2);
  set_affine(k, weight, bias);
  set_modulation(k, 0, shift, scale, out);
  run(k, x.scalar_type());
  return {residual, out};
}

// [rows, 2]: the mean and reciprocal standard deviation of each row of x [rows, C], contiguous, in PyTorch's layer norm as `order` takes it to be.
// `out` [rows, 2] is float32 (float64 for float64).
static void cpu_layer_norm_moments(const Tensor& x, double eps, int64_t order, const Tensor& out) {
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "cpu_layer_norm_moments", {
    using wide_t = compute_t<scalar_t>;
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const scalar_t*, int64_t, int64_t, double, StockOrder, wide_t*), layer_norm_moments);
    run(static_cast<const scalar_t*>(x.const_data_ptr()), x.size(0), x.size(1), eps, static_cast<StockOrder>(order),
        static_cast<wide_t*>(out.mutable_data_ptr()));
  });
}

// What exact calls on x's dtype follow from now on.
static void cpu_layer_norm_order(const Tensor& x, int64_t order) { order_of(x.scalar_type()) = static_cast<StockOrder>(order); }

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("adaln_modulate", TORCH_BOX(&fusewire::adaln_modulate));
  m.impl("adaln_modulate_dual", TORCH_BOX(&fusewire::adaln_modulate_dual));
  m.impl("gate_residual", TORCH_BOX(&fusewire::gate_residual));
  m.impl("gate_residual_adaln", TORCH_BOX(&fusewire::gate_residual_adaln));
  m.impl("cpu_layer_norm_moments", TORCH_BOX(&fusewire::cpu_layer_norm_moments));
  m.impl("cpu_layer_norm_order", TORCH_BOX(&fusewire::cpu_layer_norm_order));
}
