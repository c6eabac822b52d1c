// Activation functions and their slopes on short vectors. For *_kernels.cpp.
#pragma once
#include "common/exp.h"

namespace fusewire::FUSEWIRE_ISA {

// 1 / x for x >= 1 (to 1.2e-38, what is smaller is not told apart) and NaN, for a result of type T: where a division takes longer than all the rest, an
// estimate and (but for bfloat16) one step of Newton's method, good to a unit in the last place.
template <typename T, int N>
FUSEWIRE_INLINE lanes<compute_t<T>, N> close_reciprocal(lanes<compute_t<T>, N> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64 && sizeof(x[0]) == 4) {
    const auto r = bits_as<lanes<float, N>>(_mm512_maskz_rcp14_ps(0xffff, bits_as<__m512>(x)));
    if constexpr (std::is_same_v<T, bfloat16>) return r;
    const auto finite = bits_as<lanes<float, N>>(_mm512_min_ps(bits_as<__m512>(x), _mm512_set1_ps(0x1p126f)));  // infinity * 0 would be NaN
    return fma<N, float>(r, fma<N, float>(-finite, r, splat<N>(1.0f)), r);
  }
#endif
  return 1 / x;
}

// y / (1 + e^(-scale * z)): silu for z = y. NaN where y is infinite and the power too, as in stock.
template <typename T, int N>
FUSEWIRE_INLINE lanes<compute_t<T>, N> logistic(lanes<compute_t<T>, N> y, lanes<compute_t<T>, N> z, double scale = 1) {
  using C = compute_t<T>;
#if defined(__AVX512F__)
  if constexpr (sizeof(z) == 64 && sizeof(C) == 4) {
    return y * close_reciprocal<T, N>(1 + close_exp2<T, N>(z * splat<N>(static_cast<float>(-ExpConstants<double>::log2e * scale))));
  }
#endif
  return y / (1 + exponential<kHasFma, N, C>(z * splat<N>(C(-scale))));
}

// s = 1 / (1 + e^-z) and s * (1 - s), but for 16 bits, which do not show it, without the difference: it cancels where s is almost 1.
template <typename V>
struct Logistic { V s, product; };
template <typename T, int N>
FUSEWIRE_INLINE Logistic<lanes<compute_t<T>, N>> logistic_and_slope(lanes<compute_t<T>, N> z) {
  using C = compute_t<T>;
  if constexpr (sizeof(T) == 2) {
    const lanes<C, N> s = logistic<T, N>(splat<N>(C(1)), z);
    return {s, s * (1 - s)};
  } else {
    const lanes<C, N> e = close_exponential<T, N>(z < 0 ? z : -z), part = close_reciprocal<T, N>(1 + e), rest = e * part;
    return {z < 0 ? rest : part, rest * part};
  }
}

// What a GELU needs at x: the standard normal's weight beyond |x|, and e^(-x^2 / 2).
template <typename V>
struct NormalTail { V beyond, density; };

// P(X > a) = e^(-a^2 / 2) * t * p(t) / 2, t = 1 / (1 + k a). p is the minimax polynomial for the relative error on [0, 14], with p(1) = 1: of degree 8
// 4e-8, of degree 5 for bfloat16 9e-6. Beyond 12.9 the weight is below the normal numbers of float32.
template <typename T>
struct TailPolynomial {
  static constexpr int degree = 8;
  static constexpr float k = 0.35f, c[9] = {0.279244065f, 0.279698431f, 0.239877269f, 0.210060239f, -0.0436601527f, 0.314172477f, -0.507358849f,
                                            0.28576857f, -0.0578021081f};
};
template <>
struct TailPolynomial<bfloat16> {
  static constexpr int degree = 5;
  static constexpr float k = 0.3f, c[6] = {0.240162104f, 0.22730674f, 0.289248288f, -0.0358181931f, 0.434089929f, -0.15498887f};
};
template <typename T, int N>
FUSEWIRE_INLINE NormalTail<lanes<compute_t<T>, N>> normal_tail(lanes<compute_t<T>, N> a) {
  using C = compute_t<T>;
  if constexpr (sizeof(C) == 8) {
    lanes<C, N> beyond;
    for (int i = 0; i < N; ++i) beyond[i] = 0.5 * std::erfc(a[i] * 0.70710678118654752440);
    return {beyond, exponential<kHasFma, N, C>(-0.5 * a * a)};
  } else {
    using P = TailPolynomial<T>;
    const auto t = close_reciprocal<T, N>(fma<N, C>(splat<N>(P::k), a, splat<N>(1.0f)));
    auto p = splat<N>(P::c[P::degree]);
#pragma GCC unroll 8
    for (int i = P::degree - 1; i >= 0; --i) p = fma<N, C>(p, t, splat<N>(P::c[i]));
    const auto density = close_exponential<T, N>(-0.5f * a * a);
    return {0.5f * density * t * p, density};
  }
}

