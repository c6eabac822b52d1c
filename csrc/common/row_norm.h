// Norms of contiguous rows in the rounding of `close`, and their gradients. For *_kernels.cpp.
#pragma once
#include "common/moments.h"

namespace fusewire::FUSEWIRE_ISA {

// A row's norm: xhat = (x - a) * b + c. RMSNorm has a = c = 0; for LayerNorm a is a pivot and c makes up for what it lacks to the mean.
template <typename C>
struct RowNorm { C a, b, c; };

template <typename C>
FUSEWIRE_INLINE RowNorm<C> layer_norm_of(const Moments<C>& m, C eps) {
  const C rstd = 1 / std::sqrt(m.variance + eps);
  return {m.pivot, rstd, -m.offset * rstd};
}

// The norm of a row of n > 0.
template <bool Rms, typename X>
FUSEWIRE_INLINE RowNorm<compute_t<X>> row_norm(const X* x, int64_t n, compute_t<X> eps) {
  if constexpr (Rms) {
    return {0, 1 / std::sqrt(mean_square(x, n) + eps), 0};
  } else {
    return layer_norm_of(pivot_moments(x, n), eps);
  }
}

template <bool Rms, int N, typename C>
FUSEWIRE_INLINE lanes<C, N> row_normalised(lanes<C, N> x, const RowNorm<C>& row) {
  if constexpr (Rms) return x * splat<N>(row.b);
  return fma<N, C>(x - splat<N>(row.a), splat<N>(row.b), splat<N>(row.c));
}

// What a row's gradient needs beside its norm: the means of g and of g * xhat over the row, g being the gradient of xhat.
template <typename C>
struct GradientMeans { C g, g_xhat; };

// `upstream(column)` gives g at a column: the output's gradient times what xhat was multiplied by (a weight, 1 + scale).
template <bool Rms, typename X, typename Upstream>
FUSEWIRE_INLINE GradientMeans<compute_t<X>> gradient_means(const X* x, int64_t n, const RowNorm<compute_t<X>>& row, const Upstream& upstream) {
  using C = compute_t<X>;
  constexpr int N = kLanes<C>, kSide = 4;
  lanes<C, N> plain[kSide]{}, weighted[kSide]{};
  const auto take = [&](int s, const auto& at) __attribute__((always_inline)) {
    const lanes<C, N> g = upstream(at);
    if constexpr (!Rms) plain[s] += g;
    weighted[s] = fma<N, C>(g, row_normalised<Rms, N, C>(at.load(x), row), weighted[s]);
  };
  int64_t i = 0;
  for (; i + kSide * N <= n; i += kSide * N) {
    for (int s = 0; s < kSide; ++s) take(s, Whole<N>{i + s * N});
  }
  for_columns<N>(i, n, [&](const auto& at) __attribute__((always_inline)) { take(0, at); });
  const lanes<C, N> g = (plain[0] + plain[1]) + (plain[2] + plain[3]), g_xhat = (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
  return {sum_of_lanes<N, C>(g) / static_cast<C>(n), sum_of_lanes<N, C>(g_xhat) / static_cast<C>(n)};
}

// dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd; RMSNorm subtracts no mean.
template <bool Rms, int N, typename C>
FUSEWIRE_INLINE lanes<C, N> row_gradient(lanes<C, N> g, lanes<C, N> xhat, const RowNorm<C>& row, const GradientMeans<C>& means) {
  const lanes<C, N> centred = Rms ? g : g - splat<N>(means.g);
  return fma<N, C>(xhat, splat<N>(-means.g_xhat), centred) * splat<N>(row.b);
}

}  // namespace fusewire::FUSEWIRE_ISA
