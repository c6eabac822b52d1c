// GroupNorm with SiLU on CUDA: the norm, from the statistics of group_norm_stats_kernels.cu.
#include "cuda/group_norm_rows.h"

namespace fusewire::cuda {

constexpr int kSteps = 4;  // chunks (contiguous pictures) or pixels (channels-last ones) of a thread

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
  const int64_t pixels = kThreads / ceil_div(k.channels, kChunk<T>) * kSteps;
  return launch(group_norm_apply_last_kernel<T, kThreads>, k.batch * ceil_div(k.pixels, pixels), dim3(kThreads), stream, k);
}

template <typename T>
static const char* launch_apply(const GroupNorm& k, void* stream) {
  if (k.channels_last) return (k.channels <= kBlock * kChunk<T> ? launch_last<T, kBlock> : launch_last<T, kLargeBlock>)(k, stream);
  const int64_t chunks = ceil_div(static_cast<int64_t>(k.per_group) * k.pixels, kChunk<T>);
  return launch(group_norm_apply_kernel<T>, k.batch * k.groups * ceil_div(chunks, kSteps * kBlock), dim3(kBlock), stream, k);
}

const char* launch_group_norm(const GroupNorm& task, Type type, void* stream) {
  if (const char* error = launch_group_norm_stats(task, type, stream)) return error;
  FUSEWIRE_CUDA_SWITCH(type, { return launch_apply<T>(task, stream); })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