// x * P(X <= x) = max(x, 0) - |x| * P(X > |x|), which keeps its relative precision at both ends.
struct GeluErf {
  template <typename T, int N, typename C = compute_t<T>>
  FUSEWIRE_INLINE static lanes<C, N> value(lanes<C, N> x) {
    const lanes<C, N> near = within<C, N>(x);
    return (x > 0 ? x : lanes<C, N>{}) - near * normal_tail<T, N>(near).beyond;
  }
  // P(X <= x) + x * e^(-x^2 / 2) / sqrt(2 pi)
  template <typename T, int N, typename C = compute_t<T>>
  FUSEWIRE_INLINE static void both(lanes<C, N> x, lanes<C, N>& y, lanes<C, N>& slope) {
    const lanes<C, N> near = within<C, N>(x);
    const auto tail = normal_tail<T, N>(near);
    y = (x > 0 ? x : lanes<C, N>{}) - near * tail.beyond;
    const lanes<C, N> bump = near * tail.density * C(0.39894228040143267794), beyond = near != 0 ? tail.beyond : x == 0 ? splat<N>(C(0.5)) : lanes<C, N>{};
    slope = x > 0 ? 1 - beyond + bump : beyond - bump;
  }

 private:
  // |x|, but 0 above 12.9, where the tail is below the normal numbers of float32, which take a processor a hundred times as long, and counts as 0
  template <typename C, int N>
  FUSEWIRE_INLINE static lanes<C, N> within(lanes<C, N> x) {
    const lanes<C, N> a = x < 0 ? -x : x;
    return a > splat<N>(C(12.9)) ? lanes<C, N>{} : a;
  }
};

// x * s(2 u) with the logistic s, u = sqrt(2 / pi) * (x + 0.044715 x^3): no cancellation where u is large and negative.
struct GeluTanh {
  // x * (a + b x^2) = factor * 2 u
  template <typename T, int N, typename C = compute_t<T>>
  FUSEWIRE_INLINE static lanes<C, N> twice_u(lanes<C, N> x, double factor = 1) {
    const double a = 1.5957691216057308 * factor;
    return x * fma<N, C>(splat<N>(C(a * 0.044715)), x * x, splat<N>(C(a)));
  }
  template <typename T, int N, typename C = compute_t<T>>
  FUSEWIRE_INLINE static lanes<C, N> value(lanes<C, N> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(x) == 64 && sizeof(C) == 4) return x * close_reciprocal<T, N>(1 + close_exp2<T, N>(twice_u<T, N>(x, -ExpConstants<double>::log2e)));
#endif
    return logistic<T, N>(x, twice_u<T, N>(x));
  }
  // s + x * s * (1 - s) * (2 u)'
  template <typename T, int N, typename C = compute_t<T>>
  FUSEWIRE_INLINE static void both(lanes<C, N> x, lanes<C, N>& y, lanes<C, N>& slope) {
    const auto logistic = logistic_and_slope<T, N>(twice_u<T, N>(x));
    const lanes<C, N> steep = C(1.5957691216057308) * fma<N, C>(C(3 * 0.044715) * x, x, splat<N>(C(1)));
    y = x * logistic.s;
    slope = fma<N, C>(x * logistic.product, steep, logistic.s);
  }
};

// x / (1 + e^(-s x)): SiLU for s = 1, CLIP's quick GELU for s = 1.702.
template <bool Quick>
struct ScaledSilu {
  template <typename C>
  static constexpr C kScale = Quick ? C(1.702) : C(1);
  template <typename T, int N, typename C = compute_t<T>>
  FUSEWIRE_INLINE static lanes<C, N> value(lanes<C, N> x) { return logistic<T, N>(x, x, kScale<double>); }
  // s(z) + z * s(z) * (1 - s(z)), z = scale * x
  template <typename T, int N, typename C = compute_t<T>>
  FUSEWIRE_INLINE static void both(lanes<C, N> x, lanes<C, N>& y, lanes<C, N>& slope) {
    const lanes<C, N> z = kScale<C> * x;
    const auto logistic = logistic_and_slope<T, N>(z);
    y = x * logistic.s;
    slope = fma<N, C>(z, logistic.product, logistic.s);
  }
};
using Silu = ScaledSilu<false>;
using QuickGelu = ScaledSilu<true>;

}  // namespace fusewire::FUSEWIRE_ISA
