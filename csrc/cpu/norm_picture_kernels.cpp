// LayerNorm over the channels of pictures whose pixels lie side by side: a vector's lanes are pixels, so that nothing is turned. Each pixel's sums are in the
// order of norm_kernels.cpp, which reads pictures of any other strides: the same bits. Compiled once per ISA level.
#include <algorithm>
#include <memory>

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

// StockMoments (moments.h) for kSideBySide vectors of pixels: what are the lanes of a vector there are N channels here.
template <typename T, bool Fused>
class StockPixelMoments {
  using C = compute_t<T>;
  static constexpr int W = kLanes<C>, N = 32 / sizeof(C), G = kSideBySide<T>, kHalves = sizeof(C) / sizeof(T), kChunk = 16;
  using V = pixels<C>;
  struct Sums {
    int64_t count = 0;
    V mean[N]{}, square[N]{};
  };

  const int64_t channels_, vectors_;
  int depth_ = 1;
  const bool fused_tail_;
  std::unique_ptr<Sums[][G]> stack_;

  FUSEWIRE_INLINE static void add(Sums& to, const Sums& from) {
    const int64_t total = to.count + from.count;
    const V share = splat<W>(total == 0 ? C(0) : static_cast<C>(from.count) / static_cast<C>(total)), before = splat<W>(static_cast<C>(to.count));
    for (int i = 0; i < N; ++i) {
      const V delta = from.mean[i] - to.mean[i], step = share * delta;
      to.mean[i] = to.mean[i] + step;
      to.square[i] = stock_fma<Fused, W, C>(delta * before, step, to.square[i] + from.square[i]);
    }
    to.count = total;
  }

  // Welford's updates of N neighbouring channels from `first` on, `count` times.
  FUSEWIRE_INLINE static void update(const Channels<T>& x, int64_t first, int v, int64_t count, Sums& sums) {
    V mean[N]{}, square[N]{};
    for (int64_t j = 0; j < count; ++j) {
      const V part = splat<W>(C(1) / static_cast<C>(j + 1));
      for (int i = 0; i < N; ++i) {
        const V value = x.at(first + j * N * kHalves + i, v), delta = value - mean[i];
        mean[i] = stock_fma<Fused, W, C>(part, delta, mean[i]);
        square[i] = stock_fma<Fused, W, C>(delta, value - mean[i], square[i]);
      }
    }
    sums.count = count;
    for (int i = 0; i < N; ++i) sums.mean[i] = mean[i], sums.square[i] = square[i];
  }

  // The lanes one after another, and the channels beyond the last vector before them.
  FUSEWIRE_INLINE PixelNorm<C> close_up(const Channels<T>& x, int v, const Sums& sums, C eps) const {
    const int64_t per_lane = vectors_ * kHalves, tail = channels_ - per_lane * N;
    V mean{}, square{};
    for (int64_t i = 0; i < tail; ++i) {
      const V value = x.at(per_lane * N + i, v), delta = value - mean;
      mean += delta / splat<W>(static_cast<C>(i + 1));
      square = fused_tail_ ? fma<W, C>(delta, value - mean, square) : delta * (value - mean) + square;
    }
    for (int i = 0; i < N; ++i) {
      const int64_t before = tail + i * per_lane, total = before + per_lane;
      const V share = splat<W>(total == 0 ? C(0) : static_cast<C>(per_lane) / static_cast<C>(total)), delta = sums.mean[i] - mean;
      mean = stock_fma<Fused, W, C>(share, delta, mean);
      square += stock_fma<Fused, W, C>(delta * delta * share, splat<W>(static_cast<C>(before)), sums.square[i]);
    }
    const V variance = square / splat<W>(static_cast<C>(channels_)), rstd = splat<W>(C(1)) / root<C>(variance + splat<W>(eps));
    return {mean, rstd, -rstd * mean};
  }

 public:
  StockPixelMoments(int64_t channels, StockOrder order)
      : channels_(channels), vectors_(channels / (N * kHalves)), fused_tail_(order == StockOrder::fused) {
    while ((int64_t{1} << depth_) < (vectors_ + kChunk - 1) / kChunk) ++depth_;
    stack_.reset(new Sums[depth_][G]);
  }

  FUSEWIRE_INLINE void norm(const Channels<T>& x, C eps, PixelNorm<C>* norm) const {
    for (int level = 0; level < depth_; ++level) {
      for (int v = 0; v < G; ++v) stack_[level][v] = Sums{};
    }
    for (int64_t first = 0; first < vectors_; first += kChunk) {
      const int64_t count = std::min<int64_t>(kChunk, vectors_ - first);
      for (int v = 0; v < G; ++v) {
        for (int h = 0; h < kHalves; ++h) {
          Sums chunk;
          update(x, (first * kHalves + h) * N, v, count, chunk);
          add(stack_[0][v], chunk);
        }
        int64_t mask = first / kChunk + 1;
        for (int level = 1; level < depth_ && (mask & 1) == 0; ++level, mask >>= 1) {
          add(stack_[level][v], stack_[level - 1][v]);
          stack_[level - 1][v] = Sums{};
        }
      }
    }
    for (int v = 0; v < G; ++v) {
      for (int level = 1; level < depth_; ++level) add(stack_[0][v], stack_[level][v]);
      norm[v] = close_up(x, v, stack_[0][v], eps);
    }
  }
};

template <typename T, bool Exact, bool Fused>
class NormPictures {
  using C = compute_t<T>;
  static constexpr int W = kLanes<C>, kPixels = kPictureBytes / sizeof(T), kVectors = kPixels / W, kAhead = 32;
  using V = pixels<C>;

  const PictureNormTask& k_;
  const int64_t n_;
  const StockPixelMoments<T, Fused> stock_;
  const std::unique_ptr<C[]> affine_;
  const std::unique_ptr<T[]> tile_;
  const C *weight_, *bias_;

