// Guidance and one flow-matching Euler step on CUDA: one pass over the latents, the step's scalars read from the table on the device.
#include "cuda/sampler_step.h"

#include "cuda/device.h"

namespace fusewire::cuda {

constexpr int kBlock = 256;  // threads at most, a chunk each

// S: the sample's dtype; T: that of the model's output and of the result, whose chunks are 16 bytes.
template <typename S, typename T>
__global__ void __launch_bounds__(kBlock) flow_euler_kernel(const __grid_constant__ FlowEuler k) {
  constexpr int N = kChunk<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x % k.blocks) * blockDim.x + threadIdx.x) * N, rest = k.count - first;
  if (rest <= 0) return;
  const int count = rest < N ? static_cast<int>(rest) : N;
  const int last = k.dims - 1;
  int64_t o_sample = first * k.sample.strides[last], o_cond = first * k.cond.strides[last];
  int64_t o_uncond = first * k.uncond.strides[last], o_out = first * k.out.strides[last];
  unsigned outer = blockIdx.x / k.blocks;
  for (int d = last - 1; d >= 0; --d) {
    const unsigned size = static_cast<unsigned>(k.sizes[d]);
    const int64_t i = outer % size;
    outer /= size;
    o_sample += i * k.sample.strides[d];
    o_cond += i * k.cond.strides[d];
    o_uncond += i * k.uncond.strides[d];
    o_out += i * k.out.strides[d];
  }

  const int64_t row = k.counter ? *k.counter : k.step;
  // A row outside the table gives NaN, not whatever lies beside it
  const bool inside = row >= 0 && row < k.steps;
  const double* scalars = k.table + (inside ? row * k.table_row : 0);
  const float nan = nanf("");
  float dt = inside ? static_cast<float>(scalars[0]) : nan;
  // Stock's dt is a 0-dim tensor: promotion casts it to the output's dtype. Its guidance is a number: it is not cast.
  if (k.exact) dt = rounded<T>(dt);

  float v[N], x[N];
  load_chunk(static_cast<const T*>(k.cond.data) + o_cond, k.cond.strides[last], count, k.cond.vector, v);
  load_chunk(static_cast<const S*>(k.sample.data) + o_sample, k.sample.strides[last], count, k.sample.vector, x);
  if (k.uncond.data) {
    const float guidance = inside ? static_cast<float>(scalars[k.table_column]) : nan;
    float u[N];
    load_chunk(static_cast<const T*>(k.uncond.data) + o_uncond, k.uncond.strides[last], count, k.uncond.vector, u);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = k.exact ? rounded<T>(u[i] + rounded<T>(guidance * rounded<T>(v[i] - u[i]))) : u[i] + guidance * (v[i] - u[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] += k.exact ? rounded<T>(dt * v[i]) : dt * v[i];
  store_chunk(static_cast<T*>(k.out.data) + o_out, k.out.strides[last], count, k.out.vector, x);
}

const char* launch_flow_euler(FlowEuler task, int64_t outer, Type sample, Type output, void* stream) {
  FUSEWIRE_CUDA_SWITCH(output, {
    using Out = T;
    const int64_t chunks = ceil_div(task.count, kChunk<Out>);
    const unsigned threads = static_cast<unsigned>(chunks < kBlock ? ceil_div(chunks, kWarp) * kWarp : kBlock);
    const int64_t blocks = ceil_div(chunks, threads);
    if (outer > kMaxBlocks / blocks) return "the latents are too large";
    task.blocks = static_cast<unsigned>(blocks);
    FUSEWIRE_CUDA_SWITCH(sample, { return launch(flow_euler_kernel<T, Out>, outer * blocks, dim3(threads), stream, task); })
  })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
