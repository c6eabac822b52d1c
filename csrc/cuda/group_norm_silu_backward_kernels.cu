// The gradients of GroupNorm with SiLU on CUDA: sums over parts of each channel's pixels, what follows from them, and dx.
//
// Both passes over the picture recompute the norm from the statistics of group_norm_stats_kernels.cu. No atomics: the same bits every time.
#include "cuda/group_norm_silu_backward.h"

#include "cuda/column_sums.h"
#include "cuda/group_norm_rows.h"

namespace fusewire::cuda {

constexpr int kSums = GroupNormGradient::kSums, kCoefficients = GroupNormGradient::kCoefficients;
constexpr int kPairs = 2;      // chunks of a thread of x and of grad each, whose loads are on their way at a time
constexpr int kPixelSteps = 4;  // pixels of a thread that finds dx of a channels-last picture

// A part of a channel of a contiguous picture, for blockDim.x threads; a block has blockDim.y of them. Chunks are counted from the beginning of the
// group, which can be aligned where its channels are not: at both ends of a channel a chunk may be shared with another.
template <typename T>
struct Plane {
  static constexpr int N = kChunk<T>;
  const GroupNormGradient& k;
  bool there;
  int64_t n;
  unsigned channel, part, first, size, begin, end;  // the channel's first element and the group's size; chunks of this part

  __device__ explicit Plane(const GroupNormGradient& task) : k(task) {
    const GroupNorm& norm = k.norm;
    const int64_t i_plane = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, i_channel = i_plane / k.part_count;
    there = i_channel < norm.batch * norm.channels;
    n = there ? i_channel / norm.channels : 0, channel = there ? static_cast<unsigned>(i_channel % norm.channels) : 0;
    part = static_cast<unsigned>(i_plane % k.part_count), first = channel % norm.per_group * norm.pixels, size = norm.per_group * norm.pixels;
    const unsigned before = first / N, after = (first + norm.pixels + N - 1) / N, most = norm.pixels / N + (norm.pixels % N ? 2 : 0);
    const unsigned mine = (most + k.part_count - 1) / k.part_count;
    begin = before + part * mine, end = after < begin ? begin : after - begin < mine ? after : begin + mine;
  }
  // Where the group begins in its sample.
  __device__ int64_t group() const { return static_cast<int64_t>(channel / k.norm.per_group * k.norm.per_group) * k.norm.pixels; }
  __device__ bool inside(unsigned e) const { return e - first < k.norm.pixels; }  // of the channel: both ends, as there is no sign

