// adaLN modulation: loops over one row, compiled once per ISA level.
#include "cpu/adaln.h"

#include <cmath>

namespace fusewire::FUSEWIRE_ISA {

template <typename T>
static void row(const AdalnRow& r) {
  using C = compute_t<T>;
  const T* x = static_cast<const T*>(r.x);
  const T* shift = static_cast<const T*>(r.shift);
  const T* scale = static_cast<const T*>(r.scale);
  T* out = static_cast<T*>(r.out);
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < r.channels; ++i) sum += to_float(x[i * r.x_stride]);
  const C mean = sum / r.channels;
  C squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < r.channels; ++i) {
    const C d = to_float(x[i * r.x_stride]) - mean;
    squares += d * d;
  }
  const C rstd = 1 / std::sqrt(squares / r.channels + static_cast<C>(r.eps));
#pragma omp simd
  for (int64_t i = 0; i < r.channels; ++i) {
    const C y = (to_float(x[i * r.x_stride]) - mean) * rstd;
    out[i] = from_float<T>(y * (1 + to_float(scale[i * r.scale_stride])) + to_float(shift[i * r.shift_stride]));
  }
}

void adaln_row(const AdalnRow& r, float) { row<float>(r); }
void adaln_row(const AdalnRow& r, double) { row<double>(r); }
void adaln_row(const AdalnRow& r, bfloat16) { row<bfloat16>(r); }
void adaln_row(const AdalnRow& r, float16) { row<float16>(r); }

}  // namespace fusewire::FUSEWIRE_ISA
