// Sums over rows on CUDA, the second step: a block adds up the parts of some columns of one sample.
#include "cuda/column_sums.h"

#include "cuda/device.h"

namespace fusewire::cuda {

constexpr int kLanes = 8, kRows = 32;  // a block's threads: chunks of columns, and parts that are read side by side
constexpr int kSteps = 4;              // parts of a thread whose loads are on their way at a time, each with a sum of its own

template <typename T>
__global__ void __launch_bounds__(kLanes * kRows) column_parts_kernel(const __grid_constant__ ColumnSums k) {
  constexpr int N = kChunk<T>;
  __shared__ float shared[kRows][kLanes * N];
  int i_sum = 0;
  while (blockIdx.x >= k.end[i_sum]) ++i_sum;
  const int64_t blocks = (k.channels + kLanes * N - 1) / (kLanes * N), i_block = blockIdx.x - (i_sum ? k.end[i_sum - 1] : 0), parts = k.count[i_sum];
  const int lane = static_cast<int>(threadIdx.x) * N, column = static_cast<int>(i_block % blocks) * kLanes * N + lane;
  const int count = k.channels - column;
  const int64_t sample = i_block / blocks;
  const float* from = k.parts[i_sum] + (sample * parts * k.channels + column);

  float sums[kSteps][N] = {};
  for (int64_t i = threadIdx.y; i < parts; i += kSteps * kRows) {
    float r[kSteps][N];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t part = i + step * kRows;
      load_chunk(from + part * k.channels, 1, part < parts ? count : 0, k.channels % 4 == 0, r[step]);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < N; ++j) sums[step][j] += r[step][j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) shared[threadIdx.y][lane + j] = (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
  for (unsigned rows = kRows / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y >= rows) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) shared[threadIdx.y][lane + j] += shared[threadIdx.y + rows][lane + j];
  }
  if (threadIdx.y > 0) return;
  float total[N];
#pragma unroll
  for (int j = 0; j < N; ++j) total[j] = shared[0][lane + j];
  store_chunk(static_cast<T*>(k.out[i_sum]) + (sample * k.channels + column), 1, count, k.vector, total);
}

const char* launch_column_sums(ColumnSums task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, {
    int64_t blocks = 0;
    for (int i = 0; i < task.sums; ++i) task.end[i] = blocks += task.samples[i] * ceil_div(task.channels, kLanes * kChunk<T>);
    if (blocks > kMaxBlocks) return "too many columns";
    return blocks ? launch(column_parts_kernel<T>, blocks, dim3(kLanes, kRows), stream, task) : nullptr;
  })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
