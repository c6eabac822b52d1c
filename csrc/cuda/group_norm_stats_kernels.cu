// The statistics of group norms on CUDA: of parts of the groups, then of the groups. No atomics: the same bits every time.
//
// Means are distances from the group's first value, so that a large mean costs no bits, and squares are taken about the part's mean: a part is read
// twice, the second time from a cache.
#include "cuda/group_norm_rows.h"

namespace fusewire::cuda {

constexpr int kSteps = 4;  // chunks of a thread whose loads are on their way at a time

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

template <typename T>
static const char* launch_stats(const GroupNorm& k, void* stream) {
  const char* error;
  if (!k.channels_last) {
    error = launch(group_norm_parts_kernel<T>, k.batch * k.groups * k.part_count, dim3(kBlock), stream, k);
  } else if (k.channels <= kBlock * kChunk<T>) {
    error = launch(group_norm_parts_last_kernel<T, kBlock>, k.batch * k.part_count, dim3(kBlock), stream, k);
  } else {
    error = launch(group_norm_parts_last_kernel<T, kLargeBlock>, k.batch * k.part_count, dim3(kLargeBlock), stream, k);
  }
  return error ? error : launch(group_norm_stats_kernel<T>, k.batch * k.groups, dim3(kBlock), stream, k);
}

const char* launch_group_norm_stats(const GroupNorm& task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, { return launch_stats<T>(task, stream); })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
