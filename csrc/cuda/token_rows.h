// Rows of tokens in registers, for the adaLN kernels. Included by *_kernels.cu alone.
#pragma once
#include "cuda/device.h"

namespace fusewire::cuda {

// Which chunks of a row [channels] a thread has: threadIdx.x, and every blockDim.x-th from there. kVector: every row of every tensor can be moved
// 16 bytes at a time, and is made of whole chunks.
template <typename T, int kChunks, bool kVector>
struct Row {
  int64_t batch, token;
  int left;  // elements from this thread's first chunk on that are inside the row, or less than 0; 0 in rows that are not there

  __device__ Row(bool there, int channels) : left(there ? channels - channel(0) : 0) {}
  __device__ int count(int j) const { return left - static_cast<int>(j * blockDim.x) * kChunk<T>; }  // as load_chunk wants it
  __device__ int channel(int j) const { return (threadIdx.x + j * blockDim.x) * kChunk<T>; }
  __device__ bool inside(int j, int i) const { return kVector ? count(j) > 0 : i < count(j); }
  __device__ const T* of(const Tokens& x) const { return static_cast<const T*>(x.data) + (batch * x.batch + token * x.token); }
};

// A thread's chunks of one row of a tensor. kVector: they are asked for at once, before anything waits for the first, and unpacked later.
template <typename T, int kChunks, bool kVector>
struct Chunks;

template <typename T, int kChunks>
struct Chunks<T, kChunks, true> {
  uint4 bits[kChunks];

  __device__ Chunks(const Row<T, kChunks, true>& row, const Tokens& x) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) bits[j] = row.count(j) > 0 ? *reinterpret_cast<const uint4*>(row.of(x) + row.channel(j)) : uint4{};
  }
  __device__ void get(int j, float (&r)[kChunk<T>]) const { widen_bits<T>(bits[j], r); }
};

template <typename T, int kChunks>
struct Chunks<T, kChunks, false> {
  const Row<T, kChunks, false>& row;
  const Tokens& x;

  __device__ Chunks(const Row<T, kChunks, false>& row_, const Tokens& x_) : row(row_), x(x_) {}
  __device__ void get(int j, float (&r)[kChunk<T>]) const {
    load_chunk(row.of(x) + row.channel(j) * x.channel, x.channel, row.count(j), x.vector, r);
  }
};

}  // namespace fusewire::cuda
