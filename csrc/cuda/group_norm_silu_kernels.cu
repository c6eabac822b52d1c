// GroupNorm with SiLU on CUDA: the norm, from the statistics of group_norm_stats_kernels.cu.
#include "cuda/group_norm_rows.h"

namespace fusewire::cuda {

constexpr unsigned kFewParts = 16;  // of a group, which every block of the norm puts together for itself; of more a kernel of its own does it once

template <typename T, bool kFew>
__device__ inline Stats stats_of(const GroupNorm& k, int64_t n, unsigned g) {
  if constexpr (kFew) return stats_of_parts<T, true>(k, n, g);
  return stored_stats(k, n, g);
}

template <typename T>
__device__ inline void activate(float (&r)[kChunk<T>], bool silu) {
  if (!silu) return;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) r[i] = Affine<T>::silu(r[i]);
}

// A block: a tile of a channel of a contiguous picture. The last tiles come first: what the statistics read last may still be in the cache.
template <typename T, bool kFew>
__global__ void __launch_bounds__(kBlock, kFew ? 3 : 4) group_norm_apply_plane_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  const unsigned chunks = k.pixels / N, blocks = (chunks + kTile - 1) / kTile, i_block = gridDim.x - 1 - blockIdx.x;
  const unsigned channel = i_block / blocks % k.channels, first = i_block % blocks * kTile + threadIdx.x;
  const int64_t n = i_block / blocks / k.channels, plane = static_cast<int64_t>(channel) * k.pixels;
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + plane);
  T* out = static_cast<T*>(k.out) + (n * k.channels * k.pixels + plane);
  uint4 bits[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (first + step * kBlock < chunks) bits[step] = load_bits(x + static_cast<int64_t>(first + step * kBlock) * N, N, true);
  }
  const Given<T> given(k, n, channel);
  const Affine<T> affine = affine_of<T>(given, stats_of<T, kFew>(k, n, channel / k.per_group));
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (first + step * kBlock >= chunks) break;
    float r[N];
    widen_bits<T>(bits[step], r);
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] = affine(r[i]);
    activate<T>(r, k.silu);
    store_vector(out + static_cast<int64_t>(first + step * kBlock) * N, r);
  }
}

// A block: a tile of a group of a contiguous picture, whose channels may be shorter than a chunk.
template <typename T, bool kFew>
__global__ void __launch_bounds__(kBlock, 1) group_norm_apply_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  const unsigned size = k.per_group * k.pixels, chunks = (size + N - 1) / N, blocks = (chunks + kTile - 1) / kTile;
  const unsigned i_group = blockIdx.x / blocks, g = i_group % k.groups;
  const int64_t n = i_group / k.groups;
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + static_cast<int64_t>(g) * size);
  T* out = static_cast<T*>(k.out) + static_cast<int64_t>(i_group) * size;
  const unsigned first = blockIdx.x % blocks * kTile;
  const auto chunk_of = [&](int step) { return (first + step * kBlock + threadIdx.x) * N; };  // where a chunk begins
  const auto count_of = [&](unsigned e) { return e >= size ? 0 : size - e < N ? static_cast<int>(size - e) : N; };
  uint4 bits[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) bits[step] = load_bits(x + chunk_of(step), count_of(chunk_of(step)), k.vector);
  const Stats stats = stats_of<T, kFew>(k, n, g);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned e = chunk_of(step);
    const int count = count_of(e);
    if (count == 0) return;
    float r[N];
    widen_bits<T>(bits[step], r);
    unsigned channel = e / k.pixels, ends = (channel + 1) * k.pixels;  // the first element of the next channel
    Affine<T> affine = affine_of<T>(k, n, g * k.per_group + channel, stats);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= count) break;
      if (e + i == ends) {
        ++channel, ends += k.pixels;
        affine = affine_of<T>(k, n, g * k.per_group + channel, stats);
      }
      r[i] = affine(r[i]);
    }
    activate<T>(r, k.silu);
    store_chunk(out + e, 1, count, k.vector, r);
  }
}

// A block: some pixels of a channels-last picture, kSteps at a time of each thread.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) group_norm_apply_last_kernel(const __grid_constant__ GroupNorm k) {
  constexpr int N = kChunk<T>;
  const Columns<T> at(k.channels);
  if (at.count == 0) return;
  const unsigned tile = at.rows * kSteps, each = tile * k.repeat, blocks = (k.pixels + each - 1) / each, i_block = gridDim.x - 1 - blockIdx.x;
  const int64_t n = i_block / blocks;
  const unsigned begin = i_block % blocks * each, end = begin + each < k.pixels ? begin + each : k.pixels;
  Affine<T> affine[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < at.count) affine[i] = affine_of<T>(k, n, at.channel + i);
  }
  const T* x = static_cast<const T*>(k.x) + (n * k.x_batch + at.channel);
  T* out = static_cast<T*>(k.out) + (n * k.pixels * k.channels + at.channel);
  for (unsigned first = begin + at.row; first < end; first += tile) {
    uint4 bits[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned p = first + step * at.rows;
      bits[step] = load_bits(x + static_cast<int64_t>(p) * k.channels, p < end ? at.count : 0, k.vector);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned p = first + step * at.rows;
      if (p >= end) break;
      float r[N];
      widen_bits<T>(bits[step], r);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < at.count) r[i] = affine[i](r[i]);
      }
      activate<T>(r, k.silu);
      store_chunk(out + static_cast<int64_t>(p) * k.channels, 1, at.count, k.vector, r);
    }
  }
}

template <typename T, int kThreads>
static const char* launch_last(const GroupNorm& task, void* stream) {
  GroupNorm k = task;
  // What a thread has to know of its channels takes as long as a tile: several tiles a block, as long as there are blocks for a large GPU
  const int64_t tiles = ceil_div(k.pixels, kThreads / ceil_div(k.channels, kChunk<T>) * kSteps);
  k.repeat = tiles < 1024 ? 1 : tiles < 8 * 512 ? static_cast<unsigned>(tiles / 512) : 8;
  return launch(group_norm_apply_last_kernel<T, kThreads>, k.batch * ceil_div(tiles, k.repeat), dim3(kThreads), stream, k);
}

template <typename T, bool kFew>
static const char* launch_contiguous(const GroupNorm& k, void* stream) {
  const int64_t chunks = k.pixels / kChunk<T>;
  if (k.vector && k.pixels % kChunk<T> == 0 && chunks >= kBlock) {
    return launch(group_norm_apply_plane_kernel<T, kFew>, k.batch * k.channels * ceil_div(chunks, kTile), dim3(kBlock), stream, k);
  }
  const int64_t tiles = ceil_div(ceil_div(static_cast<int64_t>(k.per_group) * k.pixels, kChunk<T>), kTile);
  return launch(group_norm_apply_kernel<T, kFew>, k.batch * k.groups * tiles, dim3(kBlock), stream, k);
}

template <typename T>
static const char* launch_apply(const GroupNorm& k, bool few, void* stream) {
  if (k.channels_last) return (k.channels <= kBlock * kChunk<T> ? launch_last<T, kBlock> : launch_last<T, kLargeBlock>)(k, stream);
  return (few ? launch_contiguous<T, true> : launch_contiguous<T, false>)(k, stream);
}

const char* launch_group_norm(const GroupNorm& task, Type type, void* stream) {
  const bool few = !task.channels_last && task.part_count <= kFewParts;
  if (const char* error = (few ? launch_group_norm_parts : launch_group_norm_stats)(task, type, stream)) return error;
  FUSEWIRE_CUDA_SWITCH(type, { return launch_apply<T>(task, few, stream); })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
