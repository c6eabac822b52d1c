// RMSNorm and LayerNorm on the CPU: fusewire::rms_norm, layer_norm, layer_norm_2d and their gradients.
#include "cpu/norm.h"

#include "common/column_totals.h"
#include "common/empty.h"
#include "common/torch_order.h"

namespace fusewire {

static Affine affine(const std::optional<Tensor>& v, const Tensor& x) {
  if (!v) return {};
  return {v->const_data_ptr(), v->stride(0), v->scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Float};
}

static StockOrder order_for(NormKind kind, const Tensor& x) {
  if (kind == NormKind::layer_torch) return known_order(x.scalar_type());
  return kind == NormKind::layer_wide ? known_order(ScalarType::Float) : StockOrder::portable;
}

// x and out: [..., C], of any strides.
static void norm_into(const Tensor& x, const LeadingRows& from, const LeadingRows& to, int64_t rows, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, int64_t channels, double eps, NormKind kind) {
  const NormTask k{from, to, channels, affine(weight, x), affine(bias, x), eps, kind, order_for(kind, x)};
  if (rows == 0 || channels == 0) return;
  const int64_t grain = 1 + 32768 / channels;
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "norm", {
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const NormTask&, int64_t, int64_t, scalar_t), norm_rows);
    if (rows <= grain) return run(k, 0, rows, scalar_t{});
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { run(k, begin, end, scalar_t{}); });
  });
}

static Tensor over_last(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, NormKind kind) {
  const Tensor out = empty_contiguous(x);
  const int64_t channels = x.size(x.dim() - 1);
  norm_into(x, leading_rows(x, x), leading_rows(out, out), channels ? x.numel() / channels : 0, weight, bias, channels, eps, kind);
  return out;
}

static Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, bool as_torch, bool exact) {
  return over_last(x, weight, bias, eps, !exact ? NormKind::rms_close : as_torch ? NormKind::rms_torch : NormKind::rms_diffusers);
}

static Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, bool wide, bool exact) {
  const bool converts = wide && x.scalar_type() != ScalarType::Float;
  return over_last(x, weight, bias, eps, !exact ? NormKind::layer_close : converts ? NormKind::layer_wide : NormKind::layer_torch);
}

constexpr int64_t kLeastPixels = 16;  // enough for a vector

// Whether the pixels of each channel of x [B, C, H, W] lie side by side, enough of them for a vector.
static bool pixels_side_by_side(const Tensor& x) {
  const int64_t height = x.size(2), width = x.size(3);
  return height * width >= kLeastPixels && (width == 1 || x.stride(3) == 1) && (height == 1 || x.stride(2) == width);
}

static void norm_pictures_into(const Tensor& x, const Tensor& out, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                               NormKind kind) {
  const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
  const PictureNormTask k{x.const_data_ptr(), x.stride(0), x.stride(1), out.mutable_data_ptr(), pixels, channels, affine(weight, x), affine(bias, x), eps,
                          kind == NormKind::layer_torch, order_for(kind, x)};
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "layer_norm_2d", {
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const PictureNormTask&, int64_t, int64_t, scalar_t), norm_pictures);
    const int64_t width = kPictureBytes / sizeof(scalar_t), tiles = x.size(0) * ((pixels + width - 1) / width), grain = 1 + 32768 / (channels * width);
    if (tiles <= grain) return run(k, 0, tiles, scalar_t{});
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { run(k, begin, end, scalar_t{}); });
  });
}

static bool has_channels_last(const Tensor& x) { return x.stride(1) == 1 && x.size(1) > 1; }
static LeadingRows pixel_rows(const Tensor& x) {
  return {x.const_data_ptr(), 3, {x.size(0), x.size(2), x.size(3)}, {x.stride(0), x.stride(2), x.stride(3)}, x.stride(1)};
}
static Tensor empty_channels_last(const Tensor& x) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t sizes[] = {x.size(0), channels, height, width}, last[] = {height * width * channels, 1, width * channels, channels};
  return empty_strided(4, sizes, last, x);
}

// Over the channels of x [B, C, H, W]; the result's channels are last in memory where those of x lie side by side.
static Tensor layer_norm_2d(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, bool exact) {
  const bool channels_last = has_channels_last(x);
  const NormKind kind = exact ? NormKind::layer_torch : NormKind::layer_close;
  const Tensor out = channels_last ? empty_channels_last(x) : empty_contiguous(x);
  if (!channels_last && x.numel() && pixels_side_by_side(x)) {
    norm_pictures_into(x, out, weight, bias, eps, kind);
    return out;
  }
  norm_into(x, pixel_rows(x), pixel_rows(out), x.size(0) * x.size(2) * x.size(3), weight, bias, x.size(1), eps, kind);
  return out;
}

