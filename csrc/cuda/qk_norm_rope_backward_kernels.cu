// The gradients of QK norm on CUDA: q and k in one launch, each head's row read once, by a part of a warp, turned back and normed again in registers.
//
// A block walks over some tiles of rows and writes a row of partial sums for the weight; column_sums_kernels.cu adds these up.
#include "cuda/qk_norm_rope_backward.h"

#include "cuda/head_rows.h"

namespace fusewire::cuda {

template <typename T, int kChunks>
__global__ void __launch_bounds__(kHeadBlock) qk_norm_rope_gradient_kernel(const __grid_constant__ QkGradient k) {
  constexpr int N = kChunk<T>;
  const bool is_q = blockIdx.x < k.part[0].blocks;
  const QkGradientPart& part = k.part[is_q ? 0 : 1];
  const unsigned i_block = blockIdx.x - (is_q ? 0 : k.part[0].blocks);
  const int lanes = static_cast<int>(blockDim.x);
  const float dim = static_cast<float>(k.dim);
  const auto channel = [](int j) { return static_cast<int>(threadIdx.x + j * blockDim.x) * N; };
  float sums[kChunks][N] = {};

  for (unsigned step = 0; step < part.steps; ++step) {
    const unsigned i_row = (i_block * part.steps + step) * blockDim.y + threadIdx.y;
    const bool there = i_row < part.rows;  // a row that is not there still takes part in the sums of its warp
    const unsigned i_bt = there ? i_row / part.heads : 0;
    const int64_t i_h = there ? i_row % part.heads : 0, i_t = i_bt % part.tokens, i_b = i_bt / part.tokens;
    const T* x = static_cast<const T*>(part.x.data) + (i_b * part.x.batch + i_t * part.x.token + i_h * part.x.head);
    const T* grad = static_cast<const T*>(part.grad.data) + (i_b * part.grad.batch + i_t * part.grad.token + i_h * part.grad.head);

    float r[kChunks][N], g[kChunks][N], squares = 0.0f, products = 0.0f;
    int count[kChunks];
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      count[j] = there ? k.dim - channel(j) : 0;
      load_chunk(x + channel(j) * part.x.channel, part.x.channel, count[j], part.x.vector, r[j]);
      load_chunk(grad + channel(j) * part.grad.channel, part.grad.channel, count[j], part.grad.vector, g[j]);
    }
    const auto weight_of = [&](int j, float (&w)[N]) {
      load_chunk(static_cast<const T*>(part.weight.data) + channel(j) * part.weight.channel, part.weight.channel, count[j], part.weight.vector, w);
    };
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (k.cos.data) {
        // (even, odd) was turned to (even cos - odd sin, odd cos + even sin): its gradient is turned the other way
        float c[N / 2], s[N / 2];
        load_rotation(k.cos, k.sin, i_t, channel(j), count[j], c, s);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const float even = g[j][2 * i], odd = g[j][2 * i + 1];
          g[j][2 * i] = even * c[i] + odd * s[i];
          g[j][2 * i + 1] = odd * c[i] - even * s[i];
        }
      }
      float w[N];
      if (part.weight.data) weight_of(j, w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        squares += r[j][i] * r[j][i];
        products += (part.weight.data ? g[j][i] * w[i] : g[j][i]) * r[j][i];
      }
    }
    squares = lane_sum(squares, lanes), products = lane_sum(products, lanes);
    const float rstd = 1.0f / sqrtf(squares / dim + k.eps), mean = products / dim * rstd;  // of g * xhat, g = grad * weight
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float w[N], out[N];
      if (part.weight.data) weight_of(j, w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float xhat = r[j][i] * rstd;
        sums[j][i] += there ? g[j][i] * xhat : 0.0f;  // not there: 0, whatever 1 / sqrt(eps) is
        out[i] = ((part.weight.data ? g[j][i] * w[i] : g[j][i]) - xhat * mean) * rstd;
      }
      if (part.dx) store_chunk(static_cast<T*>(part.dx) + (static_cast<int64_t>(i_row) * k.dim + channel(j)), 1, count[j], part.vector, out);
    }
  }
  if (!part.sums) return;

  // The block's rows, by pairs
  __shared__ float shared[kChunks * N][kHeadBlock];
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[j * N + i][thread] = sums[j][i];
  }
  for (unsigned rows = blockDim.y / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y >= rows) continue;
#pragma unroll
    for (int e = 0; e < kChunks * N; ++e) shared[e][thread] += shared[e][thread + rows * blockDim.x];
  }
  if (threadIdx.y > 0) return;
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (channel(j) + i < k.dim) part.sums[static_cast<int64_t>(i_block) * k.dim + channel(j) + i] = shared[j * N + i][thread];
    }
  }
}

template <typename T, int kChunks>
struct GradientRows {
  static const char* launch(QkGradient& task, unsigned lanes, void* stream) {
    const unsigned rows = kHeadBlock / lanes;
    for (QkGradientPart& part : task.part) {
      const unsigned tiles = static_cast<unsigned>(ceil_div(part.rows, rows));
      if (!part.sums) part.blocks = tiles;
      part.steps = part.blocks ? static_cast<unsigned>(ceil_div(tiles, part.blocks)) : 0;
    }
    const int64_t blocks = static_cast<int64_t>(task.part[0].blocks) + task.part[1].blocks;
    if (blocks > kMaxBlocks) return "q and k have too many rows";
    return blocks ? cuda::launch(qk_norm_rope_gradient_kernel<T, kChunks>, blocks, dim3(lanes, rows), stream, task) : nullptr;
  }
};

const char* launch_qk_gradient(QkGradient task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, { return launch_heads<GradientRows, T>(task, stream); })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
