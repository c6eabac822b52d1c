// The gradients of adaLN on CUDA: fusewire::cuda_adaln_backward, which kernels/adaln/cuda_backward.py calls for all ops of the room.
#include "cuda/adaln_backward.h"

#include "cuda/column_sums.h"
#include "cuda/tensor.h"

namespace fusewire::cuda {

using Optional = std::optional<Tensor>;

// The gradients are null where they are not wanted. `sums` [n, B, parts, C] has room for the partial sums of those that are sums: float32.
static void cuda_adaln_backward(const Optional& grad, const Optional& grad1, const Optional& grad2, const Optional& x, const Optional& y,
                                const Optional& gate, const Optional& y2, const Optional& gate2, const Optional& scale, const Optional& scale2,
                                const Optional& weight, const Optional& bias, const Optional& dx, const Optional& dy, const Optional& dy2,
                                const Optional& dgate, const Optional& dgate2, const Optional& dshift, const Optional& dscale, const Optional& dshift2,
                                const Optional& dscale2, const Optional& dweight, const Optional& dbias, const Optional& sums, double eps, int64_t norm) {
  const Tensor& like = grad1 ? *grad1 : *grad;
  const int64_t batch = like.size(0), tokens_of = like.size(1), channels = like.size(2), of_sample = sums ? sums->size(2) : tokens_of;
  if (channels == 0) return;
  STD_TORCH_CHECK(channels <= kMaxGradientChannels && batch * tokens_of <= kMaxBlocks, "cuda_adaln_backward: the gradients are too large");
  AdalnGradient k{};
  k.parts = static_cast<unsigned>(batch * of_sample), k.of_sample = static_cast<unsigned>(of_sample), k.tokens = static_cast<unsigned>(tokens_of);
  k.steps = of_sample ? static_cast<unsigned>(ceil_div(tokens_of, of_sample)) : 0;
  k.channels = static_cast<int>(channels), k.gates = y2 ? 2 : y ? 1 : 0, k.modulations = grad2 ? 2 : grad1 ? 1 : 0;
  k.grad_residual = tokens(grad), k.grad[0] = tokens(grad1), k.grad[1] = tokens(grad2), k.x = tokens(x);
  k.y[0] = tokens(y), k.gate[0] = tokens(gate), k.y[1] = tokens(y2), k.gate[1] = tokens(gate2);
  k.scale[0] = tokens(scale), k.scale[1] = tokens(scale2), k.weight = tokens(weight), k.bias = tokens(bias);
  k.norm = static_cast<Norm>(norm), k.eps = static_cast<float>(eps), k.affine = weight || bias, k.vector = true;
  const auto writes = [&](const Tensor& out) {
    k.vector = k.vector && vectors(out, 1, {channels});
    return out.mutable_data_ptr();
  };
  for (const auto& [out, place] : {std::pair{&dx, &k.dx}, {&dy, &k.dy[0]}, {&dy2, &k.dy[1]}}) {
    if (*out) *place = writes(**out);
  }
  // Kinds of sums, in the order that adaln_backward.h gives
  int kind = 0;
  ColumnSums totals{};
  const auto sum = [&](const Optional& of) {
    if (of && of->dim() == 3 && of->size(1) != 1) {
      k.of_tokens[kind] = writes(*of);
    } else if (of) {
      STD_TORCH_CHECK(sums && totals.sums < sums->size(0), "cuda_adaln_backward: no room for the sums");
      float* parts = static_cast<float*>(sums->mutable_data_ptr()) + totals.sums * batch * of_sample * channels;
      k.parts_of[kind] = parts;
      void* out = writes(*of);
      of->dim() == 1 ? totals.add(parts, out, 1, batch * of_sample) : totals.add(parts, out, batch, of_sample);
    }
    ++kind;
  };
  if (k.gates > 0) sum(dgate);
  if (k.gates > 1) sum(dgate2);
  if (k.modulations > 0) sum(dshift), sum(dscale);
  if (k.modulations > 1) sum(dshift2), sum(dscale2);
  if (k.affine) sum(dweight), sum(dbias);
  totals.channels = k.channels, totals.vector = k.vector;
  const OnDevice device(like);
  if (k.parts) check_launch("cuda_adaln_backward", launch_adaln_gradient(k, type_of(like), device.stream()));
  check_launch("cuda_adaln_backward", launch_column_sums(totals, type_of(like), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_adaln_backward", TORCH_BOX(&fusewire::cuda::cuda_adaln_backward)); }