  template <bool Weight, bool Bias>
  FUSEWIRE_INLINE static V value(V x, const PixelNorm<C>& norm, V weight, V bias) {
    if constexpr (!Exact) {
      const V y = fma<W, C>(x - norm.a, norm.b, norm.c);
      if constexpr (Weight && Bias) return fma<W, C>(y, weight, bias);
      return Weight ? y * weight : Bias ? y + bias : y;
    } else {
      const V y = sizeof(T) == sizeof(C) ? (x - norm.a) * norm.b : stock_fma<Fused, W, C>(x, norm.b, norm.c);
      return Weight || Bias ? stock_fma<Fused, W, C>(y, weight, bias) : y;
    }
  }

  // One tile. `next`: where the tile after it begins, which is on its way meanwhile: its channels lie too far apart for the processor to see them coming.
  template <bool Weight, bool Bias>
  FUSEWIRE_INLINE void write(const Channels<T>& x, T* out, int64_t out_pitch, const PixelNorm<C> (&norm)[kVectors], const T* next) const {
    for (int64_t i = 0; i < n_; ++i) {
      if (next) fetch(next + i * k_.x_channel);
      for (int line = 0; line < kPictureBytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(out + (i + 8) * out_pitch) + line, 1);
      const V weight = splat<W>(Weight ? weight_[i] : C(1)), bias = splat<W>(Bias ? bias_[i] : C(0));
      for (int v = 0; v < kVectors; ++v) store<W>(out + i * out_pitch + v * W, value<Weight, Bias>(x.at(i, v), norm[v], weight, bias));
    }
  }

  FUSEWIRE_INLINE void tile(const Channels<T>& x, T* out, int64_t out_pitch, const T* next) const {
    PixelNorm<C> norm[kVectors];
    for (int v = 0; v < kVectors; v += kSideBySide<T>) {
      const Channels<T> part{x.x + v * W, x.pitch};
      if constexpr (Exact) {
        stock_.norm(part, static_cast<C>(k_.eps), norm + v);
      } else {
        PixelMoments<T>(part, n_).norm(static_cast<C>(k_.eps), norm + v);
      }
    }
    if (weight_ && bias_) return write<true, true>(x, out, out_pitch, norm, next);
    if (weight_) return write<true, false>(x, out, out_pitch, norm, next);
    if (bias_) return write<false, true>(x, out, out_pitch, norm, next);
    write<false, false>(x, out, out_pitch, norm, next);
  }

  // Between a tile of `count` pixels in a tensor and one in scratch memory. The pixels beyond `count` stay what they are.
  void copy(const T* from, int64_t from_pitch, T* to, int64_t to_pitch, int count) const {
    if (count < kPixels) {
      for (int64_t i = 0; i < n_; ++i) std::memcpy(to + i * to_pitch, from + i * from_pitch, count * sizeof(T));
    } else {
      for (int64_t i = 0; i < n_; ++i) {
        if (i + kAhead < n_) fetch(from + (i + kAhead) * from_pitch);
        std::memcpy(to + i * to_pitch, from + i * from_pitch, kPictureBytes);
      }
    }
  }

  FUSEWIRE_INLINE static void fetch(const T* x) {
    for (int line = 0; line < kPictureBytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(x) + line);
  }

 public:
  explicit NormPictures(const PictureNormTask& k)
      : k_(k), n_(k.channels), stock_(k.channels, k.order), affine_(new C[2 * n_]), tile_(new T[n_ * kPixels]()),
        weight_(affine_vector<T>(k.weight, n_, affine_.get())), bias_(affine_vector<T>(k.bias, n_, affine_.get() + n_)) {}

  void run(int64_t begin, int64_t end) const {
    const int64_t tiles = (k_.pixels + kPixels - 1) / kPixels;
    const auto at = [&](int64_t item) { return static_cast<const T*>(k_.x) + item / tiles * k_.x_batch + item % tiles * kPixels; };
    const bool meet = k_.x_channel * sizeof(T) % 1024 == 0;  // channels that lie so share few sets of the cache: they are read once
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % tiles * kPixels;
      const int count = static_cast<int>(std::min<int64_t>(kPixels, k_.pixels - first));
      T* const out = static_cast<T*>(k_.out) + item / tiles * n_ * k_.pixels + first;
      const T *const x = at(item), *const next = meet || item + 1 == end ? nullptr : at(item + 1);
      const bool whole = count == kPixels;
      if (meet || !whole) copy(x, k_.x_channel, tile_.get(), kPixels, count);
      tile(meet || !whole ? Channels<T>{tile_.get(), kPixels} : Channels<T>{x, k_.x_channel}, whole ? out : tile_.get(),
           whole ? k_.pixels : kPixels, next);
      if (!whole) copy(tile_.get(), kPixels, out, k_.pixels, count);
    }
  }
};

template <typename T>
static void choose(const PictureNormTask& k, int64_t begin, int64_t end) {
  if (!k.exact) return NormPictures<T, false, false>(k).run(begin, end);
  if (k.order != StockOrder::portable) return NormPictures<T, true, true>(k).run(begin, end);
  NormPictures<T, true, false>(k).run(begin, end);
}

void norm_pictures(const PictureNormTask& k, int64_t begin, int64_t end, float) { choose<float>(k, begin, end); }
void norm_pictures(const PictureNormTask& k, int64_t begin, int64_t end, double) { choose<double>(k, begin, end); }
void norm_pictures(const PictureNormTask& k, int64_t begin, int64_t end, bfloat16) { choose<bfloat16>(k, begin, end); }
void norm_pictures(const PictureNormTask& k, int64_t begin, int64_t end, float16) { choose<float16>(k, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
