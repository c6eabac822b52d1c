// Mean and variance of contiguous rows. For *_kernels.cpp.
#pragma once
#include "common/stock_order.h"
#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

// a * b + c, with one rounding where Fused, otherwise with two.
template <bool Fused, int N, typename C>
FUSEWIRE_INLINE lanes<C, N> stock_fma(lanes<C, N> a, lanes<C, N> b, lanes<C, N> c) {
  if constexpr (Fused) return fma<N, C>(a, b, c);
  return a * b + c;
}
template <typename C>
FUSEWIRE_INLINE C stock_fma(bool fused, C a, C b, C c) { return fused ? std::fma(a, b, c) : a * b + c; }

// The moments of a row as PyTorch's layer norm computes them, bit for bit (ATen's RowwiseMoments, since 2.0): Welford's updates per lane in chunks
// of 16 vectors, the chunks' moments added pairwise up a cascade, then the row's tail element by element, then the lanes one after another.
// A vector of 16-bit elements counts as one: both its halves are folded into the same lanes.
template <typename T, bool Fused>
class StockMoments {
  using C = compute_t<T>;
  static constexpr int N = 32 / sizeof(C), kHalves = sizeof(C) / sizeof(T), kChunk = 16, kDepth = 48;
  using V = lanes<C, N>;
  struct Sums {
    int64_t count = 0;
    V mean{}, square{};
  };

  int64_t channels_, vectors_;
  int depth_;
  bool fused_tail_;
  C share_[N], before_[N];  // adding lane i: its share of the count so far, and the count before it

  FUSEWIRE_INLINE static void add(Sums& to, int64_t count, V mean, V square) {
    const int64_t total = to.count + count;
    const C share = total == 0 ? C(0) : static_cast<C>(count) / static_cast<C>(total);
    const V delta = mean - to.mean, step = splat<N>(share) * delta, weighted = delta * splat<N>(static_cast<C>(to.count));
    const V squares = to.square + square;
    to.mean = to.mean + step;
    to.square = stock_fma<Fused, N, C>(weighted, step, squares);
    to.count = total;
  }

  // G chunks of `count` vectors side by side: their updates are independent, which hides the latency of each. Both halves of a vector too.
  static constexpr int kWide = N * kHalves;
  using Wide = lanes<C, kWide>;
  struct Halves { V part[kHalves]; };

  template <int G>
  FUSEWIRE_INLINE static void update(const T* x, int64_t count, Wide (&mean)[G], Wide (&square)[G]) {
    static constexpr C kShares[kChunk] = {C(1) / 1, C(1) / 2,  C(1) / 3,  C(1) / 4,  C(1) / 5,  C(1) / 6,  C(1) / 7,  C(1) / 8,
                                          C(1) / 9, C(1) / 10, C(1) / 11, C(1) / 12, C(1) / 13, C(1) / 14, C(1) / 15, C(1) / 16};
    for (int g = 0; g < G; ++g) mean[g] = square[g] = Wide{};
    for (int64_t j = 0; j < count; ++j) {
      const Wide part = splat<kWide>(kShares[j]);
      for (int g = 0; g < G; ++g) {
        const Wide value = load<kWide>(x + (g * kChunk + j) * kWide);
        const Wide delta = value - mean[g];
        mean[g] = stock_fma<Fused, kWide, C>(part, delta, mean[g]);
        square[g] = stock_fma<Fused, kWide, C>(delta, value - mean[g], square[g]);
      }
    }
  }

  template <int G>
  FUSEWIRE_INLINE void chunks(const T* x, int64_t first, int64_t count, Sums* stack) const {
    Wide mean[G], square[G];
    update<G>(x + first * kChunk * kWide, count, mean, square);
    for (int g = 0; g < G; ++g) {
      const auto means = bits_as<Halves>(mean[g]), squares = bits_as<Halves>(square[g]);
      for (int h = 0; h < kHalves; ++h) add(stack[0], count, means.part[h], squares.part[h]);
      int64_t mask = first + g + 1;
      for (int level = 1; level < depth_ && (mask & 1) == 0; ++level, mask >>= 1) {
        add(stack[level], stack[level - 1].count, stack[level - 1].mean, stack[level - 1].square);
        stack[level - 1] = Sums{};
      }
    }
  }

