// The gradients of adaLN on CUDA: one pass over the rows, which recomputes gated sum and norm in registers.
//
// What a sample shares among its tokens gets a sum over them, in two steps: a warp (short rows) or a block walks over a part of one sample's tokens
// and writes what that part comes to, column_sums_kernels.cu adds up the parts.
#include "cuda/adaln_backward.h"

#include "cuda/token_rows.h"

namespace fusewire::cuda {

constexpr int kOfThread = 8;  // channels
constexpr int kThreads = kMaxGradientChannels / kOfThread;

// Sums of N terms over the threads of a row, which meet in `warps` once for all of them. Calls that follow each other take turns with two `warps`: who
// writes to the first again has passed the barrier of the call between, and there everybody had read it.
template <int N, int M>
__device__ inline void row_sums(float (&x)[N], float (&warps)[kThreads / kWarp][M]) {
  static_assert(N <= M);
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = lane_sum(x[n]);
  if (blockDim.x == kWarp) return;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) warps[threadIdx.x / kWarp][n] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x / kWarp); ++w) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] += warps[w][n];
  }
}

// x, of which the compiler cannot tell that it is the same in every turn of a loop: what follows from it is computed again, and holds no registers.
__device__ inline unsigned opaque(unsigned x) {
#if !defined(FUSEWIRE_CUDA_ON_CPU)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// kModulations, kGates: how many; kAffine: a weight or a bias, or both. The bits are the same for either kVector.
template <typename T, int kModulations, int kGates, bool kAffine, bool kVector>
__global__ void __launch_bounds__(kThreads, 1) adaln_gradient_kernel(const __grid_constant__ AdalnGradient k) {
  constexpr int N = kChunk<T>, kChunks = kOfThread / N, kKinds = kGates + 2 * kModulations + 2 * kAffine;
  using Rows = Chunks<T, kChunks, kVector>;
  const unsigned i_part = blockIdx.x * blockDim.y + threadIdx.y;
  if (i_part >= k.parts) return;  // a whole warp, of a block whose warps do not wait for each other
  Row<T, kChunks, kVector> row(true, k.channels);
  const unsigned batch = i_part / k.of_sample, first = i_part % k.of_sample * k.steps, last = k.tokens - first < k.steps ? k.tokens : first + k.steps;
  const float channels = static_cast<float>(k.channels);
  float sums[kKinds][kChunks][N] = {};

  for (unsigned token = first; token < last; ++token) {
    row.batch = opaque(batch), row.token = opaque(token), row.left = static_cast<int>(opaque(k.channels)) - row.channel(0);
    const int64_t begin = (row.batch * k.tokens + row.token) * k.channels;
    const auto store = [&](void* out, int j, const float (&r)[N]) {
      if (out) store_chunk(static_cast<T*>(out) + (begin + row.channel(j)), 1, row.count(j), kVector || k.vector, r);
    };
    // A kind's gradient in this row: to its sum, or to its place
    const auto give = [&](int kind, int j, const float (&r)[N]) {
      store(k.of_tokens[kind], j, r);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[kind][j][i] += r[i];
    };
    float total[kChunks][N];  // the gradient of r
    if constexpr (kModulations > 0) {
      __shared__ float warps[2][2][kThreads / kWarp][4];
      auto& slots = warps[(token - first) % 2];
      const Rows grads(row, k.grad[0]), grads2(row, k.grad[kModulations - 1]);
      float r[kChunks][N], up[kChunks][N], mean = 0.0f;
      {
        const Rows xs(row, k.x), scales(row, k.scale[0]), scales2(row, k.scale[kModulations - 1]);
#pragma unroll
        for (int j = 0; j < kChunks; ++j) xs.get(j, r[j]);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          const Rows ys(row, k.y[g]), gates(row, k.gate[g]);
#pragma unroll
          for (int j = 0; j < kChunks; ++j) {
            float y[N], gate[N];
            ys.get(j, y);
            gates.get(j, gate);
#pragma unroll
            for (int i = 0; i < N; ++i) r[j][i] += gate[i] * y[i];
          }
        }
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          float grad[N], scale[N];
          grads.get(j, grad);
          scales.get(j, scale);
#pragma unroll
          for (int i = 0; i < N; ++i) up[j][i] = grad[i] * (1.0f + scale[i]);
          if constexpr (kModulations == 2) {
            grads2.get(j, grad);
            scales2.get(j, scale);
#pragma unroll
            for (int i = 0; i < N; ++i) up[j][i] += grad[i] * (1.0f + scale[i]);
          }
        }
      }
      // The gradient of xhat: g = grad * (1 + scale) * weight
      const auto weighted = [&](int j, float (&g)[N]) {
        float weight[N];
        if (kAffine && k.weight.data) Rows(row, k.weight).get(j, weight);
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = kAffine && k.weight.data ? up[j][i] * weight[i] : up[j][i];
      };
      if (k.norm == Norm::layer) {
        float sum[1] = {};
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
#pragma unroll
          for (int i = 0; i < N; ++i) sum[0] += r[j][i];
        }
        row_sums(sum, slots[0]);
        mean = sum[0] / channels;
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
#pragma unroll
          for (int i = 0; i < N; ++i) r[j][i] = row.inside(j, i) ? r[j][i] - mean : 0.0f;
        }
      }
      // Of d = r - mean and of g: what the mean lost beside a large one, the variance about it, mean(g) and mean(g * d)
      float of[4] = {};
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        float g[N];
        weighted(j, g);
