// The gradients of GroupNorm with SiLU on the CPU: fusewire::group_norm_silu_backward.
#include "cpu/group_norm_silu_backward.h"

#include "cpu/group_norm_silu_tensors.h"

namespace fusewire {

// [spatial, C] pictures, a few samples at a time: statistics, sums, dx.
template <typename T>
static void gradient_pictures(GroupNormGradientTask& k) {
  using C = compute_t<T>;
  GroupNormTask plain = k.norm;  // the statistics alone: xhat = (v - center) * rstd + offset
  plain.weight = plain.bias = plain.shift = plain.scale = Rows{};
  const auto rows = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormGradientTask&, int64_t, T), group_norm_gradient_rows);
  const auto block_sums = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormGradientTask&, int64_t, int64_t, int64_t, void*, T), group_norm_gradient_sums);
  const auto finish = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormGradientTask&, int64_t, const void*, T), group_norm_gradient_finish);
  const auto pixels = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormGradientTask&, int64_t, int64_t, T), group_norm_gradient_pixels);
  const int64_t blocks = k.norm.blocks(), channels = k.norm.channels, spatial = k.norm.spatial, tile = tile_of(k.norm, sizeof(T));
  std::vector<C> sums(tile * blocks * kGradientSums * channels);
  for (int64_t first = 0; first < k.norm.batch; first += tile) {
    const int64_t last = std::min(k.norm.batch, first + tile);
    group_norm_statistics<T>(plain, first, last, sums.data());
    for (int64_t n = first; n < last; ++n) rows(k, n, T{});
    over_blocks(k.norm, first, last, [&](int64_t n, int64_t begin, int64_t end) {
      block_sums(k, n, begin, end, sums.data() + (n - first) * blocks * kGradientSums * channels, T{});
    });
    for (int64_t n = first; n < last; ++n) finish(k, n, sums.data() + (n - first) * blocks * kGradientSums * channels, T{});
    if (k.norm.out) parallel(first * spatial, last * spatial, channels, [&](int64_t begin, int64_t end) { pixels(k, begin, end, T{}); });
  }
}

using Optional = std::optional<Tensor>;

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& given_grad, const Tensor& given, int64_t groups, const Optional& weight, const Optional& bias, double eps, const Optional& shift,
    const Optional& scale, const Optional& add, bool silu, bool of_x) {
  const Picture picture(given), grad(given_grad, picture.channels_last);
  const auto of = [&](const Optional& p, bool by_sample) {
    const int64_t batch = given.size(0), channels = given.size(1), sizes[] = {batch, channels}, strides[] = {channels, 1};
    return !p ? empty_vector(0, given) : by_sample ? empty_strided(2, sizes, strides, given) : empty_vector(channels, given);
  };
  Tensor dx = of_x ? picture.empty() : empty_vector(0, given);
  Tensor dweight = of(weight, false), dbias = of(bias, false), dshift = of(shift, true), dscale = of(scale, true), dadd = of(add, true);
  GroupNormGradientTask k{};
  k.norm = group_norm_task(picture, groups, weight, bias, eps, shift, scale, add, silu);
  k.norm.out = of_x ? dx.mutable_data_ptr() : nullptr;
  k.grad = grad.x.const_data_ptr(), k.grad_batch = grad.batch_stride();
  const int64_t batch = k.norm.batch, channels = k.norm.channels;
  std::vector<double> sums(batch * kGradientSums * channels), values(batch * groups * kGroupValues);
  k.sums = sums.data(), k.groups = values.data();
  FUSEWIRE_SWITCH_FLOATS(given.scalar_type(), "group_norm_silu_backward", {
    using C = compute_t<scalar_t>;
    std::vector<C> stats;
    std::vector<C> rows;
    if (batch * k.norm.sample() == 0) {
      // nothing to sum: the parameters' gradients are zero
    } else if (k.norm.channels_last) {
      stats.resize(batch * kGroupNormRows * channels), rows.resize(batch * kGradientRows * channels);
      k.norm.stats = stats.data(), k.rows = rows.data();
      gradient_pictures<scalar_t>(k);
    } else {
      const auto planes = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormGradientTask&, int64_t, int64_t, scalar_t), group_norm_gradient_planes);
      parallel(0, batch * groups, k.norm.group_channels() * k.norm.spatial, [&](int64_t begin, int64_t end) { planes(k, begin, end, scalar_t{}); });
    }
    const auto parameters = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormGradientTask&, scalar_t*, scalar_t*, scalar_t*, scalar_t*, scalar_t*),
                                          group_norm_parameter_gradients);
    const auto data = [](const Optional& p, const Tensor& gradient) { return p ? static_cast<scalar_t*>(gradient.mutable_data_ptr()) : nullptr; };
    parameters(k, data(weight, dweight), data(bias, dbias), data(shift, dshift), data(scale, dscale), data(add, dadd));
  });
  return {dx, dweight, dbias, dshift, dscale, dadd};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("group_norm_silu_backward", TORCH_BOX(&fusewire::group_norm_silu_backward)); }
