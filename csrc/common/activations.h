// Activation functions and their slopes on short vectors. For *_kernels.cpp.
#pragma once
#include "common/exp.h"

namespace fusewire::FUSEWIRE_ISA {

// y / (1 + e^-z): silu for z = y
template <int N, typename C>
FUSEWIRE_INLINE lanes<C, N> logistic(lanes<C, N> y, lanes<C, N> z) { return y / (1 + exponential<kHasFma, N, C>(-z)); }

// What a GELU needs at x: the standard normal's weight beyond |x|, and e^(-x^2 / 2).
template <typename V>
struct NormalTail { V beyond, density; };

// P(X > a) = e^(-a^2 / 2) * t * p(t) / 2, t = 1 / (1 + 0.35 a). p is the minimax polynomial of degree 8 for the relative error on [0, 14], 4e-8, with
// p(1) = 1. At 14 and beyond the weight is below every float that a gelu could show.
template <int N>
FUSEWIRE_INLINE NormalTail<lanes<float, N>> normal_tail(lanes<float, N> a) {
  using V = lanes<float, N>;
  constexpr float c[9] = {0.279244065f, 0.279698431f, 0.239877269f, 0.210060239f, -0.0436601527f, 0.314172477f, -0.507358849f, 0.28576857f, -0.0578021081f};
  const V t = 1 / fma<N, float>(splat<N>(0.35f), a, splat<N>(1.0f));
  V p = splat<N>(c[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) p = fma<N, float>(p, t, splat<N>(c[i]));
  const V density = exponential<kHasFma, N, float>(-0.5f * a * a);
  return {0.5f * density * t * p, density};
}
template <int N>
FUSEWIRE_INLINE NormalTail<lanes<double, N>> normal_tail(lanes<double, N> a) {
  lanes<double, N> beyond;
  for (int i = 0; i < N; ++i) beyond[i] = 0.5 * std::erfc(a[i] * 0.70710678118654752440);
  return {beyond, exponential<kHasFma, N, double>(-0.5 * a * a)};
}

// x * P(X <= x) = max(x, 0) - |x| * P(X > |x|), which keeps its relative precision at both ends.
struct GeluErf {
  template <int N, typename C>
  FUSEWIRE_INLINE static lanes<C, N> value(lanes<C, N> x) {
    const lanes<C, N> a = x < 0 ? -x : x, capped = a > 14 ? splat<N>(C(14)) : a;
    return (x > 0 ? x : lanes<C, N>{}) - capped * normal_tail<N>(capped).beyond;
  }
  // P(X <= x) + x * e^(-x^2 / 2) / sqrt(2 pi)
  template <int N, typename C>
  FUSEWIRE_INLINE static void both(lanes<C, N> x, lanes<C, N>& y, lanes<C, N>& slope) {
    const lanes<C, N> a = x < 0 ? -x : x, capped = a > 14 ? splat<N>(C(14)) : a;
    const auto tail = normal_tail<N>(capped);
    y = (x > 0 ? x : lanes<C, N>{}) - capped * tail.beyond;
    const lanes<C, N> bump = capped * tail.density * C(0.39894228040143267794);
    slope = x > 0 ? 1 - tail.beyond + bump : tail.beyond - bump;
  }
};

// x / (1 + e^(-s x)): SiLU for s = 1, CLIP's quick GELU for s = 1.702.
template <bool Quick>
struct ScaledSilu {
  template <typename C>
  static constexpr C kScale = Quick ? C(1.702) : C(1);
  template <int N, typename C>
  FUSEWIRE_INLINE static lanes<C, N> value(lanes<C, N> x) { return logistic<N, C>(x, kScale<C> * x); }
  // s(z) * (1 + z * (1 - s(z))), z = scale * x
  template <int N, typename C>
  FUSEWIRE_INLINE static void both(lanes<C, N> x, lanes<C, N>& y, lanes<C, N>& slope) {
    const lanes<C, N> z = kScale<C> * x, part = logistic<N, C>(splat<N>(C(1)), z);
    y = x * part;
    slope = part * fma<N, C>(z, 1 - part, splat<N>(C(1)));
  }
};
using Silu = ScaledSilu<false>;
using QuickGelu = ScaledSilu<true>;

}  // namespace fusewire::FUSEWIRE_ISA
