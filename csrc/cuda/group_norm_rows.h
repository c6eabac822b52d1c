// What the group-norm kernels share: a channel's parameters, how threads share channels-last pixels, norm and SiLU. Included by *_kernels.cu alone.
#pragma once
#include "cuda/device.h"
#include "cuda/group_norm_silu.h"

namespace fusewire::cuda {

constexpr int kBlock = 256, kLargeBlock = kMaxBytesLast / 16;  // threads; the large one where a pixel has more chunks

template <typename T>
__device__ inline float parameter(const Tokens& p, int64_t n, int64_t c) {
  return widen(static_cast<const T*>(p.data)[n * p.batch + c * p.channel]);
}

// How the threads of a block share pixels of [pixels, C]: each has a chunk of channels, in `rows` pixels at a time.
template <typename T>
struct Columns {
  unsigned rows, row, channel;
  int count;  // channels of this thread's chunk; 0 where it has none
  __device__ explicit Columns(unsigned channels) {
    const unsigned across = (channels + kChunk<T> - 1) / kChunk<T>;
    rows = blockDim.x / across, row = threadIdx.x / across, channel = threadIdx.x % across * kChunk<T>;
    count = row >= rows ? 0 : channels - channel < kChunk<T> ? static_cast<int>(channels - channel) : kChunk<T>;
  }
};

// exp(-x) / (1 + exp(-x)) for x >= 0. kFast: by the device's own functions, whose errors a 16-bit result does not show.
template <bool kFast>
__device__ inline float small_sigmoid(float x) {
  if constexpr (kFast) {
    const float e = __expf(-x);
    return __fdividef(e, 1.0f + e);
  }
  const float e = expf(-x);
  return e / (1.0f + e);
}

// What becomes of a channel's values: silu((x + add - center) * factor + offset).
template <typename T>
struct Affine {
  float add = 0.0f, center = 0.0f, factor = 0.0f, offset = 0.0f;

  __device__ float operator()(float x, bool silu) const {
    const float y = fmaf((x + add) - center, factor, offset);
    if (!silu) return y;
    // y * sigmoid(y), from the smaller of sigmoid(y) and 1 - sigmoid(y): for positive y one rounding is left
    const float small = small_sigmoid<sizeof(T) == 2>(fabsf(y));
    return y < 0.0f ? y * small : small > 0.0f ? fmaf(-y, small, y) : y;
  }
};

// (xhat * weight + bias) * (1 + scale) + shift
template <typename T>
__device__ inline Affine<T> affine_of(const GroupNorm& k, int64_t n, unsigned channel) {
  const float* stats = k.stats + (n * k.groups + channel / k.per_group) * 4;
  const auto given = [&](const Tokens& p, float otherwise) { return p.data ? parameter<T>(p, n, channel) : otherwise; };
  const float factor = stats[2] * given(k.weight, 1.0f), scale = 1.0f + given(k.scale, 0.0f);
  return {given(k.add, 0.0f), stats[0], factor * scale, (stats[1] * factor + given(k.bias, 0.0f)) * scale + given(k.shift, 0.0f)};
}

// Of SiLU's gradient: the distance of a channel's value from the mean, and dh = grad * silu'(h).
template <typename T>
struct Distance {
  float d, dh;
  __device__ Distance(const Affine<T>& affine, float x, float grad, bool silu) : d((x + affine.add) - affine.center), dh(grad) {
    if (!silu) return;
    // sigmoid(h) * (1 + h * (1 - sigmoid(h))), from the smaller of both
    const float h = fmaf(d, affine.factor, affine.offset), small = small_sigmoid<sizeof(T) == 2>(fabsf(h)), large = 1.0f - small;
    dh *= (h < 0.0f ? small : large) * fmaf(h, h < 0.0f ? large : small, 1.0f);
  }
};

}  // namespace fusewire::cuda
