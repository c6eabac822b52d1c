// LayerNorm over the channels of pictures whose pixels lie side by side: a vector's lanes are pixels, so that nothing is turned. Each pixel's sums are in the
// order of norm_kernels.cpp, which reads pictures of any other strides: the same bits. Compiled once per ISA level.
#include <memory>

#include "cpu/norm_pixels.h"

namespace fusewire::FUSEWIRE_ISA {

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
  static constexpr int W = kLanes<C>, kPixels = kPictureBytes / sizeof(T), kVectors = kPixels / W;
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
      if (next) fetch_pixels(next + i * k_.x_channel);
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

 public:
  explicit NormPictures(const PictureNormTask& k)
      : k_(k), n_(k.channels), stock_(k.channels, k.order), affine_(new C[2 * n_]), tile_(new T[n_ * kPixels]()),
        weight_(affine_vector<T>(k.weight, n_, affine_.get())), bias_(affine_vector<T>(k.bias, n_, affine_.get() + n_)) {}

  void run(int64_t begin, int64_t end) const {
    const int64_t tiles = (k_.pixels + kPixels - 1) / kPixels;
    const auto at = [&](int64_t item) { return static_cast<const T*>(k_.x) + item / tiles * k_.x_batch + item % tiles * kPixels; };
    const bool meet = channels_meet<T>(k_.x_channel);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % tiles * kPixels;
      const int count = static_cast<int>(std::min<int64_t>(kPixels, k_.pixels - first));
      T* const out = static_cast<T*>(k_.out) + item / tiles * n_ * k_.pixels + first;
      const T *const x = at(item), *const next = meet || item + 1 == end ? nullptr : at(item + 1);
      const bool whole = count == kPixels;
      if (meet || !whole) copy_pixels(x, k_.x_channel, tile_.get(), kPixels, n_, count);
      tile(meet || !whole ? Channels<T>{tile_.get(), kPixels} : Channels<T>{x, k_.x_channel}, whole ? out : tile_.get(),
           whole ? k_.pixels : kPixels, next);
      if (!whole) copy_pixels(tile_.get(), kPixels, out, k_.pixels, n_, count);
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