 public:
  StockMoments(int64_t channels, StockOrder order)
      : channels_(channels), vectors_(channels / (N * kHalves)), fused_tail_(order == StockOrder::fused) {
    const int64_t chunk_count = (vectors_ + kChunk - 1) / kChunk;
    depth_ = 1;
    while ((int64_t{1} << depth_) < chunk_count) ++depth_;
    const int64_t per_lane = vectors_ * kHalves, tail = channels - vectors_ * N * kHalves;
    for (int i = 0; i < N; ++i) {
      const int64_t before = tail + i * per_lane, total = before + per_lane;
      share_[i] = total == 0 ? C(0) : static_cast<C>(per_lane) / static_cast<C>(total);
      before_[i] = static_cast<C>(before);
    }
  }

  // Means and variances of R rows x[r] [channels]. The rows are independent; the last, serial step runs over all of them at once.
  template <int R>
  void operator()(const T* const (&x)[R], C (&mean)[R], C (&variance)[R]) const {
    C means[N][R], squares[N][R];
    C tail_mean[R], tail_square[R];
    for (int r = 0; r < R; ++r) {
      Sums stack[kDepth];
      int64_t chunk = 0;
      const int64_t full = vectors_ / kChunk;
      constexpr int kSide = kRegisterBytes == 64 ? 6 : 4 / kHalves;
      for (; chunk + kSide <= full; chunk += kSide) chunks<kSide>(x[r], chunk, kChunk, stack);
      for (; chunk + 2 <= full; chunk += 2) chunks<2>(x[r], chunk, kChunk, stack);
      for (; chunk < full; ++chunk) chunks<1>(x[r], chunk, kChunk, stack);
      if (vectors_ % kChunk) chunks<1>(x[r], chunk, vectors_ % kChunk, stack);
      for (int level = 1; level < depth_; ++level) add(stack[0], stack[level].count, stack[level].mean, stack[level].square);
      for (int i = 0; i < N; ++i) means[i][r] = stack[0].mean[i], squares[i][r] = stack[0].square[i];

      C m = 0, s = 0;
      int64_t count = 0;
      for (int64_t i = vectors_ * N * kHalves; i < channels_; ++i) {
        const C value = to_float(x[r][i]), delta = value - m;
        m += delta / static_cast<C>(++count);
        s = stock_fma(fused_tail_, delta, value - m, s);
      }
      tail_mean[r] = m, tail_square[r] = s;
    }
    for (int i = 0; i < N; ++i) {
      for (int r = 0; r < R; ++r) {
        const C delta = means[i][r] - tail_mean[r];
        tail_mean[r] = stock_fma(Fused, share_[i], delta, tail_mean[r]);
        tail_square[r] += stock_fma(Fused, delta * delta * share_[i], before_[i], squares[i][r]);
      }
    }
    for (int r = 0; r < R; ++r) mean[r] = tail_mean[r], variance[r] = tail_square[r] / static_cast<C>(channels_);
  }
};

// The sum of a vector's lanes by halves: log2(N) roundings, where one lane after the other would take N.
template <int N, typename C>
FUSEWIRE_INLINE C sum_of_lanes(lanes<C, N> v) {
  C part[N];
  for (int l = 0; l < N; ++l) part[l] = v[l];
  for (int width = N / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) part[l] += part[l + width];
  }
  return part[0];
}

// Mean and variance of a row of n > 0, accurate whatever the mean: mean = pivot + offset, both needed where the variance is far below mean^2.
template <typename C>
struct Moments { C pivot, offset, variance; };

// Sums of x - pivot and of its squares, vector by vector: kSide of each side by side, to be taken in turn, which hides the latency of each.
template <typename C>
class PivotSums {
  static constexpr int N = kLanes<C>, kSide = 4;
  using V = lanes<C, N>;

 public:
  explicit FUSEWIRE_INLINE PivotSums(C pivot) : pivot_(pivot) {}

