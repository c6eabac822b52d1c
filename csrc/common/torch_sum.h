// Sums in the order in which PyTorch's CPU kernel sums a contiguous row (`sum`, `mean` over the last dimension): 32-byte vectors (its
// AVX2 kernel, which it also uses where there is AVX-512), four of them side by side, rows of 64 vectors and more in a cascade of
// partial sums, the tail one by one, then the lanes of the vector one by one. The rooms compare it with the installed torch at import.
// Only for *_kernels.cpp: the functions live in the namespace of the ISA level that they are compiled for.
#pragma once
#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

template <typename S>
inline constexpr int kSumLanes = 32 / sizeof(S);

// The squares of a row, computed as S: what is summed. A summand has vector<N>(i), its elements i..i+N, and one(i).
template <typename S, typename T>
struct Squares {
  const T* x;
  template <int N>
  FUSEWIRE_INLINE lanes<S, N> vector(int64_t i) const {
    const auto v = __builtin_convertvector(load<N>(x + i), lanes<S, N>);
    return v * v;
  }
  FUSEWIRE_INLINE S one(int64_t i) const {
    const S v = static_cast<S>(to_float(x[i]));
    return v * v;
  }
};

// Four stock vectors side by side, in registers of this ISA level.
template <typename S>
struct SumGroup {
  static constexpr int kWidth = 4 * kSumLanes<S>, N = kLanes<S>, kCount = kWidth / N;
  lanes<S, N> part[kCount] = {};

  template <typename F>
  FUSEWIRE_INLINE void add(const F& f, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int j = 0; j < kCount; ++j) part[j] += f.template vector<N>(i * kWidth + j * N);
    }
  }
  FUSEWIRE_INLINE void add(const SumGroup& other) {
    for (int j = 0; j < kCount; ++j) part[j] += other.part[j];
  }
};

// 64 vectors and more: four levels, each folded into the next after `step` of its sums.
template <typename S, typename F>
static SumGroup<S> cascade(const F& f, int64_t groups) {
  int power = 0;
  while ((int64_t{1} << power) < groups) ++power;  // ceil(log2(groups))
  power = power / 4 > 4 ? power / 4 : 4;
  const int64_t step = int64_t{1} << power;
  SumGroup<S> level[4];
  int64_t i = 0;
  while (i + step <= groups) {
    level[0].add(f, i, i + step);
    i += step;
    for (int l = 1; l < 4; ++l) {
      level[l].add(level[l - 1]);
      level[l - 1] = {};
      if ((i & ((step - 1) << (l * power))) != 0) break;
    }
  }
  level[0].add(f, i, groups);
  for (int l = 1; l < 4; ++l) level[0].add(level[l]);
  return level[0];
}

// Everything but the sum over lanes, for n of at least kSumLanes: the sum is tail + lane[0] + lane[1] + ...
template <typename S, typename F>
FUSEWIRE_INLINE void torch_sum_lanes(const F& f, int64_t n, S* lane, S* tail) {
  constexpr int W = kSumLanes<S>;
  const int64_t vectors = n / W, groups = vectors / 4;
  SumGroup<S> sums;
  if (groups < 16) {
    sums.add(f, 0, groups);
  } else {
    sums = cascade<S>(f, groups);
  }
  using V = lanes<S, W>;
  V quarter[4];
  std::memcpy(quarter, sums.part, sizeof(quarter));
  for (int64_t i = groups * 4; i < vectors; ++i) quarter[0] += f.template vector<W>(i * W);
  const V sum = quarter[0] + quarter[1] + quarter[2] + quarter[3];
  std::memcpy(lane, &sum, sizeof(sum));
  S rest = 0;
  for (int64_t i = vectors * W; i < n; ++i) rest += f.one(i);
  *tail = rest;
}

// The whole sum of n values. Rows shorter than a vector are summed in four interleaved scalars.
template <typename S, typename F>
FUSEWIRE_INLINE S torch_sum(const F& f, int64_t n) {
  constexpr int W = kSumLanes<S>;
  if (n < W) {
    S acc[4] = {};
    for (int64_t i = 0; i < n; ++i) acc[i < n / 4 * 4 ? i % 4 : 0] += f.one(i);
    return acc[0] + acc[1] + acc[2] + acc[3];
  }
  S lane[W], sum;
  torch_sum_lanes(f, n, lane, &sum);
  for (int j = 0; j < W; ++j) sum += lane[j];
  return sum;
}

}  // namespace fusewire::FUSEWIRE_ISA
