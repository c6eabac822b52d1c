// GroupNorm with SiLU on CUDA: statistics of parts of the groups, of the groups, and the norm. No atomics: the same bits every time.
//
// Means are distances from the group's first value, so that a large mean costs no bits, and squares are taken about the part's mean: a part is read
// twice, the second time from a cache.
#include "cuda/group_norm_silu.h"

#include "cuda/device.h"

namespace fusewire::cuda {

constexpr int kBlock = 256, kLargeBlock = kMaxBytesLast / 16;  // threads; the large one where a pixel has more chunks
constexpr int kSteps = 4;    // chunks (contiguous pictures) or pixels (channels-last ones) of a thread that applies the norm

template <typename T>
__device__ inline float parameter(const Tokens& p, int64_t n, int64_t c) {
  return widen(static_cast<const T*>(p.data)[n * p.batch + c * p.channel]);
}

// The first value of a group.
template <typename T>
__device__ inline float first_value(const GroupNorm& k, int64_t n, unsigned g) {
  const int64_t c = static_cast<int64_t>(g) * k.per_group;
  const float x = widen(static_cast<const T*>(k.x)[n * k.x_batch + c * (k.channels_last ? 1 : k.pixels)]);
  return k.add.data ? x + parameter<T>(k.add, n, c) : x;
}

// A distance from a mean that is `from` and a little more.
struct Mean {
  float center, rest;
  __device__ Mean(float from, float mean) : center(from + mean), rest((center - from) - mean) {}
  __device__ float away(float x) const { return (x - center) + rest; }
};

// A block: a part of a group of a contiguous picture, a run of memory.
template <typename T>
__global__ void __launch_bounds__(kBlock, 1) group_norm_parts_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  __shared__ float warps[3][kWarp];
  const unsigned i_part = blockIdx.x % k.part_count, i_group = blockIdx.x / k.part_count, g = i_group % k.groups;
  const int64_t n = i_group / k.groups;
  const unsigned size = k.per_group * k.pixels, chunks = (size + N - 1) / N, mine = (chunks + k.part_count - 1) / k.part_count;
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + static_cast<int64_t>(g) * size);
  const unsigned begin = i_part * mine, end = begin + mine < chunks ? begin + mine : chunks;
  const float count = static_cast<float>(begin >= end ? 0 : end * N < size ? end * N - begin * N : size - begin * N);
  const auto take_chunk = [&](unsigned e, int values, const float* r, auto take) {
    if (!k.add.data) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < values) take(r[i]);
      }
      return;
    }
    unsigned channel = e / k.pixels, ends = (channel + 1) * k.pixels;  // the first element of the next channel
    const auto added = [&] { return parameter<T>(k.add, n, static_cast<int64_t>(g) * k.per_group + channel); };
    float add = added();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= values) break;
      if (e + i == ends) ++channel, ends += k.pixels, add = added();
      take(r[i] + add);
    }
  };
  const auto for_values = [&](auto take) {
    unsigned j = begin + threadIdx.x;
    if (k.vector) {  // several loads on their way at a time
      const unsigned whole = size / N < end ? size / N : end;
      for (; j + (kSteps - 1) * kBlock < whole; j += kSteps * kBlock) {
        float r[kSteps][N];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) load_vector(x + (j + step * kBlock) * N, r[step]);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) take_chunk((j + step * kBlock) * N, N, r[step], take);
      }
    }
    for (; j < end; j += kBlock) {
      const unsigned e = j * N;
      const int values = size - e < N ? static_cast<int>(size - e) : N;
      float r[N];
      load_chunk(x + e, 1, values, k.vector, r);
      take_chunk(e, values, r, take);
    }
  };

  const float from = first_value<T>(k, n, g);
  float sum = 0.0f, squares = 0.0f;
  for_values([&](float v) { sum += v - from; });
  const float mean = row_sum(sum, warps[0]) / fmaxf(count, 1.0f);
  const Mean about(from, mean);
  sum = 0.0f;
  for_values([&](float v) {
    const float d = about.away(v);
    sum += d;  // what the first sum lost
    squares += d * d;
  });
  sum = row_sum(sum, warps[1]);
  squares = row_sum(squares, warps[2]);
  if (threadIdx.x == 0) {
    float* part = k.parts + static_cast<int64_t>(blockIdx.x) * 4;
    part[0] = count, part[1] = mean + sum / fmaxf(count, 1.0f), part[2] = squares;
  }
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

