// What follows the matrix product of a linear layer: bias, activation, gate and residual on the float32 sums, rounded once.
// For *_kernels.cpp and amx_*.cpp.
#pragma once
#include <cmath>
#include <cstring>

#include "cpu/linear.h"

namespace fusewire::FUSEWIRE_ISA {

// e^x to about one unit in the last place: 2^n * e^r, r in [-ln 2 / 2, ln 2 / 2] (Cephes' polynomial). x is at most 88.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = std::fma(x, 1.44269504f, 12582912.0f);  // the low bits of the sum are n
  const float n = shifted - 12582912.0f;
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p * r, r, r) + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  const int32_t power = (bits << 23) + (127 << 23);
  float scale;
  std::memcpy(&scale, &power, 4);
  return p * scale;
}

// y / (1 + e^-z): silu for z = y; GELU's tanh form is y * sigmoid(2 u), u = sqrt(2 / pi) * (y + 0.044715 y^3)
inline float logistic(float y, float z) { return z < -87.0f ? y * 0.0f : y / (1.0f + exponential(-z)); }

inline void activate(float* y, int64_t count, Activation activation) {
  if (activation == Activation::gelu_tanh) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = logistic(y[i], 1.5957691216f * std::fma(0.044715f * y[i] * y[i], y[i], y[i]));
  } else if (activation == Activation::silu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = logistic(y[i], y[i]);
  }
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
    activate(y, cols_, c_.activation);
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
