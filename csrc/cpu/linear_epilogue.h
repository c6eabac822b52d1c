// What follows the matrix product of a linear layer: bias, activation, gate and residual on the float32 sums, rounded once.
// For *_kernels.cpp and amx_*.cpp.
#pragma once
#include "common/activations.h"
#include "cpu/linear.h"

namespace fusewire::FUSEWIRE_ISA {

// In place; rounded to T later.
template <typename T>
void activate(float* y, int64_t count, Activation activation) {
  constexpr int N = kLanes<float>;
  const auto each = [&](auto function) {
    for_columns<N>(0, count, [&](const auto& at) __attribute__((always_inline)) { at.store(y, decltype(function)::template value<T, N>(at.load(y))); });
  };
  if (activation == Activation::gelu_tanh) each(GeluTanh{});
  if (activation == Activation::silu) each(Silu{});
}

// The last row of a tensor that was read, as floats: neighbours often share one (bias, a gate for each sample).
template <typename T>
struct RowCache {
  const T* last = nullptr;
  alignas(64) float values[kLinearCols];
  const float* read(const T* row, int64_t stride, int64_t count) {
    if (row != last) {
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) values[i] = to_float(row[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) values[i] = to_float(row[i * stride]);
      }
    }
    last = row;
    return values;
  }
};

// Columns [col, col + cols) of the output, a row at a time.
template <typename T>
class Epilogue {
 public:
  Epilogue(const LinearCall& call, int64_t col, int64_t cols) : c_(call), col_(col), cols_(cols) {}

  // Writes a row of the output from its sums y, which are used up.
  void row(int64_t r, float* y) {
    const int64_t cols = cols_;
    if (c_.bias) {
      const float* values = bias_.read(static_cast<const T*>(c_.bias) + col_ * c_.bias_stride, c_.bias_stride, cols_);
#pragma omp simd
      for (int64_t i = 0; i < cols; ++i) y[i] += values[i];
    }
    activate<T>(y, cols_, c_.activation);
    if (c_.gate.data) {
      const float* values = read(gate_, c_.gate, r);
#pragma omp simd
      for (int64_t i = 0; i < cols; ++i) y[i] *= values[i];
    }
    if (c_.residual.data) {
      const float* values = read(residual_, c_.residual, r);
#pragma omp simd
      for (int64_t i = 0; i < cols; ++i) y[i] += values[i];
    }
    T* out = static_cast<T*>(c_.out) + r * c_.outputs + col_;
    const char* later = reinterpret_cast<const char*>(out + 4 * c_.outputs);  // cold memory, asked for early
    for (int64_t at = 0; at < cols * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(later + at, 1);
#pragma omp simd
    for (int64_t i = 0; i < cols; ++i) out[i] = from_float<T>(y[i]);
  }

 private:
  const float* read(RowCache<T>& cache, const LeadingRows& rows, int64_t r) {
    return cache.read(static_cast<const T*>(rows.data) + rows.offset(r) + col_ * rows.channel, rows.channel, cols_);
  }
  const LinearCall& c_;
  const int64_t col_, cols_;
  RowCache<T> bias_, gate_, residual_;
};

}  // namespace fusewire::FUSEWIRE_ISA