// A block: some pixels of a channels-last picture, all groups. Each thread sums its channels over its pixels; then one thread a group puts its
// channels together.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) group_norm_parts_last_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  __shared__ float shared[kThreads * N];  // [rows, C]
  const unsigned i_part = blockIdx.x % k.part_count, mine = (k.pixels + k.part_count - 1) / k.part_count;
  const int64_t n = blockIdx.x / k.part_count;
  const unsigned begin = i_part * mine < k.pixels ? i_part * mine : k.pixels, end = begin + mine < k.pixels ? begin + mine : k.pixels;
  const float count = static_cast<float>(k.per_group) * static_cast<float>(end - begin);
  const Columns<T> at(k.channels);
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + at.channel);
  const auto part_of = [&](unsigned g) { return k.parts + ((n * k.groups + g) * k.part_count + i_part) * 4; };

  float add[N] = {}, center[N] = {}, rest[N] = {}, sum[N], squares[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < at.count && k.add.data) add[i] = parameter<T>(k.add, n, at.channel + i);
    if (i < at.count) center[i] = first_value<T>(k, n, (at.channel + i) / k.per_group);
  }
  // Of each channel's distances from its group's center, and of their squares
  const auto sum_pixels = [&] {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = squares[i] = 0.0f;
    for (unsigned p = begin + at.row; at.count > 0 && p < end; p += at.rows) {
      float r[N];
      load_chunk(x + static_cast<int64_t>(p) * k.channels, 1, at.count, k.vector, r);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float d = ((k.add.data ? r[i] + add[i] : r[i]) - center[i]) + rest[i];
        sum[i] += d;
        squares[i] += d * d;
      }
    }
  };
  // Over a group's channels and the rows of threads, one after the other and so in float64; calls take(part, total). Everybody comes here.
  // (`values` is no reference to an array: the compiler of nvcc 13.0 crashes on that.)
  const auto for_groups = [&](const float* values, auto take) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < at.count) shared[at.row * k.channels + at.channel + i] = values[i];
    }
    __syncthreads();
    for (unsigned g = threadIdx.x; g < k.groups; g += kThreads) {
      double total = 0.0;
      for (unsigned row = 0; row < at.rows; ++row) {
        for (unsigned c = g * k.per_group; c < (g + 1) * k.per_group; ++c) total += shared[row * k.channels + c];
      }
      take(part_of(g), static_cast<float>(total));
    }
  };

  const float divisor = fmaxf(count, 1.0f);
  sum_pixels();
  for_groups(sum, [&](float* part, float total) { part[0] = count, part[1] = total / divisor; });
  __syncthreads();  // the means are written
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= at.count) break;
    const Mean about(center[i], part_of((at.channel + i) / k.per_group)[1]);
    center[i] = about.center, rest[i] = about.rest;
  }
  sum_pixels();
  for_groups(sum, [&](float* part, float total) { part[1] += total / divisor; });  // what the first sum lost
  for_groups(squares, [&](float* part, float total) { part[2] = total; });
}

