// Tiles of pictures whose pixels lie side by side, a vector's lanes being pixels, and the moments of each pixel's channels. For norm_picture*_kernels.cpp.
#pragma once
#include <algorithm>

#include "common/row_norm.h"
#include "cpu/norm_affine.h"

namespace fusewire::FUSEWIRE_ISA {

template <typename C>
using pixels = lanes<C, kLanes<C>>;

// As RowNorm: xhat = (x - a) * b + c of each pixel.
template <typename C>
struct PixelNorm { pixels<C> a, b, c; };

template <typename C>
FUSEWIRE_INLINE pixels<C> root(pixels<C> x) {
  for (int l = 0; l < kLanes<C>; ++l) x[l] = std::sqrt(x[l]);
  return x;
}

// sum_of_lanes (moments.h) where the lanes are N vectors.
template <int N, typename V>
FUSEWIRE_INLINE V sum_of_vectors(const V (&v)[N]) {
  V part[N];
  for (int l = 0; l < N; ++l) part[l] = v[l];
  for (int width = N / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) part[l] += part[l + width];
  }
  return part[0];
}

// The channels of some pixels, `pitch` elements apart: at(c, v) is the v-th vector of pixels.
template <typename T>
struct Channels {
  const T* x;
  int64_t pitch;
  FUSEWIRE_INLINE pixels<compute_t<T>> at(int64_t channel, int v) const { return load<kLanes<compute_t<T>>>(x + channel * pitch + v * kLanes<compute_t<T>>); }
};

// Vectors of pixels that are summed side by side: a channel's lie in one page, the next channel's in another.
template <typename T>
inline constexpr int kSideBySide = std::min(kPictureBytes / static_cast<int>(sizeof(T)) / kLanes<compute_t<T>>, 4);

// PivotSums and moments_on_the_way (moments.h) for kSideBySide vectors of pixels.
template <typename T>
class PixelMoments {
  using C = compute_t<T>;
  static constexpr int W = kLanes<C>, N = W, G = kSideBySide<T>, kSide = 4, kAtOnce = (kRegisterBytes == 64 ? 8 : 4) / G, kHead = 16;
  using V = pixels<C>;

  const Channels<T> x_;
  const int64_t n_;

  FUSEWIRE_INLINE void around(const V (&pivot)[G], V (&offset)[G], V (&variance)[G]) const {
    V sums[kSide * N][G], squares[kSide * N][G];  // a row's vectors are taken by kSide sums of N lanes in turn, those left over by the first
    const int64_t whole = n_ / (kSide * N) * (kSide * N), vectors = n_ / N * N;
    for (int first = 0; first < kSide * N; first += kAtOnce) {
      V sum[kAtOnce][G]{}, square[kAtOnce][G]{};
      const auto take = [&](int64_t channel) __attribute__((always_inline)) {
        for (int s = 0; s < kAtOnce; ++s) {
          for (int v = 0; v < G; ++v) {
            const V d = x_.at(channel + s, v) - pivot[v];
            sum[s][v] += d;
            square[s][v] = fma<W, C>(d, d, square[s][v]);
          }
        }
      };
      for (int64_t i = first; i < whole; i += kSide * N) take(i);
      if (first < N) {
        for (int64_t i = whole + first; i < vectors; i += N) take(i);
      }
      std::memcpy(sums[first], sum, sizeof(sum));
      std::memcpy(squares[first], square, sizeof(square));
    }
    V rest[G]{}, rest_square[G]{};
    for (int64_t i = vectors; i < n_; ++i) {
      for (int v = 0; v < G; ++v) {
        const V d = x_.at(i, v) - pivot[v];
        rest[v] += d;
        rest_square[v] += d * d;
      }
    }
    const V count = splat<W>(static_cast<C>(n_));
    for (int v = 0; v < G; ++v) {
      V sum[N], square[N];
      for (int l = 0; l < N; ++l) {
        sum[l] = (sums[l][v] + sums[N + l][v]) + (sums[2 * N + l][v] + sums[3 * N + l][v]);
        square[l] = (squares[l][v] + squares[N + l][v]) + (squares[2 * N + l][v] + squares[3 * N + l][v]);
      }
      offset[v] = (sum_of_vectors<N>(sum) + rest[v]) / count;
      variance[v] = (sum_of_vectors<N>(square) + rest_square[v]) / count - offset[v] * offset[v];
    }
  }

  FUSEWIRE_INLINE V pivot(int v) const {
    if (n_ < kHead) {
      V sum{};
      for (int64_t i = 0; i < n_; ++i) sum += x_.at(i, v);
      return sum / splat<W>(static_cast<C>(n_));
    }
    V head[N]{};
    for (int i = 0; i < kHead; ++i) head[i % N] += x_.at(i, v);
    return sum_of_vectors<N>(head) / splat<W>(static_cast<C>(kHead));
  }

 public:
  FUSEWIRE_INLINE PixelMoments(const Channels<T>& x, int64_t n) : x_(x), n_(n) {}

  FUSEWIRE_INLINE void norm(C eps, PixelNorm<C>* norm) const {
    V pivots[G], offset[G], variance[G];
    for (int v = 0; v < G; ++v) pivots[v] = pivot(v);
    around(pivots, offset, variance);
    bool any = false;
    for (int v = 0; v < G; ++v) {
      const auto far = offset[v] * offset[v] > variance[v];
      for (int l = 0; l < W; ++l) any |= far[l] != 0;
    }
    if (any) {  // of these pixels alone: what lies beside a pixel must not change it
      V again[G], offset2[G], variance2[G];
      for (int v = 0; v < G; ++v) again[v] = pivots[v] + offset[v];
      around(again, offset2, variance2);
      for (int v = 0; v < G; ++v) {
        const auto far = offset[v] * offset[v] > variance[v];
        pivots[v] = far ? again[v] : pivots[v], offset[v] = far ? offset2[v] : offset[v], variance[v] = far ? variance2[v] : variance[v];
      }
    }
    for (int v = 0; v < G; ++v) {
      const V rstd = splat<W>(C(1)) / root<C>((variance[v] < V{} ? V{} : variance[v]) + splat<W>(eps));  // NaN stays
      norm[v] = {pivots[v], rstd, -offset[v] * rstd};
    }
  }
};

// A tile's pixels of one channel.
template <typename T>
FUSEWIRE_INLINE void fetch_pixels(const T* x) {
  for (int line = 0; line < kPictureBytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(x) + line);
}

// Whether channels so many elements apart share few sets of the cache: they are read once, into scratch memory.
template <typename T>
FUSEWIRE_INLINE bool channels_meet(int64_t pitch) { return pitch * sizeof(T) % 1024 == 0; }

// Between a tile of `count` pixels in a tensor and one in scratch memory. The pixels beyond `count` stay what they are.
template <typename T>
void copy_pixels(const T* from, int64_t from_pitch, T* to, int64_t to_pitch, int64_t channels, int count) {
  constexpr int kPixels = kPictureBytes / sizeof(T), kAhead = 32;
  if (count < kPixels) {
    for (int64_t i = 0; i < channels; ++i) std::memcpy(to + i * to_pitch, from + i * from_pitch, count * sizeof(T));
  } else {
    for (int64_t i = 0; i < channels; ++i) {
      if (i + kAhead < channels) fetch_pixels(from + (i + kAhead) * from_pitch);
      std::memcpy(to + i * to_pitch, from + i * from_pitch, kPictureBytes);
    }
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
