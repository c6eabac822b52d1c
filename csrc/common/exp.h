// e^x and SiLU on vectors, in the arithmetic of PyTorch's vectorised CPU kernels (SLEEF's expf and exp at 1.0 ULP), so that `exact` can have their
// bits and `close` their accuracy. For *_kernels.cpp.
#pragma once
#include <limits>

#include "common/exp2.h"
#include "common/moments.h"

namespace fusewire::FUSEWIRE_ISA {

// Whether a fused multiply-add is an instruction here: `close` fuses where that costs nothing, `exact` where PyTorch does.
#if defined(__FMA__) || defined(__AVX512F__)
inline constexpr bool kHasFma = true;
#else
inline constexpr bool kHasFma = false;
#endif

// x = n ln 2 + r, with ln 2 in two parts whose first product is exact; e^x = 2^n e^r.
template <typename C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr float log2e = 1.4426950408889634f, ln2_high = 0.693145751953125f, ln2_low = 1.428606765330187045e-06f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float low = -104.0f, high = 100.0f;
  static constexpr int bias = 127, mantissa = 23;
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr double log2e = 1.442695040888963407, ln2_high = .69314718055966295651160180568695068359375,
                          ln2_low = .28235290563031577122588448175013436025525412068e-12;
  static constexpr double round = 6755399441055744.0;
  static constexpr double low = -1000.0, high = 709.78271114955742909217217426;
  static constexpr int bias = 1023, mantissa = 52;
};

// e^r for |r| <= ln 2 / 2: Horner's rule in float32, Estrin's on the leading coefficients in float64.
template <int N, bool Fused>
FUSEWIRE_INLINE lanes<float, N> exp_reduced(lanes<float, N> r) {
  const auto step = [&](lanes<float, N> p, float c) { return stock_fma<Fused, N, float>(p, r, splat<N>(c)); };
  auto p = splat<N>(0.000198527617612853646278381f);
  p = step(p, 0.00139304355252534151077271f);
  p = step(p, 0.00833336077630519866943359f);
  p = step(p, 0.0416664853692054748535156f);
  p = step(p, 0.166666671633720397949219f);
  p = step(p, 0.5f);
  return splat<N>(1.0f) + stock_fma<Fused, N, float>(r * r, p, r);
}
template <int N, bool Fused>
FUSEWIRE_INLINE lanes<double, N> exp_reduced(lanes<double, N> r) {
  using V = lanes<double, N>;
  const auto pair = [&](V x, double high, double low) { return stock_fma<Fused, N, double>(x, splat<N>(high), splat<N>(low)); };
  const V r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
  const V low = stock_fma<Fused, N, double>(r2, pair(r, 0.1388888888914497797e-2, 0.8333333333314938210e-2),
                                            pair(r, 0.4166666666666602598e-1, 0.1666666666666669072e+0));
  const V middle = stock_fma<Fused, N, double>(r2, pair(r, 0.2755762628169491192e-6, 0.2755723402025388239e-5),
                                               pair(r, 0.2480158687479686264e-4, 0.1984126989855865850e-3));
  V p = stock_fma<Fused, N, double>(r8, pair(r, 0.2081276378237164457e-8, 0.2511210703042288022e-7), stock_fma<Fused, N, double>(r4, middle, low));
  p = stock_fma<Fused, N, double>(p, r, splat<N>(0.5));
  p = stock_fma<Fused, N, double>(p, r, splat<N>(1.0));
  return stock_fma<Fused, N, double>(p, r, splat<N>(1.0));
}

template <bool Fused, int N, typename C>
FUSEWIRE_INLINE lanes<C, N> exponential(lanes<C, N> x) {
  using K = ExpConstants<C>;
  using Ints = lanes<typename K::Int, N>;
  // The product is rounded before the integer is taken from it. Beyond the limits below, n is meaningless and replaced.
  const auto shifted = x * splat<N>(K::log2e) + splat<N>(K::round), n = shifted - splat<N>(K::round);
  auto r = stock_fma<Fused, N, C>(n, splat<N>(-K::ln2_high), x);
  r = stock_fma<Fused, N, C>(n, splat<N>(-K::ln2_low), r);
  const auto p = exp_reduced<N, Fused>(r);
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64) {  // multiplies by 2^n with one rounding, as the two factors below do
    lanes<C, N> y;
    if constexpr (sizeof(C) == 4) y = bits_as<lanes<C, N>>(_mm512_scalef_ps(bits_as<__m512>(p), bits_as<__m512>(n)));
    else y = bits_as<lanes<C, N>>(_mm512_scalef_pd(bits_as<__m512d>(p), bits_as<__m512d>(n)));
    y = x < splat<N>(K::low) ? lanes<C, N>{} : y;
    return x > splat<N>(K::high) ? splat<N>(std::numeric_limits<C>::infinity()) : y;
  }
#endif
  const Ints integer = bits_as<Ints>(shifted) - bits_as<Ints>(splat<N>(K::round)), half = integer >> 1;
  const auto power = [](Ints e) { return bits_as<lanes<C, N>>((e + K::bias) << K::mantissa); };
  auto y = p * power(half) * power(integer - half);
  y = x < splat<N>(K::low) ? lanes<C, N>{} : y;
  return x > splat<N>(K::high) ? splat<N>(std::numeric_limits<C>::infinity()) : y;
}

// x / (1 + e^-x)
template <bool Fused, int N, typename C>
FUSEWIRE_INLINE lanes<C, N> silu(lanes<C, N> x) {
  return x / (splat<N>(C(1)) + exponential<Fused, N, C>(-x));
}

#if defined(__AVX512F__)
// 2^x for a result of type T that is rounded once, in fewer steps: the processor takes the fraction and the power of two in one each.
template <typename T, int N>
FUSEWIRE_INLINE lanes<float, N> close_exp2(lanes<float, N> x) {
  constexpr int kDegree = std::is_same_v<T, bfloat16> ? 3 : 6;
  const auto f = bits_as<lanes<float, N>>(_mm512_reduce_ps(bits_as<__m512>(x), 0x09));  // x - floor(x)
  auto p = splat<N>(Exp2<kDegree>::c[kDegree - 1]);
#pragma GCC unroll 8
  for (int i = kDegree - 2; i >= 0; --i) p = fma<N, float>(p, f, splat<N>(Exp2<kDegree>::c[i]));
  p = fma<N, float>(p, f, splat<N>(1.0f));
  return bits_as<lanes<float, N>>(_mm512_scalef_ps(bits_as<__m512>(p), bits_as<__m512>(x)));
}
#endif

// e^x likewise, where the processor does.
template <typename T, int N>
FUSEWIRE_INLINE lanes<compute_t<T>, N> close_exponential(lanes<compute_t<T>, N> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64 && sizeof(x[0]) == 4) return close_exp2<T, N>(x * splat<N>(1.44269504f));
#endif
  return exponential<kHasFma, N, compute_t<T>>(x);
}

// silu by the C library's exp, lane by lane: what PyTorch does with the elements that do not fill its vectors.
template <int N, typename C>
FUSEWIRE_INLINE lanes<C, N> silu_by_library(lanes<C, N> x) {
  lanes<C, N> y;
  for (int i = 0; i < N; ++i) y[i] = x[i] / (1 + std::exp(-x[i]));
  return y;
}

}  // namespace fusewire::FUSEWIRE_ISA
