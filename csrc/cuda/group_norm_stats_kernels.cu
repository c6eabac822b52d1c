// The statistics of group norms on CUDA: of parts of the groups, then of the groups. No atomics: the same bits every time.
//
// Means are distances from the group's first value, so that a large mean costs no bits. Squares are taken about the mean of the part's first tile, which
// stays in registers; that the part's mean is another one is mended at the end. A part has few tiles: were the tiles' means far apart, so would be the
// values, and what the mending loses is little beside their squares.
#include "cuda/group_norm_rows.h"

namespace fusewire::cuda {

// A distance from a mean that is `from` and a little more.
struct Mean {
  float center, rest;
  __device__ Mean(float from, float mean) : center(from + mean), rest((center - from) - mean) {}
  __device__ float away(float x) const { return (x - center) + rest; }
};

// A block: a part of a group of a contiguous picture, a run of memory.
template <typename T>
__global__ void __launch_bounds__(kBlock, 3) group_norm_parts_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  __shared__ float warps[3][kWarp];
  const unsigned i_part = blockIdx.x % k.part_count, i_group = blockIdx.x / k.part_count, g = i_group % k.groups;
  const int64_t n = i_group / k.groups;
  const unsigned size = k.per_group * k.pixels, chunks = (size + N - 1) / N, mine = (chunks + k.part_count - 1) / k.part_count;
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + static_cast<int64_t>(g) * size);
  const unsigned begin = i_part * mine, end = begin + mine < chunks ? begin + mine : chunks;
  const auto count_to = [&](unsigned last) {  // values of the chunks [begin, last)
    return static_cast<float>(begin >= last ? 0 : last * N < size ? (last - begin) * N : size - begin * N);
  };
  uint4 bits[kSteps];
  const auto values_of = [&](unsigned j) { return j >= end ? 0 : size - j * N < N ? static_cast<int>(size - j * N) : N; };
  const auto load_tile = [&](unsigned first) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned j = first + step * kBlock + threadIdx.x;
      bits[step] = load_bits(x + static_cast<int64_t>(j) * N, values_of(j), k.vector);
    }
  };
  const auto for_tile = [&](unsigned first, auto take) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned j = first + step * kBlock + threadIdx.x, e = j * N;
      const int values = values_of(j);
      float r[N];
      widen_bits<T>(bits[step], r);
      if (k.add.data && values > 0) {
        unsigned channel = e / k.pixels, ends = (channel + 1) * k.pixels;  // the first element of the next channel
        const auto added = [&] { return parameter<T>(k.add, n, static_cast<int64_t>(g) * k.per_group + channel); };
        float add = added();
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i >= values) break;
          if (e + i == ends) ++channel, ends += k.pixels, add = added();
          r[i] += add;
        }
      }
      if (values == N) {
#pragma unroll
        for (int i = 0; i < N; ++i) take(r[i]);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i < values) take(r[i]);
        }
      }
    }
  };

  const float from = first_value<T>(k, n, g);
  float sum = 0.0f, squares = 0.0f;
  load_tile(begin);
  for_tile(begin, [&](float v) { sum += v - from; });
  const float mean = row_sum(sum, warps[0]) / fmaxf(count_to(begin + kTile < end ? begin + kTile : end), 1.0f);
  const Mean about(from, mean);
  sum = 0.0f;
  const auto take_tile = [&](unsigned first) {
    for_tile(first, [&](float v) {
      const float d = about.away(v);
      sum += d;
      squares += d * d;
    });
  };
  take_tile(begin);
  for (unsigned first = begin + kTile; first < end; first += kTile) {
    load_tile(first);
    take_tile(first);
  }
  sum = row_sum(sum, warps[1]);
  squares = row_sum(squares, warps[2]);
  if (threadIdx.x == 0) {
    float* part = k.parts + static_cast<int64_t>(blockIdx.x) * 4;
    const float count = count_to(end), more = sum / fmaxf(count, 1.0f);
    part[0] = count, part[1] = mean + more, part[2] = fmaxf(squares - sum * more, 0.0f);
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
  const Columns<T> at(k.channels);
  const unsigned tile = at.rows * kSteps;
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + at.channel);
  const auto part_of = [&](unsigned g) { return k.parts + ((n * k.groups + g) * k.part_count + i_part) * 4; };
  const auto count_to = [&](unsigned last) { return static_cast<float>(k.per_group) * static_cast<float>(last - begin); };  // values of a group

  float add[N] = {}, center[N] = {}, rest[N] = {}, sum[N], squares[N];
  uint4 bits[kSteps];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < at.count && k.add.data) add[i] = parameter<T>(k.add, n, at.channel + i);
    if (i < at.count) center[i] = first_value<T>(k, n, (at.channel + i) / k.per_group);
    sum[i] = squares[i] = 0.0f;
  }
  const auto load_tile = [&](unsigned first) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned p = first + step * at.rows + at.row;
      bits[step] = load_bits(x + static_cast<int64_t>(p) * k.channels, p < end ? at.count : 0, k.vector);
    }
  };
  // Of each channel's distances from its group's center, and of their squares
  const auto sum_tile = [&](unsigned first) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (first + step * at.rows + at.row >= end) continue;
      float r[N];
      widen_bits<T>(bits[step], r);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float d = ((k.add.data ? r[i] + add[i] : r[i]) - center[i]) + rest[i];
        sum[i] += d;
        squares[i] += d * d;
      }
    }
  };
  // Over the rows of threads, then over a group's channels, one after the other and so in float64; calls take(part, total). Everybody comes here.
  // (`values` is no reference to an array: the compiler of nvcc 13.0 crashes on that.)
  const auto for_groups = [&](const float* values, auto take) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < at.count) shared[at.row * k.channels + at.channel + i] = values[i];
    }
    __syncthreads();
    for (unsigned c = threadIdx.x; c < k.channels; c += kThreads) {
      double total = 0.0;
      for (unsigned row = 0; row < at.rows; ++row) total += shared[row * k.channels + c];
      shared[c] = static_cast<float>(total);
    }
    __syncthreads();
    for (unsigned g = threadIdx.x; g < k.groups; g += kThreads) {
      double total = 0.0;
      for (unsigned c = g * k.per_group; c < (g + 1) * k.per_group; ++c) total += shared[c];
      take(part_of(g), static_cast<float>(total));
    }
  };

  const float in_tile = fmaxf(count_to(begin + tile < end ? begin + tile : end), 1.0f), count = count_to(end);
  load_tile(begin);
  sum_tile(begin);
  for_groups(sum, [&](float* part, float total) { part[0] = count, part[1] = total / in_tile; });
  __syncthreads();  // the means are written
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum[i] = squares[i] = 0.0f;
    if (i >= at.count) continue;
    const Mean about(center[i], part_of((at.channel + i) / k.per_group)[1]);
    center[i] = about.center, rest[i] = about.rest;
  }
  sum_tile(begin);
  for (unsigned first = begin + tile; first < end; first += tile) {
    load_tile(first);
    sum_tile(first);
  }
  for_groups(squares, [&](float* part, float total) { part[2] = total; });
  for_groups(sum, [&](float* part, float total) {
    const float more = total / fmaxf(count, 1.0f);
    part[1] += more, part[2] = fmaxf(part[2] - total * more, 0.0f);
  });
}