  // take(e, x, grad) for this thread's chunks, which begin at elements e of the group.
  template <typename Take>
  __device__ void for_chunks(const Take& take) const {
    if (!there) return;
    const T* x = static_cast<const T*>(k.norm.x) + (n * k.norm.x_batch + group());
    const T* grad = static_cast<const T*>(k.grad) + (n * k.grad_batch + group());
    unsigned q = begin + threadIdx.x;
    if (k.vector) {
      for (; q + (kPairs - 1) * blockDim.x < end; q += kPairs * blockDim.x) {
        float r[kPairs][N], g[kPairs][N];
#pragma unroll
        for (int step = 0; step < kPairs; ++step) {
          load_vector(x + (q + step * blockDim.x) * N, r[step]);
          load_vector(grad + (q + step * blockDim.x) * N, g[step]);
        }
#pragma unroll
        for (int step = 0; step < kPairs; ++step) take((q + step * blockDim.x) * N, r[step], g[step]);
      }
    }
    for (; q < end; q += blockDim.x) {
      const unsigned e = q * N;
      const int count = size - e < N ? static_cast<int>(size - e) : N;
      float r[N], g[N];
      load_chunk(x + e, 1, count, k.vector, r);
      load_chunk(grad + e, 1, count, k.vector, g);
      take(e, r, g);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kBlock, 1) group_norm_gradient_parts_kernel(const __grid_constant__ GroupNormGradient k) {
  __shared__ float warps[kSums][kWarp];
  const Plane<T> plane(k);
  const Affine<T> affine = affine_of<T>(k.norm, plane.n, plane.channel);
  float sums[kSums] = {};
  plane.for_chunks([&](unsigned e, const float (&r)[kChunk<T>], const float (&g)[kChunk<T>]) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const Distance<T> at(affine, r[i], g[i], k.norm.silu);
      if (plane.inside(e + i)) sums[0] += at.dh, sums[1] += at.dh * at.d, sums[2] += at.d;
    }
  });
#pragma unroll
  for (int s = 0; s < kSums; ++s) sums[s] = blockDim.x < kWarp ? lane_sum(sums[s], static_cast<int>(blockDim.x)) : row_sum(sums[s], warps[s]);
  if (threadIdx.x > 0 || !plane.there) return;
  float* out = k.sums + ((plane.n * k.part_count + plane.part) * kSums * k.norm.channels + plane.channel);
#pragma unroll
  for (int s = 0; s < kSums; ++s) out[static_cast<int64_t>(s) * k.norm.channels] = sums[s];
}

template <typename T>
__global__ void __launch_bounds__(kBlock, 1) group_norm_gradient_dx_kernel(const __grid_constant__ GroupNormGradient k) {
  constexpr int N = kChunk<T>;
  const Plane<T> plane(k);
  float of[kCoefficients];
  load_vector(k.coefficients + (plane.n * k.norm.channels + plane.channel) * kCoefficients, of);
  const Affine<T> affine{of[0], of[1], of[2], of[3]};
  T* dx = static_cast<T*>(k.dx) + (plane.n * k.norm.channels * k.norm.pixels + plane.group());
  plane.for_chunks([&](unsigned e, const float (&r)[N], const float (&g)[N]) {
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Distance<T> at(affine, r[i], g[i], k.norm.silu);
      out[i] = fmaf(at.dh, affine.factor, fmaf(at.d, of[4], of[5]));
    }
    if (plane.inside(e) && plane.inside(e + N - 1)) {
      store_chunk(dx + e, 1, N, k.vector, out);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (plane.inside(e + i)) dx[e + i] = narrow<T>(out[i]);
      }
    }
  });
}

// A block: some pixels of a channels-last picture. Each thread sums its channels over its pixels; then one thread a channel adds up the threads.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, kLargeBlock / kThreads) group_norm_gradient_parts_last_kernel(const __grid_constant__ GroupNormGradient k) {
  constexpr int N = kChunk<T>;
  __shared__ float shared[kThreads * N];  // [rows, C]
  const GroupNorm& norm = k.norm;
  const unsigned i_part = blockIdx.x % k.part_count, mine = (norm.pixels + k.part_count - 1) / k.part_count;
  const int64_t n = blockIdx.x / k.part_count;
  const unsigned begin = i_part * mine < norm.pixels ? i_part * mine : norm.pixels, end = norm.pixels - begin < mine ? norm.pixels : begin + mine;
  const Columns<T> at(norm.channels);
  const T* x = static_cast<const T*>(norm.x) + (n * norm.x_batch + at.channel);
  const T* grad = static_cast<const T*>(k.grad) + (n * k.grad_batch + at.channel);
  Affine<T> affine[N];
  float sums[kSums][N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < at.count) affine[i] = affine_of<T>(norm, n, at.channel + i);
  }
  const auto take = [&](const float (&r)[N], const float (&g)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Distance<T> of(affine[i], r[i], g[i], norm.silu);
      sums[0][i] += of.dh, sums[1][i] += of.dh * of.d, sums[2][i] += of.d;
    }
  };
  const auto pixel = [&](unsigned p) { return static_cast<int64_t>(p) * norm.channels; };
  unsigned p = at.count > 0 ? begin + at.row : end;
  if (k.vector) {
    for (; p < end && end - p > (kPairs - 1) * at.rows; p += kPairs * at.rows) {
      float r[kPairs][N], g[kPairs][N];
#pragma unroll
      for (int step = 0; step < kPairs; ++step) {
        load_vector(x + pixel(p + step * at.rows), r[step]);
        load_vector(grad + pixel(p + step * at.rows), g[step]);
      }
#pragma unroll
      for (int step = 0; step < kPairs; ++step) take(r[step], g[step]);
    }
  }
  for (; p < end; p += at.rows) {
    float r[N], g[N];
    load_chunk(x + pixel(p), 1, at.count, k.vector, r);
    load_chunk(grad + pixel(p), 1, at.count, k.vector, g);
    take(r, g);
  }

  float* out = k.sums + static_cast<int64_t>(blockIdx.x) * kSums * norm.channels;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < at.count) shared[at.row * norm.channels + at.channel + i] = sums[s][i];
    }
    __syncthreads();
    for (unsigned c = threadIdx.x; c < norm.channels; c += kThreads) {
      double total = 0.0;  // one after the other
      for (unsigned row = 0; row < at.rows; ++row) total += shared[row * norm.channels + c];
      out[s * norm.channels + c] = static_cast<float>(total);
    }
  }
}

