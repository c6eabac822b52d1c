// What the CUDA kernels share: 16-byte loads and stores, rounding, sums over a warp and a block, the launch. Included by *_kernels.cu alone.
//
// FUSEWIRE_CUDA_ON_CPU: the same kernels as plain C++, for tests where there is no GPU (tests/kernels/cuda_on_cpu). Everything here but exp is
// rounded correctly on both (-fmad=false, IEEE division and roots), so the bits are the same.
#pragma once
#include <cstdint>
#if defined(FUSEWIRE_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "cuda/views.h"

namespace fusewire::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// x with the rounding that storing it as T would cause: in a register.
template <typename T>
__device__ inline float rounded(float x) { return widen(narrow<T>(x)); }

// A chunk is what one 16-byte access moves. A row's chunks belong to its threads in turn, whatever its layout: the order of a sum depends on the
// number of channels alone, and the same values in another layout give the same bits.
template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// The values p[0 .. N) in accesses of up to 16 bytes; p starts on 16 bytes, or on 8 where they are no more.
template <typename T, int N>
__device__ inline void load_vector(const T* p, float (&r)[N]) {
  alignas(16) T values[N];
  constexpr int kBytes = N * static_cast<int>(sizeof(T));
  static_assert(kBytes == 8 || kBytes % 16 == 0);
  if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(values) = *reinterpret_cast<const uint2*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(p)[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) r[i] = widen(values[i]);
}

// p[0], p[step], ... as floats: `count` of them, at most N, then zeros. `vector`: they lie side by side, and whole chunks start as load_vector wants it.
// `count` may be less than 0 or more than N, here and below: what is left of a row from this chunk on. Bounded on both sides by max(min(rest, N), 0),
// it was miscompiled: ptxas 13.0 takes `count == N` from the predicate of VIMNMX.RELU, which is one instruction for both bounds, and holds for any
// rest < 0 too. Threads beyond a row's end then stored over the next row. (compiled_cuda.py looks for that instruction.)
template <typename T, int N>
__device__ inline void load_chunk(const T* p, int64_t step, int count, bool vector, float (&r)[N]) {
  if (vector && count >= N) {
    load_vector(p, r);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] = i < count ? widen(p[i * step]) : 0.0f;
  }
}

// A chunk as it lies in memory: `count` values of p[0], p[1], ..., then zeros. `vector`: whole chunks start on 16 bytes.
template <typename T>
__device__ inline uint4 load_bits(const T* p, int count, bool vector) {
  if (vector && count >= kChunk<T>) return *reinterpret_cast<const uint4*>(p);
  alignas(16) T values[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) values[i] = i < count ? p[i] : narrow<T>(0.0f);
  return *reinterpret_cast<const uint4*>(values);
}

template <typename T>
__device__ inline void widen_bits(const uint4& bits, float (&r)[kChunk<T>]) {
  load_vector(reinterpret_cast<const T*>(&bits), r);
}

template <typename T>
__device__ inline void store_chunk(T* p, int64_t step, int count, bool vector, const float (&r)[kChunk<T>]) {
  if (vector && count >= kChunk<T>) {
    alignas(16) T values[kChunk<T>];
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) values[i] = narrow<T>(r[i]);
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(values);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      if (i < count) p[i * step] = narrow<T>(r[i]);
    }
  }
}

// A whole chunk, 16 bytes at once, where that is known beforehand: of store_chunk the compiler would then make stores of 4 bytes.
template <typename T>
__device__ inline void store_vector(T* p, const float (&r)[kChunk<T>]) {
  alignas(16) T values[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) values[i] = narrow<T>(r[i]);
  const uint4 bits = *reinterpret_cast<const uint4*>(values);
#if defined(FUSEWIRE_CUDA_ON_CPU)
  *reinterpret_cast<uint4*>(p) = bits;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w) : "memory");
#endif
}

// The sum over `lanes` neighbouring lanes, a power of two; every lane gets it.
template <typename F>
__device__ inline F lane_sum(F x, int lanes = kWarp) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The sum over the threads of a row: a warp, or a block of up to 32 warps, which meet in `warps`. Each call of a kernel needs a `warps` of its own:
// nobody waits until everybody has read it.
template <typename F>
__device__ inline F row_sum(F x, F (&warps)[kWarp]) {
  x = lane_sum(x);
  if (blockDim.x == kWarp) return x;
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / kWarp); ++w) x += warps[w];
  return x;
}

#if !defined(FUSEWIRE_CUDA_ON_CPU)
// Queues the kernel on the stream; nullptr, or what went wrong. It neither waits nor allocates, so a CUDA graph can capture it.
template <typename Task>
const char* launch(void (*kernel)(Task), int64_t blocks, dim3 threads, void* stream, const Task& task) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(task);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

// Runs BODY with T set to the device type of `type`.
#define FUSEWIRE_CUDA_SWITCH(type, ...)                                                   \
  switch (type) {                                                                         \
    case ::fusewire::cuda::Type::float32: { using T = float; __VA_ARGS__ } break;         \
    case ::fusewire::cuda::Type::bfloat16: { using T = __nv_bfloat16; __VA_ARGS__ } break; \
    case ::fusewire::cuda::Type::float16: { using T = __half; __VA_ARGS__ } break;        \
  }

}  // namespace fusewire::cuda
