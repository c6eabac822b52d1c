// The gradients of adaLN on the CPU: fusewire::adaln_modulate_backward, adaln_modulate_dual_backward, gate_residual_backward and
// gate_residual_adaln_backward. Bit i of `wanted` asks for the i-th gradient that an op returns; one that is not wanted has no elements.
#include "cpu/adaln_backward.h"

#include <vector>

#include "common/column_totals.h"
#include "common/empty.h"

namespace fusewire {

using Optional = std::optional<Tensor>;

// The task of one call, filled part by part; kinds of sums in the order that adaln_backward.h gives.
class AdalnGradients {
 public:
  AdalnGradients(const Tensor& like, double eps, bool rms, int64_t wanted) : like_(like), wanted_(wanted) {
    k_.blocks = ColumnBlocks(like.size(1)), k_.batch = like.size(0), k_.tokens = like.size(1), k_.channels = like.size(2), k_.eps = eps, k_.rms = rms;
  }

  // A gradient of one row per token: its memory is given to `where`.
  Tensor rows(int bit, void*& where) const {
    const Tensor out = is_wanted(bit) ? empty_contiguous(like_) : empty_vector(0, like_);
    if (is_wanted(bit)) where = out.mutable_data_ptr();
    return out;
  }

  // The next kind of sum, for the gradient of `of`: [B, C], [B, 1, C] (sums over a sample's tokens), [B, T, C] (no sum) or [C].
  Tensor sum(int bit, const Optional& of) {
    const bool wanted = is_wanted(bit) && of, of_tokens = of && of->dim() == 3 && of->size(1) != 1;
    const Tensor out = wanted ? empty_contiguous(*of) : empty_vector(0, like_);
    k_.per_token |= of_tokens;
    if (wanted && of_tokens) k_.of_tokens[kinds_.size()] = out.mutable_data_ptr();
    kinds_.push_back({out, wanted && !of_tokens, of && of->dim() == 1});
    return out;
  }

  void add_modulation(const Tensor& grad, const Tensor& scale) {
    k_.grad[k_.modulations] = leading_rows(grad, grad), k_.scale[k_.modulations] = modulation(scale);
    ++k_.modulations;
  }
  void add_gate(const Tensor& y, const Tensor& gate) {
    k_.y[k_.gates] = leading_rows(y, y), k_.gate[k_.gates] = modulation(gate);
    ++k_.gates;
  }
  void set_affine(const Optional& weight, const Optional& bias) {
    if (weight) k_.weight = {weight->const_data_ptr(), 0, 0, weight->stride(0)};
    if (bias) k_.bias = {bias->const_data_ptr(), 0, 0, bias->stride(0)};
  }