  FUSEWIRE_INLINE void take(int side, V value) {
    const V d = value - splat<N>(pivot_);
    sum_[side] += d;
    square_[side] = fma<N, C>(d, d, square_[side]);
  }
  // The whole vectors of a row, which `value(column)` gives.
  template <typename Value>
  FUSEWIRE_INLINE void take_row(int64_t n, const Value& value) {
    int64_t i = 0;
    for (; i + kSide * N <= n; i += kSide * N) {
      for (int s = 0; s < kSide; ++s) take(s, value(Whole<N>{i + s * N}));
    }
    for (; i + N <= n; i += N) take(0, value(Whole<N>{i}));
  }
  // The moments of x, whose whole vectors were taken. The variance may come out below zero.
  template <typename X>
  FUSEWIRE_INLINE Moments<C> moments(const X* x, int64_t n) const {
    C rest = 0, rest_square = 0;  // of the elements beyond the last vector, apart: a small sum rounds finely
    for (int64_t i = n / N * N; i < n; ++i) {
      const C d = to_float(x[i]) - pivot_;
      rest += d;
      rest_square += d * d;
    }
    const C total = sum_of_lanes<N, C>((sum_[0] + sum_[1]) + (sum_[2] + sum_[3])) + rest;
    const C squares = sum_of_lanes<N, C>((square_[0] + square_[1]) + (square_[2] + square_[3])) + rest_square;
    const C offset = total / static_cast<C>(n);
    return {pivot_, offset, squares / static_cast<C>(n) - offset * offset};
  }

 private:
  const C pivot_;
  V sum_[kSide]{}, square_[kSide]{};
};

// The moments of a row that is being made: `value(column)` gives it, `make(column)` too, and writes it to x. The pivot is the mean of its first 16 elements:
// offset^2 is then about a sixteenth of the variance at every ISA level, and subtracting it costs nothing. Where it is more than a standard deviation off,
// it would cost digits: then once more around the mean just found.
template <typename X, typename Value, typename Make>
FUSEWIRE_INLINE Moments<compute_t<X>> moments_on_the_way(const X* x, int64_t n, const Value& value, const Make& make) {
  using C = compute_t<X>;
  constexpr int N = kLanes<C>, kHead = 16;
  static_assert(kHead % N == 0);
  C pivot = 0;
  if (n >= kHead) {
    lanes<C, N> head{};
    for (int i = 0; i < kHead; i += N) head += value(Whole<N>{i});
    pivot = sum_of_lanes<N, C>(head) / static_cast<C>(kHead);
  } else {
    for_columns<N>(0, n, make);
    for (int64_t i = 0; i < n; ++i) pivot += to_float(x[i]);
    pivot /= static_cast<C>(n);
  }
  PivotSums<C> sums(pivot);
  sums.take_row(n, make);
  for_columns<N>(n / N * N, n, make);
  Moments<C> m = sums.moments(x, n);
  if (m.offset * m.offset > m.variance) {
    PivotSums<C> again(pivot + m.offset);
    again.take_row(n, [&](const auto& at) __attribute__((always_inline)) { return at.load(x); });
    m = again.moments(x, n);
  }
  if (m.variance < 0) m.variance = 0;  // NaN stays
  return m;
}

// The moments of a row of n > 0 that lies in memory.
template <typename X>
FUSEWIRE_INLINE Moments<compute_t<X>> pivot_moments(const X* x, int64_t n) {
  const auto load = [&](const auto& at) __attribute__((always_inline)) { return at.load(x); };
  return moments_on_the_way(x, n, load, load);
}

// The mean of the squares of a row of n > 0.
template <typename X>
FUSEWIRE_INLINE compute_t<X> mean_square(const X* x, int64_t n) {
  using C = compute_t<X>;
  constexpr int N = kLanes<C>, kSide = 4;
  lanes<C, N> square[kSide]{};
  int64_t i = 0;
  for (; i + kSide * N <= n; i += kSide * N) {
    for (int s = 0; s < kSide; ++s) {
      const auto value = load<N>(x + i + s * N);
      square[s] = fma<N, C>(value, value, square[s]);
    }
  }
  for (; i + N <= n; i += N) {
    const auto value = load<N>(x + i);
    square[0] = fma<N, C>(value, value, square[0]);
  }
  const auto squares = (square[0] + square[1]) + (square[2] + square[3]);
  C rest = 0;
  for (; i < n; ++i) rest += to_float(x[i]) * to_float(x[i]);
  return (sum_of_lanes<N, C>(squares) + rest) / static_cast<C>(n);
}

}  // namespace fusewire::FUSEWIRE_ISA