// The gradients of x, weight and bias; one that is not wanted has no elements.
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Of `channels` channels in `rows` rows; dx: contiguous rows, or no elements.
static Gradients row_gradients(const Tensor& dx, const LeadingRows& grad, const Tensor& x, const LeadingRows& x_rows, int64_t rows, int64_t channels,
                               const std::optional<Tensor>& weight, double eps, bool rms, bool of_x, bool of_weight, bool of_bias) {
  NormGradientTask k{grad, x_rows, channels, affine(weight, x), eps, rms, of_x ? dx.mutable_data_ptr() : nullptr, nullptr, ColumnBlocks(rows)};
  const ColumnSums sums(of_weight || of_bias ? k.blocks.count : 0, 2, channels, x);
  if (of_weight || of_bias) k.sums = sums.data();
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "norm gradient", {
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const NormGradientTask&, int64_t, int64_t, scalar_t), norm_gradient_blocks);
    const int64_t grain = 1 + 16384 / (1 + channels * k.blocks.height);
    if (channels) torch::stable::parallel_for(0, k.blocks.count, grain, [&](int64_t begin, int64_t end) { run(k, begin, end, scalar_t{}); });
  });
  return {dx, of_weight ? sums.total(0) : empty_vector(0, x), of_bias ? sums.total(1) : empty_vector(0, x)};
}

static Gradients gradients(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool rms, bool of_x, bool of_weight,
                           bool of_bias) {
  const int64_t channels = x.size(x.dim() - 1), rows = channels ? x.numel() / channels : 0;
  return row_gradients(of_x ? empty_contiguous(x) : empty_vector(0, x), leading_rows(grad, grad), x, leading_rows(x, x), rows, channels, weight, eps, rms,
                       of_x, of_weight, of_bias);
}

static Gradients picture_gradients(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool of_x, bool of_weight,
                                   bool of_bias) {
  const Tensor dx = of_x ? empty_contiguous(x) : empty_vector(0, x);
  const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
  Tensor of_weights = empty_vector(0, x), of_biases = empty_vector(0, x);
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "layer_norm_2d gradient", {
    const int64_t width = kPictureBytes / sizeof(scalar_t), tiles = x.size(0) * ((pixels + width - 1) / width);
    PictureGradientTask k{x.const_data_ptr(), grad.const_data_ptr(), x.stride(0), x.stride(1), grad.stride(0), grad.stride(1), pixels, channels,
                          affine(weight, x), eps, of_x ? dx.mutable_data_ptr() : nullptr, nullptr, TileBlocks(tiles)};
    const ColumnSums sums(of_weight || of_bias ? k.blocks.count : 0, 2, channels, x);
    if (of_weight || of_bias) k.sums = sums.data();
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const PictureGradientTask&, int64_t, int64_t, scalar_t), norm_picture_gradients);
    const int64_t grain = 1 + 16384 / (1 + channels * width * k.blocks.height);
    torch::stable::parallel_for(0, k.blocks.count, grain, [&](int64_t begin, int64_t end) { run(k, begin, end, scalar_t{}); });
    if (of_weight) of_weights = sums.total(0);
    if (of_bias) of_biases = sums.total(1);
  });
  return {dx, of_weights, of_biases};
}

// dx lies in memory as layer_norm_2d's result. Pictures of any strides but channels-last ones give the bits of contiguous ones.
static Gradients layer_norm_2d_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool of_x, bool of_weight,
                                        bool of_bias) {
  if (!has_channels_last(x) && x.numel() && x.size(2) * x.size(3) >= kLeastPixels) {
    const auto dense = [](const Tensor& t) { return pixels_side_by_side(t) ? t : torch::stable::contiguous(t); };
    return picture_gradients(dense(grad), dense(x), weight, eps, of_x, of_weight, of_bias);
  }
  const Tensor dx = of_x ? empty_channels_last(x) : empty_vector(0, x);
  auto found = row_gradients(dx, pixel_rows(grad), x, pixel_rows(x), x.size(0) * x.size(2) * x.size(3), x.size(1), weight, eps, false, of_x, of_weight, of_bias);
  if (of_x && !has_channels_last(x)) std::get<0>(found) = torch::stable::contiguous(dx);
  return found;
}

static Gradients rms_norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool of_x, bool of_weight,
                                  bool of_bias) {
  return gradients(grad, x, weight, eps, true, of_x, of_weight, of_bias);
}

static Gradients layer_norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, double eps, bool of_x, bool of_weight,
                                     bool of_bias) {
  return gradients(grad, x, weight, eps, false, of_x, of_weight, of_bias);
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&fusewire::rms_norm));
  m.impl("layer_norm", TORCH_BOX(&fusewire::layer_norm));
  m.impl("layer_norm_2d", TORCH_BOX(&fusewire::layer_norm_2d));
  m.impl("rms_norm_backward", TORCH_BOX(&fusewire::rms_norm_backward));
  m.impl("layer_norm_backward", TORCH_BOX(&fusewire::layer_norm_backward));
  m.impl("layer_norm_2d_backward", TORCH_BOX(&fusewire::layer_norm_2d_backward));
}