  void run() {
    bool summed = false;
    for (const Kind& kind : kinds_) summed |= kind.summed;
    const int64_t blocks = k_.batch * k_.blocks.count;
    const ColumnSums sums(summed ? blocks : 0, k_.kinds(), k_.channels, like_);
    if (summed) k_.sums = sums.data();
    FUSEWIRE_SWITCH_FLOATS(like_.scalar_type(), "adaln gradient", {
      const auto range = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const AdalnGradientTask&, int64_t, int64_t, scalar_t), adaln_gradient_blocks);
      const int64_t grain = 1 + 16384 / (1 + k_.channels * k_.blocks.height);
      if (k_.channels) torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) { range(k_, begin, end, scalar_t{}); });
    });
    for (size_t i = 0; i < kinds_.size(); ++i) {
      if (kinds_[i].summed) sums.totals(i, kinds_[i].of_all ? 1 : k_.batch, kinds_[i].out.mutable_data_ptr());
    }
  }

  AdalnGradientTask& task() { return k_; }

 private:
  struct Kind {
    Tensor out;
    bool summed, of_all;  // over all samples
  };
  bool is_wanted(int bit) const { return wanted_ >> bit & 1; }

  const Tensor& like_;
  const int64_t wanted_;
  AdalnGradientTask k_{};
  std::vector<Kind> kinds_;
};

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_modulate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& shift, const Tensor& scale, const Optional& weight, const Optional& bias, double eps, bool rms,
    int64_t wanted) {
  AdalnGradients gradients(x, eps, rms, wanted);
  gradients.task().x = leading_rows(x, x);
  gradients.add_modulation(grad, scale);
  gradients.set_affine(weight, bias);
  const Tensor dx = gradients.rows(0, gradients.task().dx), dshift = gradients.sum(1, shift), dscale = gradients.sum(2, scale);
  const Tensor dweight = gradients.sum(3, weight), dbias = gradients.sum(4, bias);
  gradients.run();
  return {dx, dshift, dscale, dweight, dbias};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_modulate_dual_backward(
    const Tensor& grad, const Tensor& grad2, const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& shift2, const Tensor& scale2,
    const Optional& weight, const Optional& bias, double eps, bool rms, int64_t wanted) {
  AdalnGradients gradients(x, eps, rms, wanted);
  gradients.task().x = leading_rows(x, x);
  gradients.add_modulation(grad, scale);
  gradients.add_modulation(grad2, scale2);
  gradients.set_affine(weight, bias);
  const Tensor dx = gradients.rows(0, gradients.task().dx), dshift = gradients.sum(1, shift), dscale = gradients.sum(2, scale);
  const Tensor dshift2 = gradients.sum(3, shift2), dscale2 = gradients.sum(4, scale2);
  const Tensor dweight = gradients.sum(5, weight), dbias = gradients.sum(6, bias);
  gradients.run();
  return {dx, dshift, dscale, dshift2, dscale2, dweight, dbias};
}

// Of y and gate: that of x is `grad` itself.
static std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& grad, const Tensor& y, const Tensor& gate, int64_t wanted) {
  AdalnGradients gradients(y, 0, true, wanted);
  gradients.task().grad_residual = leading_rows(grad, grad);
  gradients.add_gate(y, gate);
  const Tensor dy = gradients.rows(0, gradients.task().dy[0]), dgate = gradients.sum(1, gate);
  gradients.run();
  return {dy, dgate};
}

// `grad` is the gradient of the residual stream, `grad2` that of the modulated norm.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_adaln_backward(
    const Tensor& grad, const Tensor& grad2, const Tensor& x, const Tensor& y, const Tensor& gate, const Optional& y2, const Optional& gate2,
    const Tensor& shift, const Tensor& scale, const Optional& weight, const Optional& bias, double eps, bool rms, int64_t wanted) {
  AdalnGradients gradients(x, eps, rms, y2 ? wanted : wanted & ~(int64_t{3} << 3));
  AdalnGradientTask& k = gradients.task();
  k.x = leading_rows(x, x), k.grad_residual = leading_rows(grad, grad);
  gradients.add_gate(y, gate);
  if (y2) gradients.add_gate(*y2, *gate2);
  gradients.add_modulation(grad2, scale);
  gradients.set_affine(weight, bias);
  const Tensor dx = gradients.rows(0, k.dx), dy = gradients.rows(1, k.dy[0]), dy2 = gradients.rows(3, k.dy[1]);
  const Tensor dshift = gradients.sum(5, shift), dscale = gradients.sum(6, scale), dgate = gradients.sum(2, gate);
  const Tensor dgate2 = y2 ? gradients.sum(4, gate2) : empty_vector(0, x);
  const Tensor dweight = gradients.sum(7, weight), dbias = gradients.sum(8, bias);
  gradients.run();
  return {dx, dy, dgate, dy2, dgate2, dshift, dscale, dweight, dbias};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("adaln_modulate_backward", TORCH_BOX(&fusewire::adaln_modulate_backward));
  m.impl("adaln_modulate_dual_backward", TORCH_BOX(&fusewire::adaln_modulate_dual_backward));
  m.impl("gate_residual_backward", TORCH_BOX(&fusewire::gate_residual_backward));
  m.impl("gate_residual_adaln_backward", TORCH_BOX(&fusewire::gate_residual_adaln_backward));
}