// A block: a group, from its parts. In float64: they are few.
template <typename T>
__global__ void __launch_bounds__(kBlock, 1) group_norm_stats_kernel(const __grid_constant__ GroupNorm k) {
  __shared__ double warps[2][kWarp];
  const float* parts = k.parts + static_cast<int64_t>(blockIdx.x) * k.part_count * 4;
  const double size = static_cast<double>(k.per_group) * k.pixels;
  double sum = 0.0, squares = 0.0;
  for (unsigned i = threadIdx.x; i < k.part_count; i += kBlock) sum += static_cast<double>(parts[i * 4]) * parts[i * 4 + 1];
  const double mean = row_sum(sum, warps[0]) / size;
  for (unsigned i = threadIdx.x; i < k.part_count; i += kBlock) {
    const double away = parts[i * 4 + 1] - mean;
    squares += parts[i * 4 + 2] + parts[i * 4] * (away * away);
  }
  const double variance = row_sum(squares, warps[1]) / size;
  if (threadIdx.x == 0) {
    const double center = first_value<T>(k, blockIdx.x / k.groups, blockIdx.x % k.groups) + mean;
    float* stats = k.stats + static_cast<int64_t>(blockIdx.x) * 4;
    stats[0] = static_cast<float>(center), stats[1] = static_cast<float>(stats[0] - center);
    stats[2] = static_cast<float>(1.0 / sqrt(variance + k.eps));
  }
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

// A block: kSteps * kBlock chunks of a group of a contiguous picture.
template <typename T>
__global__ void __launch_bounds__(kBlock, 1) group_norm_apply_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  const unsigned size = k.per_group * k.pixels, chunks = (size + N - 1) / N, blocks = (chunks + kSteps * kBlock - 1) / (kSteps * kBlock);
  const unsigned i_group = blockIdx.x / blocks, g = i_group % k.groups;
  const int64_t n = i_group / k.groups;
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + static_cast<int64_t>(g) * size);
  T* out = static_cast<T*>(k.out) + static_cast<int64_t>(i_group) * size;
  const unsigned first = blockIdx.x % blocks * kSteps * kBlock;
  const auto chunk_of = [&](int step) { return (first + step * kBlock + threadIdx.x) * N; };  // where a chunk begins
  const auto count_of = [&](unsigned e) { return e >= size ? 0 : size - e < N ? static_cast<int>(size - e) : N; };
  float r[kSteps][N];
  if (k.vector && (first + kSteps * kBlock) * N <= size) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_vector(x + chunk_of(step), r[step]);
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_chunk(x + chunk_of(step), 1, count_of(chunk_of(step)), k.vector, r[step]);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned e = chunk_of(step);
    const int count = count_of(e);
    if (count == 0) return;
    unsigned channel = e / k.pixels, ends = (channel + 1) * k.pixels;  // the first element of the next channel
    Affine<T> affine = affine_of<T>(k, n, g * k.per_group + channel);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) break;
      if (e + i == ends) {
        ++channel, ends += k.pixels;
        affine = affine_of<T>(k, n, g * k.per_group + channel);
      }
      r[step][i] = affine(r[step][i], k.silu);
    }
    store_chunk(out + e, 1, count, k.vector, r[step]);
  }
}

// A block: some pixels of a channels-last picture, kSteps of each thread.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) group_norm_apply_last_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  const Columns<T> at(k.channels);
  if (at.count == 0) return;
  const unsigned each = at.rows * kSteps, blocks = (k.pixels + each - 1) / each;
  const int64_t n = blockIdx.x / blocks;
  Affine<T> affine[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < at.count) affine[i] = affine_of<T>(k, n, at.channel + i);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned p = blockIdx.x % blocks * each + step * at.rows + at.row;
    if (p >= k.pixels) return;
    const int64_t pixel = static_cast<int64_t>(p) * k.channels + at.channel;
    float r[N];
    load_chunk(static_cast<const T*>(k.x) + (n * k.x_batch + pixel), 1, at.count, k.vector, r);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < at.count) r[i] = affine[i](r[i], k.silu);
    }
    store_chunk(static_cast<T*>(k.out) + (n * k.pixels * k.channels + pixel), 1, at.count, k.vector, r);
  }
}

template <typename T, int kThreads>
static const char* launch_last(const GroupNorm& k, void* stream) {
  if (const char* error = launch(group_norm_parts_last_kernel<T, kThreads>, k.batch * k.part_count, dim3(kThreads), stream, k)) return error;
  if (const char* error = launch(group_norm_stats_kernel<T>, k.batch * k.groups, dim3(kBlock), stream, k)) return error;
  const int64_t pixels = kThreads / ceil_div(k.channels, kChunk<T>) * kSteps;
  return launch(group_norm_apply_last_kernel<T, kThreads>, k.batch * ceil_div(k.pixels, pixels), dim3(kThreads), stream, k);
}

template <typename T>
static const char* launch_planes(const GroupNorm& k, void* stream) {
  const int64_t groups = k.batch * k.groups, chunks = ceil_div(static_cast<int64_t>(k.per_group) * k.pixels, kChunk<T>);
  if (const char* error = launch(group_norm_parts_kernel<T>, groups * k.part_count, dim3(kBlock), stream, k)) return error;
  if (const char* error = launch(group_norm_stats_kernel<T>, groups, dim3(kBlock), stream, k)) return error;
  return launch(group_norm_apply_kernel<T>, groups * ceil_div(chunks, kSteps * kBlock), dim3(kBlock), stream, k);
}

const char* launch_group_norm(const GroupNorm& task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, {
    if (!task.channels_last) return launch_planes<T>(task, stream);
    if (task.channels <= kBlock * kChunk<T>) return launch_last<T, kBlock>(task, stream);
    return launch_last<T, kLargeBlock>(task, stream);
  })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
