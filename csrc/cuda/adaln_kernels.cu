// adaLN on CUDA: gated sums, norm and up to two modulations of a row in one pass over memory, the row in registers.
#include "cuda/adaln.h"

#include "cuda/token_rows.h"

namespace fusewire::cuda {

// The row itself, which every step changes in place.
template <typename T, int kChunks, bool kVector>
struct Values : Row<T, kChunks, kVector> {
  float value[kChunks][kChunk<T>];
  using Row<T, kChunks, kVector>::Row;
};

// r + gate * y
template <typename T, int kChunks, bool kVector>
__device__ inline void add_gated(Values<T, kChunks, kVector>& row, const Tokens& y, const Tokens& gate, bool exact) {
  const Chunks<T, kChunks, kVector> ys(row, y), gates(row, gate);
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    float a[kChunk<T>], g[kChunk<T>];
    ys.get(j, a);
    gates.get(j, g);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      float& r = row.value[j][i];
      r = exact ? rounded<T>(r + rounded<T>(g[i] * a[i])) : r + g[i] * a[i];
    }
  }
}

// (r - mean) / sqrt(var + eps) * weight + bias, or r / sqrt(mean(r^2) + eps) * weight + bias
template <typename T, int kChunks, bool kVector>
__device__ inline void normalise(Values<T, kChunks, kVector>& row, const Adaln& k) {
  __shared__ float warps[3][kWarp];
  const float channels = static_cast<float>(k.channels);
  const auto total = [&](auto term, float (&slots)[kWarp]) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) sum += row.inside(j, i) ? term(row.value[j][i]) : 0.0f;
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
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) row.value[j][i] = (row.value[j][i] - center) * rstd;
  }
  const auto with = [&](const Tokens& x, auto apply) {
    if (!x.data) return;
    const Chunks<T, kChunks, kVector> values(row, x);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float w[kChunk<T>];
      values.get(j, w);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) row.value[j][i] = apply(row.value[j][i], w[i]);
    }
  };
  with(k.weight, [](float r, float w) { return r * w; });
  with(k.bias, [](float r, float b) { return r + b; });
}

// The bits are the same for either kVector.
template <typename T, int kChunks, int kThreads, bool kVector>
__global__ void __launch_bounds__(kThreads) adaln_kernel(const __grid_constant__ Adaln k) {
  const unsigned i_row = blockIdx.x * blockDim.y + threadIdx.y;
  const bool there = i_row < k.rows;  // a row that is not there still takes part in the sums
  Values<T, kChunks, kVector> row(there, k.channels);
  const unsigned i_there = there ? i_row : 0;
  row.batch = i_there / k.tokens, row.token = i_there % k.tokens;
  {
    const Chunks<T, kChunks, kVector> xs(row, k.x);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) xs.get(j, row.value[j]);
  }
  const auto store = [&](void* out, int j, const float (&r)[kChunk<T>]) {
    store_chunk(static_cast<T*>(out) + (static_cast<int64_t>(i_row) * k.channels + row.channel(j)), 1, row.count(j), kVector || k.vector, r);
  };
  if (k.gates > 0) add_gated(row, k.y[0], k.gate[0], k.exact);
  if (k.gates > 1) add_gated(row, k.y[1], k.gate[1], k.exact);
  if (k.residual) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) store(k.residual, j, row.value[j]);
  }
  const auto modulate = [&](const Chunks<T, kChunks, kVector>& shifts, const Chunks<T, kChunks, kVector>& scales, void* out) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float h[kChunk<T>], s[kChunk<T>];
      shifts.get(j, h);
      scales.get(j, s);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        const float r = row.value[j][i];
        // r * (1 + scale) + shift
        h[i] = k.exact ? rounded<T>(r * rounded<T>(1.0f + s[i])) + h[i] : r * (1.0f + s[i]) + h[i];
      }
      store(out, j, h);
    }
  };
  if (k.modulations == 0) return;
  if constexpr (kVector) {
    const Chunks<T, kChunks, kVector> shifts(row, k.shift[0]), scales(row, k.scale[0]);  // on their way while the row is summed
    if (k.norm != Norm::none) normalise(row, k);
    modulate(shifts, scales, k.out[0]);
  } else {
    if (k.norm != Norm::none) normalise(row, k);
    modulate({row, k.shift[0]}, {row, k.scale[0]}, k.out[0]);
  }
  if (k.modulations > 1) modulate({row, k.shift[1]}, {row, k.scale[1]}, k.out[1]);
}

// kThreads: of a block at most. Few threads with several chunks each: their loads overlap, and their sums wait less for one another.
template <typename T, int kChunks, int kThreads>
static const char* launch_rows(const Adaln& task, int64_t chunks, void* stream) {
  constexpr bool kFits = kThreads <= 256;  // the longest rows leave no registers for all loads at once
  const unsigned threads = static_cast<unsigned>(ceil_div(ceil_div(chunks, kChunks), kWarp)) * kWarp;
  const unsigned rows = threads == kWarp ? 4 : 1;  // short rows: one for each of a block's four warps
  bool vector = kFits && task.vector && task.channels % kChunk<T> == 0;
  for (const Tokens* x : {&task.x, &task.y[0], &task.y[1], &task.gate[0], &task.gate[1], &task.shift[0], &task.shift[1], &task.scale[0], &task.scale[1],
                          &task.weight, &task.bias}) {
    vector = vector && (!x->data || x->vector);
  }
  return launch(vector ? adaln_kernel<T, kChunks, kThreads, kFits> : adaln_kernel<T, kChunks, kThreads, false>, ceil_div(task.rows, rows), dim3(threads, rows),
                stream, task);
}

// How a row is cut depends on its channels alone, never on the number of rows.
const char* launch_adaln(const Adaln& task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, {
    const int64_t chunks = ceil_div(task.channels, kChunk<T>);
    if (chunks <= 128) return launch_rows<T, 1, 128>(task, chunks, stream);
    if (chunks <= 256) return launch_rows<T, 2, 128>(task, chunks, stream);
    if (chunks <= 1024) return launch_rows<T, 4, 256>(task, chunks, stream);
    return launch_rows<T, 4, kMaxChannels / kChunk<T> / 4>(task, chunks, stream);
  })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
