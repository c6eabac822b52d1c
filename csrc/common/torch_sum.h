// Sums in the order in which PyTorch's CPU kernel sums a contiguous row (`sum`, `mean` over the last dimension): 32-byte vectors (its
// AVX2 kernel, which it also uses where there is AVX-512), four of them side by side, rows of 64 vectors and more in a cascade of
// partial sums, the tail one by one, then the lanes of the vector one by one. The rooms compare it with the installed torch at import.
// Only for *_kernels.cpp: the functions live in the namespace of the ISA level that they are compiled for.
#pragma once
#include <cstdint>

namespace fusewire::FUSEWIRE_ISA {

constexpr int kSumUnroll = 4;

template <typename S>
constexpr int kSumLanes = 32 / sizeof(S);

// acc[0..kWidth) += f(i) for groups i = begin..end of kWidth consecutive elements.
template <int kWidth, typename S, typename F>
inline void sum_groups(S* acc, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; ++i) {
#pragma omp simd
    for (int j = 0; j < kWidth; ++j) acc[j] += f(i * kWidth + j);
  }
}

// acc[0..kWidth) = the sum of `groups` groups: four levels, each folded into the next after `step` of its sums.
template <int kWidth, typename S, typename F>
inline void cascade_groups(S* acc, int64_t groups, const F& f) {
  int power = 0;
  while ((int64_t{1} << power) < groups) ++power;  // ceil(log2(groups))
  power = power / 4 > 4 ? power / 4 : 4;
  const int64_t step = int64_t{1} << power;
  if (groups < step) return sum_groups<kWidth>(acc, 0, groups, f);
  S level[4][kWidth] = {};
  int64_t i = 0;
  while (i + step <= groups) {
    sum_groups<kWidth>(level[0], i, i + step, f);
    i += step;
    for (int l = 1; l < 4; ++l) {
      for (int j = 0; j < kWidth; ++j) {
        level[l][j] += level[l - 1][j];
        level[l - 1][j] = 0;
      }
      if ((i & ((step - 1) << (l * power))) != 0) break;
    }
  }
  sum_groups<kWidth>(level[0], i, groups, f);
  for (int l = 1; l < 4; ++l) {
    for (int j = 0; j < kWidth; ++j) level[0][j] += level[l][j];
  }
  for (int j = 0; j < kWidth; ++j) acc[j] = level[0][j];
}

// Everything but the sum over lanes: lanes[0..kSumLanes) and the tail's sum. f(i) is the i-th of n values.
template <typename S, typename F>
inline void torch_sum_lanes(int64_t n, const F& f, S* __restrict lanes, S* tail) {
  constexpr int W = kSumLanes<S>;
  const int64_t vectors = n / W, groups = vectors / kSumUnroll;
  S acc[kSumUnroll * W] = {};
  cascade_groups<kSumUnroll * W>(acc, groups, f);
  sum_groups<W>(acc, groups * kSumUnroll, vectors, f);
#pragma omp simd
  for (int j = 0; j < W; ++j) lanes[j] = acc[j] + acc[W + j] + acc[2 * W + j] + acc[3 * W + j];
  S rest = 0;
  for (int64_t i = vectors * W; i < n; ++i) rest += f(i);
  *tail = rest;
}

// The whole sum. Rows shorter than a vector are summed in four interleaved scalars.
template <typename S, typename F>
inline S torch_sum(int64_t n, const F& f) {
  constexpr int W = kSumLanes<S>;
  if (n < W) {
    S acc[kSumUnroll] = {};
    const int64_t groups = n / kSumUnroll;
    for (int64_t i = 0; i < groups * kSumUnroll; ++i) acc[i % kSumUnroll] += f(i);
    for (int64_t i = groups * kSumUnroll; i < n; ++i) acc[0] += f(i);
    return acc[0] + acc[1] + acc[2] + acc[3];
  }
  S lanes[W], sum;
  torch_sum_lanes(n, f, lanes, &sum);
  for (int j = 0; j < W; ++j) sum += lanes[j];
  return sum;
}

}  // namespace fusewire::FUSEWIRE_ISA
