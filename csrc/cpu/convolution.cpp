// Convolutions whose patches are gathered where they are multiplied: fusewire::conv_rows.
#include <algorithm>
#include <atomic>
#include <vector>

#include "common/tensor.h"
#include "cpu/amx_convolution.h"
#include "cpu/thread_memory.h"

namespace fusewire {

#if defined(FUSEWIRE_HAS_AMX)
// What does not split into bfloat16 parts is done over on vectors, a sample at a time, which depends on that sample alone.
static void on_tiles(const LinearCall& call, ScalarKind type) {
  const Picture& picture = *call.picture;
  const int64_t threads = torch::stable::get_num_threads(), enough = 3 * threads;
  const int64_t block = amx::kConvolutionBlock, panels = (call.outputs + block - 1) / block, samples = call.rows / picture.pixels();
  // Bands as high as memory allows, and as equal as can be, or of as many samples: for each the weights are packed anew
  const int64_t least = amx::convolution_pixel_bytes(call, 1, type), row_bytes = (amx::convolution_pixel_bytes(call, 33, type) - least) / 32;
  const int64_t most = std::clamp<int64_t>(1 + (amx::kConvolutionBandBytes - least) / row_bytes, 1, picture.out_height);
  const int64_t bands = (picture.out_height + most - 1) / most, height = (picture.out_height + bands - 1) / bands;
  const int64_t fit = std::clamp<int64_t>(amx::kConvolutionBandBytes / amx::convolution_pixel_bytes(call, height, type), 1, samples);
  const int64_t together = bands > 1 ? 1 : fit, groups = (samples + together - 1) / together;
  // Tasks of a few panels; where panels are few, or their sums would not fit, pixels are shared out too, though each task packs its weights.
  const int64_t widest = type == ScalarKind::bf16 ? amx::kConvolutionPanels : amx::kConvolutionPanels / 2;
  const int64_t col_groups = (panels + widest - 1) / widest, width = (panels + col_groups - 1) / col_groups;
  const int64_t most_blocks = amx::convolution_most_blocks(call, width, type);
  char* const pixels = packed_memory(together * amx::convolution_pixel_bytes(call, height, type));
  std::vector<std::atomic<bool>> bad_samples(samples);
  std::vector<std::atomic<uint32_t>> bad_panels(col_groups);
  for (int64_t i = 0; i < groups * bands; ++i) {
    const int64_t sample = i / bands * together, row = i % bands * height;
    const amx::ConvolutionBand band{sample, std::min(together, samples - sample), row, std::min(height, picture.out_height - row)};
    if (band.rows <= 0) continue;
    const int64_t seen = amx::convolution_packed_rows(call, band.rows);
    torch::stable::parallel_for(0, band.samples * seen, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!amx::convolution_pack_row(call, band, r / seen, r % seen, pixels, type)) bad_samples[sample + r / seen] = true;
      }
    });
    const int64_t blocks = band.samples * amx::convolution_blocks(call, band.rows);
    const int64_t that_fit = most_blocks >= blocks ? 1 : (blocks + most_blocks - 1) / most_blocks;
    const int64_t row_groups = std::min(blocks, std::max((enough + col_groups - 1) / col_groups, that_fit));
    const int64_t tasks = row_groups * col_groups, bytes = amx::convolution_scratch_bytes(call, (blocks + row_groups - 1) / row_groups, width, type);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
      char* scratch = linear_memory(bytes);
      for (int64_t t = next++; t < tasks; t = next++) {
        const int64_t g = t / row_groups, at = t % row_groups;
        const amx::ConvolutionTask task{at * blocks / row_groups, (at + 1) * blocks / row_groups, g * width, std::min((g + 1) * width, panels)};
        if (const uint32_t bad = amx::convolution_multiply(call, band, task, pixels, scratch, type)) bad_panels[g] = bad;
      }
    });
  }
  for (int64_t i = 0; i < samples; ++i) {
    if (bad_samples[i]) linear_part_on_vectors(call, {i * picture.pixels(), picture.pixels(), 0, call.outputs}, type);
  }
  for (int64_t i = 0; i < panels; ++i) {
    const bool bad = bad_panels[i / width] >> i % width & 1;
    if (bad) linear_part_on_vectors(call, {0, call.rows, i * block, std::min(block, call.outputs - i * block)}, type);
  }
}
#endif

static void run(const LinearCall& call, ScalarKind type) {
#if defined(FUSEWIRE_HAS_AMX)
  if (active_isa() == Isa::amx && amx::convolution_serves(call)) return on_tiles(call, type);
#endif
  linear_on_vectors(call, type);
}

// A convolution whose patches are gathered where they are multiplied. x [B, C, H, W], channels-last; weight [O, C, kernel_h, kernel_w], contiguous
// -> [B, H' * W', O], contiguous.
static Tensor conv_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  STD_TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1, "conv_rows: the channels of x do not lie beside each other");
  STD_TORCH_CHECK(weight.size(1) == x.size(1) && weight.scalar_type() == x.scalar_type(), "conv_rows: weight does not fit x");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == x.scalar_type()),
                  "conv_rows: bias does not fit weight and x");
  const Picture picture{x.size(1), x.size(2), x.size(3), weight.size(2), weight.size(3), stride_h, stride_w, pad_h, pad_w,
                        x.stride(0), 1, x.stride(2), x.stride(3)};
  LinearCall call{};
  call.picture = &picture;
  call.x.data = x.data_ptr();
  call.x.channel = 1;
  call.rows = x.size(0) * picture.pixels();
  call.inputs = picture.channels * picture.taps();
  call.outputs = weight.size(0);
  call.weight = weight.data_ptr();
  call.weight_row = call.inputs;
  call.weight_col = picture.taps();
  if (bias) {
    call.bias = bias->data_ptr();
    call.bias_stride = bias->stride(0);
  }
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), picture.pixels(), call.outputs});
  call.out = out.data_ptr();
  if (call.rows == 0 || call.outputs == 0) return out;
  switch (x.scalar_type()) {
    case ScalarType::Float: run(call, ScalarKind::f32); break;
    case ScalarType::BFloat16: run(call, ScalarKind::bf16); break;
    case ScalarType::Half: run(call, ScalarKind::f16); break;
    default: STD_TORCH_CHECK(false, "conv_rows: unsupported dtype");
  }
  return out;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("conv_rows", TORCH_BOX(&fusewire::conv_rows)); }
