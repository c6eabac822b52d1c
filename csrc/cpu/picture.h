// A picture [B, C, H, W] as the rows of a matrix: what each output pixel of a convolution sees, zeros beyond the edge.
#pragma once
#include <cstdint>

namespace fusewire {

struct Picture {
  int64_t channels, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int64_t x_b, x_c, x_h, x_w;  // strides in elements
  int64_t out_height = (height + 2 * pad_h - kernel_h) / stride_h + 1, out_width = (width + 2 * pad_w - kernel_w) / stride_w + 1;
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t pixels() const { return out_height * out_width; }
  // Where tap `tap` of output pixel `pixel` of a sample lies in that sample; -1 beyond the edge.
  int64_t offset(int64_t pixel, int64_t tap) const {
    const int64_t h = pixel / out_width * stride_h - pad_h + tap / kernel_w, w = pixel % out_width * stride_w - pad_w + tap % kernel_w;
    return h >= 0 && h < height && w >= 0 && w < width ? h * x_h + w * x_w : -1;
  }
};

}  // namespace fusewire
