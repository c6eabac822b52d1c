// What the group-norm kernels share: a channel's parameters, how threads share channels-last pixels, norm and SiLU. Included by *_kernels.cu alone.
#pragma once
#include "cuda/device.h"
#include "cuda/group_norm_silu.h"

namespace fusewire::cuda {

constexpr int kBlock = 256, kLargeBlock = kMaxBytesLast / 16;  // threads; the large one where a pixel has more chunks
constexpr int kSteps = 4;  // chunks (contiguous pictures) or pixels (channels-last ones) of a thread whose loads are on their way at a time
constexpr unsigned kTile = kSteps * kBlock;  // chunks

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

// x / (1 + exp(-x)) for a 16-bit result, which shows neither the errors of the device's own functions nor what they flush to zero.
__device__ inline float fast_silu(float x) {
#if defined(FUSEWIRE_CUDA_ON_CPU)
  return x / (1.0f + __expf(-x));
#else
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return x * r;
#endif
}

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

  __device__ float operator()(float x) const { return fmaf((x + add) - center, factor, offset); }

  __device__ static float silu(float y) {
    if constexpr (sizeof(T) == 2) return fast_silu(y);
    // y * sigmoid(y), from the smaller of sigmoid(y) and 1 - sigmoid(y): for positive y one rounding is left
    const float small = small_sigmoid<false>(fabsf(y));
    return y < 0.0f ? y * small : small > 0.0f ? fmaf(-y, small, y) : y;
  }
};

// The first value of a group, from which its means are measured.
template <typename T>
__device__ inline float first_value(const GroupNorm& k, int64_t n, unsigned g) {
  const int64_t c = static_cast<int64_t>(g) * k.per_group;
  const float x = widen(static_cast<const T*>(k.x)[n * k.x_batch + c * (k.channels_last ? 1 : k.pixels)]);
  return k.add.data ? x + parameter<T>(k.add, n, c) : x;
}

// Of a group: the mean, what is to be added to a distance from it as it is no float, and 1 / sqrt(variance + eps).
struct Stats {
  float center, rest, rstd;
};

// A group's statistics from its parts, for every thread of the block. In float64, which has room for what the distances from the first value cancel, and
// so by few threads: it is slow on many GPUs. kFew: by one warp.
template <typename T, bool kFew>
__device__ inline Stats stats_of_parts(const GroupNorm& k, int64_t n, unsigned g) {
  constexpr int kThreads = kFew ? kWarp : kBlock;
  __shared__ double warps[2][kWarp];
  __shared__ Stats found;
  const float* parts = k.parts + (n * k.groups + g) * k.part_count * 4;
  if (threadIdx.x < kThreads) {
    double sum = 0.0, squares = 0.0;
    for (unsigned i = threadIdx.x; i < k.part_count; i += kThreads) {
      const double mean = parts[i * 4 + 1], weighted = parts[i * 4] * mean;
      sum += weighted;
      squares += parts[i * 4 + 2] + weighted * mean;
    }
    sum = lane_sum(sum), squares = lane_sum(squares);
    if (threadIdx.x % kWarp == 0) warps[0][threadIdx.x / kWarp] = sum, warps[1][threadIdx.x / kWarp] = squares;
  }
  if constexpr (!kFew) __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0.0, squares = 0.0;
    for (int w = 0; w < kThreads / kWarp; ++w) sum += warps[0][w], squares += warps[1][w];
    const double size = static_cast<double>(k.per_group) * k.pixels, mean = sum / size, variance = squares / size - mean * mean;
    const double center = first_value<T>(k, n, g) + mean;
    const float nearest = static_cast<float>(center);
    // (a variance that is NaN stays so)
    found = {nearest, static_cast<float>(nearest - center), static_cast<float>(1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + k.eps))};
  }
  __syncthreads();
  return found;
}

__device__ inline Stats stored_stats(const GroupNorm& k, int64_t n, unsigned g) {
  const float* stats = k.stats + (n * k.groups + g) * 4;
  return {stats[0], stats[1], stats[2]};
}

// What is given for a channel: read before a barrier, it is on its way while the block waits.
template <typename T>
struct Given {
  float add, weight, bias, scale, shift;
  __device__ Given(const GroupNorm& k, int64_t n, unsigned channel) {
    const auto of = [&](const Tokens& p, float otherwise) { return p.data ? parameter<T>(p, n, channel) : otherwise; };
    add = of(k.add, 0.0f), weight = of(k.weight, 1.0f), bias = of(k.bias, 0.0f), scale = 1.0f + of(k.scale, 0.0f), shift = of(k.shift, 0.0f);
  }
};

// (xhat * weight + bias) * (1 + scale) + shift
template <typename T>
__device__ inline Affine<T> affine_of(const Given<T>& given, const Stats& stats) {
  const float factor = stats.rstd * given.weight;
  return {given.add, stats.center, factor * given.scale, (stats.rest * factor + given.bias) * given.scale + given.shift};
}

template <typename T>
__device__ inline Affine<T> affine_of(const GroupNorm& k, int64_t n, unsigned channel, const Stats& stats) {
  return affine_of<T>(Given<T>(k, n, channel), stats);
}

template <typename T>
__device__ inline Affine<T> affine_of(const GroupNorm& k, int64_t n, unsigned channel) {
  return affine_of<T>(k, n, channel, stored_stats(k, n, channel / k.per_group));
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
