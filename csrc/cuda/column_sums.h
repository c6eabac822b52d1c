// Sums over rows on CUDA, the second step: what a room's kernel wrote in parts is added up. No atomics: the same bits every time.
#pragma once
#include "cuda/views.h"

namespace fusewire::cuda {

// out[i] [samples, C] = the sums over parts[i] [samples, count, C], several of them in one launch; zeros where there are no parts.
struct ColumnSums {
  static constexpr int kMax = 8;

  const float* parts[kMax];
  void* out[kMax];  // contiguous
  int64_t count[kMax], samples[kMax];
  int64_t end[kMax];  // set by the launch: the blocks of out[0 .. i]
  int sums, channels;
  bool vector;  // rows of all `out` can be written 16 bytes at a time

  void add(const float* these_parts, void* to, int64_t of_samples, int64_t parts_of_each) {
    parts[sums] = these_parts, out[sums] = to, samples[sums] = of_samples, count[sums] = parts_of_each;
    ++sums;
  }
};

// nullptr, or what went wrong. `type` is that of the outputs; parts start on 16 bytes.
const char* launch_column_sums(ColumnSums task, Type type, void* stream);

}  // namespace fusewire::cuda
