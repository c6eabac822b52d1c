// adaLN on CUDA: gated sums, norm and up to two modulations of a row in one pass over memory, the row in registers.
#include "cuda/adaln.h"

#include "cuda/device.h"

namespace fusewire::cuda {

template <typename T, int kChunks>
struct Row {
  float value[kChunks][kChunk<T>];
  int64_t batch, token;
  int count[kChunks];  // elements of this thread's chunks that are inside the row: 0 in rows that are not there

  __device__ int channel(int j) const { return (threadIdx.x + j * blockDim.x) * kChunk<T>; }
  __device__ void load(const Tokens& x, int j, float (&r)[kChunk<T>]) const {
    load_chunk(static_cast<const T*>(x.data) + (batch * x.batch + token * x.token + channel(j) * x.channel), x.channel, count[j], x.vector, r);
  }
};

// r + gate * y
template <typename T, int kChunks>
__device__ inline void add_gated(Row<T, kChunks>& row, const Tokens& y, const Tokens& gate, bool exact) {
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    float a[kChunk<T>], g[kChunk<T>];
    row.load(y, j, a);
    row.load(gate, j, g);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      float& r = row.value[j][i];
      r = exact ? rounded<T>(r + rounded<T>(g[i] * a[i])) : r + g[i] * a[i];
    }
  }
}

// (r - mean) / sqrt(var + eps) * weight + bias, or r / sqrt(mean(r^2) + eps) * weight + bias
template <typename T, int kChunks>
__device__ inline void normalise(Row<T, kChunks>& row, const Adaln& k) {
  __shared__ float warps[3][kWarp];
  const float channels = static_cast<float>(k.channels);
  const auto total = [&](auto term, float (&slots)[kWarp]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) sum += i < row.count[j] ? term(row.value[j][i]) : 0.0f;
    }
    return row_sum(sum, slots);
  };
  float center = 0.0f;
  if (k.norm == Norm::layer) {
    // The mean in two steps: the second finds what the first lost beside a large mean. Squares are taken about the mean: nothing cancels.
    const float first = total([](float r) { return r; }, warps[0]) / channels;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) row.value[j][i] -= first;
    }
    center = total([](float r) { return r; }, warps[1]) / channels;
  }
  const float variance = total([=](float r) { return (r - center) * (r - center); }, warps[2]) / channels;
  const float rstd = 1.0f / sqrtf(variance + k.eps);
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    float w[kChunk<T>], b[kChunk<T>];
    if (k.weight.data) row.load(k.weight, j, w);
    if (k.bias.data) row.load(k.bias, j, b);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      float r = (row.value[j][i] - center) * rstd;
      if (k.weight.data) r *= w[i];
      if (k.bias.data) r += b[i];
      row.value[j][i] = r;
    }
  }
}

// Threads of a block: at most 512 of 16 or 32 values each, 1024 in the longest float32 rows.
template <typename T, int kChunks>
constexpr int kThreads = kChunks == 4 ? kMaxChannels / kChunk<T> / kChunks : 256;

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads<T, kChunks>) adaln_kernel(const __grid_constant__ Adaln k) {
  const unsigned i_row = blockIdx.x * blockDim.y + threadIdx.y;
  const bool there = i_row < k.rows;  // a row that is not there still takes part in the sums
  Row<T, kChunks> row;
  row.batch = there ? i_row / k.tokens : 0, row.token = there ? i_row % k.tokens : 0;
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    const int rest = k.channels - row.channel(j);
    row.count[j] = !there || rest < 0 ? 0 : rest < kChunk<T> ? rest : kChunk<T>;
    row.load(k.x, j, row.value[j]);
  }
  const auto store = [&](void* out, int j, const float (&r)[kChunk<T>]) {
    store_chunk(static_cast<T*>(out) + (static_cast<int64_t>(i_row) * k.channels + row.channel(j)), 1, row.count[j], k.vector, r);
  };
  if (k.gates > 0) add_gated(row, k.y[0], k.gate[0], k.exact);
  if (k.gates > 1) add_gated(row, k.y[1], k.gate[1], k.exact);
  if (k.residual) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) store(k.residual, j, row.value[j]);
  }
  if (k.norm != Norm::none) normalise(row, k);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    if (m >= k.modulations) break;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float h[kChunk<T>], s[kChunk<T>];
      row.load(k.shift[m], j, h);
      row.load(k.scale[m], j, s);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        const float r = row.value[j][i];
        // r * (1 + scale) + shift
        h[i] = k.exact ? rounded<T>(r * rounded<T>(1.0f + s[i])) + h[i] : r * (1.0f + s[i]) + h[i];
      }
      store(k.out[m], j, h);
    }
  }
}

template <typename T, int kChunks>
static const char* launch_rows(const Adaln& task, int64_t chunks, void* stream) {
  const unsigned threads = static_cast<unsigned>(ceil_div(ceil_div(chunks, kChunks), kWarp)) * kWarp;
  const unsigned rows = threads == kWarp ? 4 : 1;  // short rows: one for each of a block's four warps
  return launch(adaln_kernel<T, kChunks>, ceil_div(task.rows, rows), dim3(threads, rows), stream, task);
}

// How a row is cut depends on its channels alone, never on the number of rows.
const char* launch_adaln(const Adaln& task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, {
    const int64_t chunks = ceil_div(task.channels, kChunk<T>);
    if (chunks <= 256) return launch_rows<T, 1>(task, chunks, stream);
    if (chunks <= 512) return launch_rows<T, 2>(task, chunks, stream);
    return launch_rows<T, 4>(task, chunks, stream);
  })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
