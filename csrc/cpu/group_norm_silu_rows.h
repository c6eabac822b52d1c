// What the forward and the backward kernels of group_norm_silu share: parameters, statistics, and the last steps of an element.
#pragma once
#include <cmath>

#include "common/exp.h"
#include "cpu/group_norm_silu.h"

namespace fusewire::FUSEWIRE_ISA {

// Element c of sample n of a parameter; `absent` where there is none.
template <typename T>
FUSEWIRE_INLINE compute_t<T> parameter(const Rows& p, int64_t n, int64_t c, compute_t<T> absent) {
  return p.data ? to_float(p.at<T>(n, 0)[c * p.channel]) : absent;
}

// Sums in float64, of float sums of at most 4096 elements each.
struct WideSums { double sum = 0, square = 0; };

// v - center and its square over n elements, v = x + add.
template <bool Added, typename T>
FUSEWIRE_INLINE void add_sums(const T* x, int64_t n, compute_t<T> add, compute_t<T> center, WideSums& sums) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>, kSide = 4, kBlock = 256 * N;
  using V = lanes<C, N>;
  const V around = splat<N>(center), plus = splat<N>(add);
  int64_t i = 0;
  while (i + N <= n) {
    V sum[kSide]{}, square[kSide]{};
    const auto take = [&](int s, V value) {
      const V d = (Added ? value + plus : value) - around;
      sum[s] += d;
      square[s] = stock_fma<kHasFma, N, C>(d, d, square[s]);
    };
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    for (; i + kSide * N <= end; i += kSide * N) {
      for (int s = 0; s < kSide; ++s) take(s, load<N>(x + i + s * N));
    }
    for (; i + N <= end; i += N) take(0, load<N>(x + i));
    const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]), squares = (square[0] + square[1]) + (square[2] + square[3]);
    for (int l = 0; l < N; ++l) sums.sum += all[l], sums.square += squares[l];
  }
  for (; i < n; ++i) {
    const C d = (Added ? to_float(x[i]) + add : to_float(x[i])) - center;
    sums.sum += d, sums.square += static_cast<double>(d) * d;
  }
}

// A group's mean = center + offset, both needed where the deviation is far below the mean.
template <typename C>
struct GroupMoments { C center; double offset, rstd; };

// False where `center` is more than a standard deviation off: the subtraction of offset^2 would cost digits.
template <typename C>
FUSEWIRE_INLINE bool group_moments(C center, const WideSums& sums, double count, double eps, GroupMoments<C>& m) {
  const double offset = sums.sum / count, variance = sums.square / count - offset * offset;
  m = {center, offset, 1 / std::sqrt((variance < 0 ? 0 : variance) + eps)};  // NaN stays
  return !(offset * offset > variance);
}

// The moments of group g of sample n of a [C, spatial] picture; x is the group's first element.
template <typename T>
GroupMoments<compute_t<T>> plane_moments(const GroupNormTask& k, const T* x, int64_t n, int64_t g) {
  using C = compute_t<T>;
  const int64_t d = k.group_channels(), s = k.spatial, head = s < 16 ? s : 16;
  C center = 0;
  for (int64_t i = 0; i < head; ++i) center += to_float(x[i]);
  center = center / static_cast<C>(head) + parameter<T>(k.add, n, g * d, 0);
  GroupMoments<C> m;
  for (int pass = 0;; ++pass) {
    WideSums sums;
    if (!k.add.data) {
      add_sums<false>(x, d * s, C(0), center, sums);
    } else {
      for (int64_t j = 0; j < d; ++j) add_sums<true>(x + j * s, s, parameter<T>(k.add, n, g * d + j, 0), center, sums);
    }
    if (group_moments(center, sums, static_cast<double>(d * s), k.eps, m) || pass == 1) return m;
    center = static_cast<C>(center + m.offset);
  }
}

// out = silu((v - center) * factor + offset): the norm and its modulation as one multiply-add.
template <typename C>
struct Affine { C factor, offset; };

template <typename T>
FUSEWIRE_INLINE Affine<compute_t<T>> close_affine(const GroupNormTask& k, int64_t n, int64_t c, const GroupMoments<compute_t<T>>& m) {
  using C = compute_t<T>;
  const double factor = m.rstd * parameter<T>(k.weight, 0, c, 1), offset = parameter<T>(k.bias, 0, c, 0) - m.offset * factor;
  const double scale = 1.0 + parameter<T>(k.scale, n, c, 0);
  return {static_cast<C>(factor * scale), static_cast<C>(offset * scale + parameter<T>(k.shift, n, c, 0))};
}

// Row `row` of sample n in `stats`.
template <typename T>
FUSEWIRE_INLINE compute_t<T>* coefficients(const GroupNormTask& k, int64_t n, GroupNormRow row) {
  return static_cast<compute_t<T>*>(k.stats) + (n * kGroupNormRows + row) * k.channels;
}

// The coefficients of a run of elements that share a channel, or of a pixel's channels.
template <typename C, typename Row = GroupNormRow, int kRows = kGroupNormRows>
struct PlaneRow {
  C value[kRows];
  template <int N, typename At>
  FUSEWIRE_INLINE lanes<C, N> get(Row row, const At&) const { return splat<N>(value[row]); }
};
template <typename C, typename Row = GroupNormRow>
struct PixelRow {
  const C* first;  // [rows, C]
  int64_t channels;
  template <int N, typename At>
  FUSEWIRE_INLINE lanes<C, N> get(Row row, const At& at) const { return at.load(first + row * channels); }
};

// sums[c] += sum over `count` pixels of f(v), for each channel: `take(at, pixel, sum, square)`. Tiles of pixels keep the sums in registers for long.
template <typename T, typename Take>
FUSEWIRE_INLINE void pixel_sums(const T* x, int64_t count, int64_t channels, compute_t<T>* sum, compute_t<T>* square, const Take& take) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>, kTile = 8;
  int64_t p = 0;
  for (; p + kTile <= count; p += kTile) {
    for_columns<N>(0, channels, [&](const auto& at) __attribute__((always_inline)) {
      auto s = at.load(sum), q = at.load(square);
      for (int r = 0; r < kTile; ++r) take(at, at.load(x + (p + r) * channels), s, q);
      at.store(sum, s), at.store(square, q);
    });
  }
  for (; p < count; ++p) {
    for_columns<N>(0, channels, [&](const auto& at) __attribute__((always_inline)) {
      auto s = at.load(sum), q = at.load(square);
      take(at, at.load(x + p * channels), s, q);
      at.store(sum, s), at.store(square, q);
    });
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