#pragma unroll
        for (int i = 0; i < N; ++i) of[0] += r[j][i], of[1] += r[j][i] * r[j][i], of[2] += g[i], of[3] += g[i] * r[j][i];
      }
      row_sums(of, slots[1]);
      row.batch = opaque(batch);  // a weight is read again, too
      const bool layer = k.norm == Norm::layer;
      const float center = layer ? of[0] / channels : 0.0f, squares = of[1] / channels - center * center;
      const float rstd = 1.0f / sqrtf((squares < 0.0f ? 0.0f : squares) + k.eps);
      const float mean_g = of[2] / channels, mean_by_xhat = (of[3] / channels - center * mean_g) * rstd;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        float xhat[N], norm[N], g[N];
#pragma unroll
        for (int i = 0; i < N; ++i) norm[i] = xhat[i] = (r[j][i] - center) * rstd;
        if constexpr (kAffine) {
          float value[N];
          if (k.weight.data) {
            Rows(row, k.weight).get(j, value);
#pragma unroll
            for (int i = 0; i < N; ++i) norm[i] *= value[i];
          }
          if (k.bias.data) {
            Rows(row, k.bias).get(j, value);
#pragma unroll
            for (int i = 0; i < N; ++i) norm[i] += value[i];
          }
        }
        const auto of_modulation = [&](int kind, const Rows& from) {
          float grad[N];
          from.get(j, grad);
          give(kind, j, grad);
#pragma unroll
          for (int i = 0; i < N; ++i) grad[i] *= norm[i];
          give(kind + 1, j, grad);
        };
        of_modulation(kGates, grads);
        if constexpr (kModulations == 2) of_modulation(kGates + 2, grads2);
        if constexpr (kAffine) {
          float product[N];
#pragma unroll
          for (int i = 0; i < N; ++i) product[i] = up[j][i] * xhat[i];
          give(kKinds - 2, j, product);
          give(kKinds - 1, j, up[j]);
        }
        // (g - mean(g) - xhat * mean(g * xhat)) * rstd; RMSNorm has no mean(g)
        weighted(j, g);
#pragma unroll
        for (int i = 0; i < N; ++i) total[j][i] = ((layer ? g[i] - mean_g : g[i]) - xhat[i] * mean_by_xhat) * rstd;
      }
    }
    if constexpr (kGates > 0) {
      const Rows residuals(row, k.grad_residual);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        float grad[N];
        residuals.get(j, grad);
#pragma unroll
        for (int i = 0; i < N; ++i) total[j][i] = kModulations > 0 ? total[j][i] + grad[i] : grad[i];
      }
    }
    if constexpr (kModulations > 0) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) store(k.dx, j, total[j]);
    }
    // What the norm read is read again, from a cache, rather than kept: registers are for the sums
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const Rows ys(row, k.y[gate]), gates(row, k.gate[gate]);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        float value[N];
        ys.get(j, value);
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] *= total[j][i];
        give(gate, j, value);
        gates.get(j, value);
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] *= total[j][i];
        store(k.dy[gate], j, value);
      }
    }
  }

#pragma unroll
  for (int kind = 0; kind < kKinds; ++kind) {
    if (!k.parts_of[kind]) continue;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float* out = k.parts_of[kind] + (static_cast<int64_t>(i_part) * k.channels + row.channel(j));
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float four[4] = {sums[kind][j][i], sums[kind][j][i + 1], sums[kind][j][i + 2], sums[kind][j][i + 3]};
        store_chunk(out + i, 1, row.count(j) - i, k.channels % 4 == 0, four);
      }
    }
  }
}

template <typename T, int kModulations, int kGates, bool kAffine>
static const char* launch_parts(const AdalnGradient& task, void* stream) {
  const unsigned threads = static_cast<unsigned>(ceil_div(ceil_div(task.channels, kOfThread), kWarp)) * kWarp;
  const unsigned rows = threads == kWarp ? 4 : 1;  // short rows: a part for each of a block's four warps
  bool vector = task.vector && task.channels % kChunk<T> == 0;
  for (const Tokens* x : {&task.grad_residual, &task.grad[0], &task.grad[1], &task.x, &task.y[0], &task.y[1], &task.gate[0], &task.gate[1], &task.scale[0],
                          &task.scale[1], &task.weight, &task.bias}) {
    vector = vector && (!x->data || x->vector);
  }
  constexpr bool kFits = sizeof(T) == 2 || !kAffine || kGates < 2;  // six sums of float32 leave no registers for all loads at once
  const auto kernel = vector ? adaln_gradient_kernel<T, kModulations, kGates, kAffine, kFits> : adaln_gradient_kernel<T, kModulations, kGates, kAffine, false>;
  return launch(kernel, ceil_div(task.parts, rows), dim3(threads, rows), stream, task);
}

template <typename T>
static const char* launch_gates(const AdalnGradient& task, void* stream) {
  if (task.modulations == 0) return launch_parts<T, 0, 1, false>(task, stream);
  if (task.modulations == 2) {
    if (!task.affine) return launch_parts<T, 2, 0, false>(task, stream);
    if constexpr (sizeof(T) == 2) return launch_parts<T, 2, 0, true>(task, stream);
    return "no kernel holds two modulations of a norm with weight or bias in float32: it would spill registers";
  }
  if (task.gates == 0) return (task.affine ? launch_parts<T, 1, 0, true> : launch_parts<T, 1, 0, false>)(task, stream);
  if (task.gates == 1) return (task.affine ? launch_parts<T, 1, 1, true> : launch_parts<T, 1, 1, false>)(task, stream);
  return (task.affine ? launch_parts<T, 1, 2, true> : launch_parts<T, 1, 2, false>)(task, stream);
}

const char* launch_adaln_gradient(const AdalnGradient& task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, { return launch_gates<T>(task, stream); })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
