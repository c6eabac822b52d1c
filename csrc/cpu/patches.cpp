// The patches of pictures, as rows of a matrix: fusewire::conv_patches.
#include <algorithm>
#include <array>
#include <type_traits>

#include "common/empty.h"
#include "cpu/picture.h"

namespace fusewire {

// Values are only moved, so a float32 is any four bytes.
template <typename T>
static void patches_of_channels(const Picture& k, const T* x, T* out, int64_t begin, int64_t end) {
  constexpr int64_t kMaxTaps = 64;
  const int64_t taps = k.taps(), row_size = k.channels * taps;
  const T zero{};
  std::array<const T*, kMaxTaps> from;
  std::array<int64_t, kMaxTaps> step;
  for (int64_t pixel = 0; pixel < k.pixels(); ++pixel, out += row_size) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t offset = k.offset(pixel, t);
      from[t] = offset < 0 ? &zero : x + offset + begin * k.x_c;
      step[t] = offset < 0 ? 0 : k.x_c;
    }
    T* to = out + begin * taps;
    const auto fill = [&](const int64_t n) __attribute__((always_inline)) {
      for (int64_t c = begin; c < end; ++c, to += n) {
        for (int64_t t = 0; t < n; ++t) to[t] = *from[t], from[t] += step[t];
      }
    };
    if (taps == 9)
      fill(9);  // a constant, so that the loop unrolls
    else
      fill(taps);
  }
}

// x [B, C, H, W], any strides -> [B, H' * W', C * kernel_h * kernel_w], contiguous: what each output pixel of a convolution sees, in the order of a
// contiguous weight [O, C, kernel_h, kernel_w].
static Tensor conv_patches(const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  STD_TORCH_CHECK(kernel_h * kernel_w <= 64, "conv_patches: more than 64 taps");
  const Picture k{x.size(1), x.size(2), x.size(3), kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  const int64_t batch = x.size(0), pixels = k.pixels(), row_size = k.channels * k.taps();
  const int64_t sizes[3] = {batch, pixels, row_size}, strides[3] = {pixels * row_size, row_size, 1};
  Tensor out = empty_strided(3, sizes, strides, x);
  // So few channels that all their pixels stay in the first cache, where a contiguous picture's lie far apart
  const int64_t block = 16, blocks = (k.channels + block - 1) / block;
  const auto run = [&](auto value) {
    using T = decltype(value);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, c = i % blocks * block;
        patches_of_channels(k, from + b * k.x_b, to + b * pixels * row_size, c, std::min(c + block, k.channels));
      }
    });
  };
  switch (element_size(x)) {
    case 2: run(uint16_t{}); break;
    case 4: run(uint32_t{}); break;
    default: run(uint64_t{});
  }
  return out;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("conv_patches", TORCH_BOX(&fusewire::conv_patches)); }
