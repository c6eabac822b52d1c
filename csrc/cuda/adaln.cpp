// adaLN on CUDA: fusewire::cuda_adaln, which kernels/adaln/cuda.py calls for all ops of the room.
#include "cuda/adaln.h"

#include "cuda/tensor.h"

namespace fusewire::cuda {

using Optional = std::optional<Tensor>;

static void cuda_adaln(const Tensor& x, const Optional& y, const Optional& gate, const Optional& y2, const Optional& gate2, const Optional& weight,
                       const Optional& bias, const Optional& shift, const Optional& scale, const Optional& shift2, const Optional& scale2,
                       const Optional& residual, const Optional& out, const Optional& out2, double eps, int64_t norm, bool exact) {
  Adaln k{};
  const int64_t rows = x.size(0) * x.size(1);
  if (rows == 0 || x.size(2) == 0) return;
  STD_TORCH_CHECK(x.size(2) <= kMaxChannels && rows <= kMaxBlocks, "cuda_adaln: x is too large");
  k.rows = static_cast<unsigned>(rows), k.tokens = static_cast<unsigned>(x.size(1)), k.channels = static_cast<int>(x.size(2));
  k.x = tokens(x), k.weight = tokens(weight), k.bias = tokens(bias);
  k.y[0] = tokens(y), k.gate[0] = tokens(gate), k.y[1] = tokens(y2), k.gate[1] = tokens(gate2);
  k.shift[0] = tokens(shift), k.scale[0] = tokens(scale), k.shift[1] = tokens(shift2), k.scale[1] = tokens(scale2);
  k.gates = y2 ? 2 : y ? 1 : 0, k.modulations = shift2 ? 2 : shift ? 1 : 0;
  k.vector = true;
  for (const auto& [tensor, place] : {std::pair{&residual, &k.residual}, {&out, &k.out[0]}, {&out2, &k.out[1]}}) {
    if (!*tensor) continue;
    *place = (*tensor)->mutable_data_ptr();
    k.vector = k.vector && vectors(**tensor, 1, {x.size(2)});
  }
  k.norm = static_cast<Norm>(norm), k.eps = static_cast<float>(eps), k.exact = exact;
  const OnDevice device(x);
  check_launch("cuda_adaln", launch_adaln(k, type_of(x), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_adaln", TORCH_BOX(&fusewire::cuda::cuda_adaln)); }