// A block: some pixels of a channels-last picture, kPixelSteps of each thread.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) group_norm_gradient_dx_last_kernel(const __grid_constant__ GroupNormGradient k) {
  constexpr int N = kChunk<T>;
  const GroupNorm& norm = k.norm;
  const Columns<T> at(norm.channels);
  if (at.count == 0) return;
  const unsigned each = at.rows * kPixelSteps, blocks = (norm.pixels + each - 1) / each;
  const int64_t n = blockIdx.x / blocks;
  Affine<T> affine[N];
  float by_distance[N], constant[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= at.count) break;
    float of[kCoefficients];
    load_vector(k.coefficients + (n * norm.channels + at.channel + i) * kCoefficients, of);
    affine[i] = {of[0], of[1], of[2], of[3]}, by_distance[i] = of[4], constant[i] = of[5];
  }
#pragma unroll
  for (int step = 0; step < kPixelSteps; ++step) {
    const unsigned p = blockIdx.x % blocks * each + step * at.rows + at.row;
    if (p >= norm.pixels) return;
    const int64_t pixel = static_cast<int64_t>(p) * norm.channels + at.channel;
    float r[N], g[N];
    load_chunk(static_cast<const T*>(norm.x) + (n * norm.x_batch + pixel), 1, at.count, k.vector, r);
    load_chunk(static_cast<const T*>(k.grad) + (n * k.grad_batch + pixel), 1, at.count, k.vector, g);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= at.count) break;
      const Distance<T> of(affine[i], r[i], g[i], norm.silu);
      r[i] = fmaf(of.dh, affine[i].factor, fmaf(of.d, by_distance[i], constant[i]));
    }
    store_chunk(static_cast<T*>(k.dx) + (n * norm.pixels * norm.channels + pixel), 1, at.count, k.vector, r);
  }
}

// A block: a group. Its two means from the totals, then what each of its channels gets and needs. In float64: they are few.
template <typename T>
__global__ void __launch_bounds__(kBlock, 1) group_norm_gradient_stats_kernel(const __grid_constant__ GroupNormGradient k) {
  __shared__ double warps[2][kWarp];
  const GroupNorm& norm = k.norm;
  const int64_t n = blockIdx.x / norm.groups;
  const unsigned first = blockIdx.x % norm.groups * norm.per_group;
  const float* stats = norm.stats + static_cast<int64_t>(blockIdx.x) * 4;
  const double rstd = stats[2], rest = stats[1] * rstd, size = static_cast<double>(norm.per_group) * norm.pixels;  // xhat = d * rstd + rest
  const auto total = [&](int s, unsigned c) { return static_cast<double>(k.totals[(n * kSums + s) * norm.channels + c]); };
  const auto by_xhat = [&](unsigned c) { return rstd * total(1, c) + rest * total(0, c); };
  const auto given = [&](const Tokens& p, unsigned c, float otherwise) -> double { return p.data ? parameter<T>(p, n, c) : otherwise; };
  double mean = 0.0, mean_xhat = 0.0;
  for (unsigned c = first + threadIdx.x; c < first + norm.per_group; c += kBlock) {
    const double factor = given(norm.weight, c, 1.0f) * (1.0 + given(norm.scale, c, 0.0f));
    mean += factor * total(0, c), mean_xhat += factor * by_xhat(c);
  }
  mean = row_sum(mean, warps[0]) / size, mean_xhat = row_sum(mean_xhat, warps[1]) / size;
  for (unsigned c = first + threadIdx.x; c < first + norm.per_group; c += kBlock) {
    const int64_t i = n * norm.channels + c;
    const double weight = given(norm.weight, c, 1.0f), bias = given(norm.bias, c, 0.0f), scale = 1.0 + given(norm.scale, c, 0.0f);
    const double of_h = total(0, c), of_factor = by_xhat(c);
    const auto give = [&](void* out, double value) {
      if (out) static_cast<T*>(out)[i] = narrow<T>(static_cast<float>(value));
    };
    give(k.dshift, of_h);
    give(k.dscale, of_factor * weight + of_h * bias);
    give(k.dadd, rstd * (of_h * weight * scale - norm.pixels * mean - (rstd * total(2, c) + rest * norm.pixels) * mean_xhat));
    if (k.of_weight) k.of_weight[i] = static_cast<float>(of_factor * scale);
    if (k.of_bias) k.of_bias[i] = static_cast<float>(of_h * scale);
    if (!k.dx) continue;
    const auto put = [&](int j, double value) { k.coefficients[i * kCoefficients + j] = static_cast<float>(value); };
    put(0, given(norm.add, c, 0.0f)), put(1, stats[0]), put(2, rstd * weight * scale);
    put(3, (rest * weight + bias) * scale + given(norm.shift, c, 0.0f));
    put(4, -rstd * rstd * mean_xhat), put(5, -rstd * (mean + rest * mean_xhat));
  }
}

