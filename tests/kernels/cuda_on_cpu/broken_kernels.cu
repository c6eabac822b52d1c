// Kernels with the faults that the tests' machine must find, and one without.
#include "cuda/device.h"

namespace fusewire::cuda {

struct Task {
  float* data;
};

// Each thread takes its neighbour's value; without the barrier it takes what was there before.
template <bool kBarrier>
__global__ void neighbours(Task k) {
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x + 1);
  if (kBarrier) __syncthreads();
  k.data[threadIdx.x] = shared[(threadIdx.x + 33) % 64];
  if (kBarrier) __syncthreads();
  shared[threadIdx.x] = -1.0f;
}
__global__ void some_lanes_wait(Task k) {
  if (threadIdx.x < 16) __syncthreads();
}
__global__ void a_warp_ends(Task k) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void different_shuffles(Task k) {
  if (threadIdx.x % 2) k.data[0] = lane_sum(1.0f);
}
__global__ void unaligned(Task k) {
  float r[4];
  load_chunk(k.data + 1, 1, 4, true, r);
}
__global__ void sums(Task k) {
  __shared__ float warps[kWarp];
  k.data[threadIdx.x] = row_sum(static_cast<float>(threadIdx.x), warps) + 10000.0f * lane_sum(static_cast<float>(threadIdx.x % 32), 8);
}

static const char* run(int kernel, const Task& task) {
  static char device, other;
  void* stream = &device;
  current_stream = kernel == 9 ? nullptr : stream;
  switch (kernel) {
    case 0: return launch(neighbours<true>, 2, dim3(64), stream, task);
    case 1: return launch(neighbours<false>, 2, dim3(64), stream, task);
    case 2: return launch(some_lanes_wait, 1, dim3(32), stream, task);
    case 3: return launch(a_warp_ends, 1, dim3(64), stream, task);
    case 4: return launch(different_shuffles, 1, dim3(32), stream, task);
    case 5: return launch(unaligned, 1, dim3(32), stream, task);
    case 6: return launch(sums, 1, dim3(64), stream, task);
    case 8: return launch(sums, 1, dim3(64), &other, task);
    case 9: return launch(sums, 1, dim3(64), nullptr, task);
    default: return launch(sums, 1, dim3(40), stream, task);
  }
}

}  // namespace fusewire::cuda

extern "C" __attribute__((visibility("default"))) const char* run_broken(int kernel, float* data) {
  return fusewire::cuda::run(kernel, {data});
}