// A block: a group, from its parts.
template <typename T>
__global__ void __launch_bounds__(kBlock, 1) group_norm_stats_kernel(const __grid_constant__ GroupNorm k) {
  const Stats found = stats_of_parts<T, false>(k, blockIdx.x / k.groups, blockIdx.x % k.groups);
  if (threadIdx.x == 0) {
    float* stats = k.stats + static_cast<int64_t>(blockIdx.x) * 4;
    stats[0] = found.center, stats[1] = found.rest, stats[2] = found.rstd;
  }
}

template <typename T>
static const char* launch_parts(const GroupNorm& k, void* stream) {
  if (!k.channels_last) return launch(group_norm_parts_kernel<T>, k.batch * k.groups * k.part_count, dim3(kBlock), stream, k);
  if (k.channels <= kBlock * kChunk<T>) return launch(group_norm_parts_last_kernel<T, kBlock>, k.batch * k.part_count, dim3(kBlock), stream, k);
  return launch(group_norm_parts_last_kernel<T, kLargeBlock>, k.batch * k.part_count, dim3(kLargeBlock), stream, k);
}

const char* launch_group_norm_parts(const GroupNorm& task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, { return launch_parts<T>(task, stream); })
  return "unknown dtype";
}

const char* launch_group_norm_stats(const GroupNorm& task, Type type, void* stream) {
  if (const char* error = launch_group_norm_parts(task, type, stream)) return error;
  FUSEWIRE_CUDA_SWITCH(type, { return launch(group_norm_stats_kernel<T>, task.batch * task.groups, dim3(kBlock), stream, task); })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
