// What follows the matrix product of a linear layer: bias, activation, gate and residual on the float32 sums, rounded once.
// For *_kernels.cpp and amx_*.cpp.
#pragma once
#include <algorithm>

#include "common/activations.h"
#include "cpu/linear.h"

namespace fusewire::FUSEWIRE_ISA {

// The last row of a tensor that was read, as floats: neighbours often share one (a gate for each sample).
template <typename T>
class RowCache {
 public:
  const float* read(const T* row, int64_t stride, int64_t count) {
    if (row != last_) {
      if (stride == 1) {
        for_columns<kLanes<float>>(0, count, [&](const auto& at) __attribute__((always_inline)) { at.store(values_, at.load(row)); });
      } else {
        for (int64_t i = 0; i < count; ++i) values_[i] = to_float(row[i * stride]);
      }
    }
    last_ = row;
    return values_;
  }

 private:
  const T* last_ = nullptr;
  alignas(64) float values_[kLinearCols];
};

struct Identity {
  template <typename T, int N>
  FUSEWIRE_INLINE static lanes<float, N> value(lanes<float, N> x) { return x; }
};

// Columns [col, col + cols) of the output.
template <typename T>
class Epilogue {
 public:
  Epilogue(const LinearCall& call, int64_t col, int64_t cols) : c_(call), col_(col), cols_(cols) {}

  // Writes rows [first, first + count) of the output from their sums, which lie `pitch` floats apart.
  void rows(int64_t first, int64_t count, const float* sums, int64_t pitch) {
    switch (c_.activation) {
      case Activation::none: return rows_by<Identity>(first, count, sums, pitch);
      case Activation::gelu_tanh: return rows_by<GeluTanh>(first, count, sums, pitch);
      case Activation::gelu_erf: return rows_by<GeluErf>(first, count, sums, pitch);
      case Activation::silu: return rows_by<Silu>(first, count, sums, pitch);
    }
  }

 private:
  static constexpr int64_t kAheadBytes = 24 * 64;

  template <typename Act>
  void rows_by(int64_t first, int64_t count, const float* sums, int64_t pitch) {
    constexpr int N = kLanes<float>;
    const float* const bias = c_.bias ? bias_.read(static_cast<const T*>(c_.bias) + col_ * c_.bias_stride, c_.bias_stride, cols_) : nullptr;
    const int64_t bytes = cols_ * static_cast<int64_t>(sizeof(T)), ahead = std::max<int64_t>(4, kAheadBytes / bytes);
    for (int64_t r = first; r < first + count; ++r, sums += pitch) {
      const float *const gate = read(gate_, c_.gate, r), *const residual = read(residual_, c_.residual, r);
      const auto finish = [&](const auto& at) __attribute__((always_inline)) {
        lanes<float, N> y = at.load(sums);
        if (bias) y += at.load(bias);
        y = Act::template value<T, N>(y);
        if (gate) y *= at.load(gate);
        if (residual) y += at.load(residual);
        return y;
      };
      T* const out = static_cast<T*>(c_.out) + r * c_.outputs + col_;
      const char* later = reinterpret_cast<const char*>(out + ahead * c_.outputs);  // cold memory, asked for early
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(later + at, 1);
      int64_t j = 0;
      for (; j + 2 * N <= cols_; j += 2 * N) put_pair<false, N>(out + j, finish(Whole<N>{j}), finish(Whole<N>{j + N}));
      for_columns<N>(j, cols_, [&](const auto& at) __attribute__((always_inline)) { at.store(out, finish(at)); });
    }
  }

  const float* read(RowCache<T>& cache, const LeadingRows& rows, int64_t r) {
    if (!rows.data) return nullptr;
    return cache.read(static_cast<const T*>(rows.data) + rows.offset(r) + col_ * rows.channel, rows.channel, cols_);
  }
  const LinearCall& c_;
  const int64_t col_, cols_;
  RowCache<T> bias_, gate_, residual_;
};

}  // namespace fusewire::FUSEWIRE_ISA