// Threads of a part of a channel, and how many parts a block has: short channels share a warp.
template <typename T>
static dim3 plane_threads(const GroupNormGradient& k) {
  const int64_t chunks = ceil_div(k.norm.pixels, kChunk<T>);
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < chunks) lanes *= 2;
  return k.part_count > 1 || chunks > 4 * kWarp ? dim3(kBlock) : dim3(lanes, kBlock / lanes);
}

template <typename T>
static const char* launch_planes(void (*kernel)(GroupNormGradient), const GroupNormGradient& k, void* stream) {
  const dim3 threads = plane_threads<T>(k);
  const int64_t blocks = ceil_div(k.norm.batch * k.norm.channels * k.part_count, threads.y);
  return blocks > kMaxBlocks ? "too many channels" : launch(kernel, blocks, threads, stream, k);
}

template <typename T, int kThreads>
static const char* launch_last(const GroupNormGradient& k, bool of_dx, void* stream) {
  const int64_t pixels = kThreads / ceil_div(k.norm.channels, kChunk<T>) * kPixelSteps;
  const int64_t blocks = k.norm.batch * (of_dx ? ceil_div(k.norm.pixels, pixels) : k.part_count);
  if (blocks > kMaxBlocks) return "too many pixels";
  const auto kernel = of_dx ? group_norm_gradient_dx_last_kernel<T, kThreads> : group_norm_gradient_parts_last_kernel<T, kThreads>;
  return launch(kernel, blocks, dim3(kThreads), stream, k);
}

template <typename T>
static const char* launch_pass(const GroupNormGradient& k, bool of_dx, void* stream) {
  if (!k.norm.channels_last) return launch_planes<T>(of_dx ? group_norm_gradient_dx_kernel<T> : group_norm_gradient_parts_kernel<T>, k, stream);
  return (k.norm.channels <= kBlock * kChunk<T> ? launch_last<T, kBlock> : launch_last<T, kLargeBlock>)(k, of_dx, stream);
}

const char* launch_group_norm_gradient(const GroupNormGradient& task, Type type, void* stream) {
  if (const char* error = launch_group_norm_stats(task.norm, type, stream)) return error;
  FUSEWIRE_CUDA_SWITCH(type, {
    if (const char* error = launch_pass<T>(task, false, stream)) return error;
    if (task.part_count > 1) {
      ColumnSums sums{};
      sums.channels = static_cast<int>(kSums * task.norm.channels), sums.vector = sums.channels % 4 == 0;
      sums.add(task.sums, task.totals, task.norm.batch, task.part_count);
      if (const char* error = launch_column_sums(sums, Type::float32, stream)) return error;
    }
    if (const char* error = launch(group_norm_gradient_stats_kernel<T>, task.norm.batch * task.norm.groups, dim3(kBlock), stream, task)) return error;
    return task.dx ? launch_pass<T>(task, true, stream) : nullptr;
  })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
