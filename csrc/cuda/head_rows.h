// What the kernels over rows of heads have in common: the tables of the rotation, and how a row is cut. For *_kernels.cu.
#pragma once
#include "cuda/device.h"
#include "cuda/qk_norm_rope.h"

namespace fusewire::cuda {

constexpr int kHeadBlock = 128;  // threads: as many rows as fit

// cos and sin of the pairs of a chunk of `count` channels from `channel` on.
template <int N>
__device__ inline void load_rotation(const Tokens& cos, const Tokens& sin, int64_t token, int channel, int count, float (&c)[N], float (&s)[N]) {
  const int pair = channel / 2;
  load_chunk(static_cast<const float*>(cos.data) + (token * cos.token + pair * cos.channel), cos.channel, count / 2, cos.vector, c);
  load_chunk(static_cast<const float*>(sin.data) + (token * sin.token + pair * sin.channel), sin.channel, count / 2, sin.vector, s);
}

// Threads for a row of `chunks`, each taking `each`: a power of two.
inline unsigned lanes_of(int64_t chunks, int each) {
  unsigned lanes = 1;
  while (lanes * each < chunks) lanes *= 2;
  return lanes;
}

// Rows<T, kChunks>::launch(task, lanes, stream). How a row is cut depends on the head dimension alone.
template <template <typename, int> class Rows, typename T, typename Task>
const char* launch_heads(Task& task, void* stream) {
  const int64_t chunks = ceil_div(task.dim, kChunk<T>);
  constexpr int kMost = kMaxDim / kChunk<T> / kWarp;
  if (chunks <= kWarp) return Rows<T, 1>::launch(task, lanes_of(chunks, 1), stream);
  if (chunks <= 2 * kWarp) return Rows<T, 2>::launch(task, lanes_of(chunks, 2), stream);
  return Rows<T, kMost>::launch(task, lanes_of(chunks, kMost), stream);
}

}  // namespace fusewire::cuda
