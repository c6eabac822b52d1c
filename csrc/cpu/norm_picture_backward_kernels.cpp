// The gradients of LayerNorm over the channels of pictures whose pixels lie side by side: as norm_backward_kernels.cpp, a vector's lanes being pixels.
// Compiled once per ISA level.
#include <memory>

#include "cpu/norm_pixels.h"

namespace fusewire::FUSEWIRE_ISA {

// One pass over the channels of a tile of pixels finds their moments, a second what their gradients subtract; the third writes dx and adds to the sums
// over pixels, which stay apart by lanes until a block of tiles is done.
template <typename T>
class PictureGradients {
  using C = compute_t<T>;
  static constexpr int W = kLanes<C>, kPixels = kPictureBytes / sizeof(T), kVectors = kPixels / W, kChain = 64, kSide = 2;
  using V = pixels<C>;

  const PictureGradientTask& k_;
  const int64_t n_;
  const std::unique_ptr<C[]> room_;   // the weight, and the sums of a block: [2, C, W]
  const std::unique_ptr<T[]> tiles_;  // of x, grad and dx, where they are not in their tensors
  const C* weight_;
  C* const lanes_;

  FUSEWIRE_INLINE V upstream(const Channels<T>& grad, int64_t channel, int v) const {
    const V dy = grad.at(channel, v);
    return weight_ ? dy * splat<W>(weight_[channel]) : dy;
  }

  // The means of g and of g * xhat of each pixel, from short chains of sums: rounding errors grow with their length.
  FUSEWIRE_INLINE void means(const Channels<T>& x, const Channels<T>& grad, const PixelNorm<C>* norm, int v, V* mean, V* mean_xhat) const {
    constexpr int G = kSideBySide<T>;
    V total[G]{}, total_xhat[G]{};
    for (int64_t first = 0; first < n_; first += kChain) {
      V sum[kSide][G]{}, sum_xhat[kSide][G]{};
      const auto take = [&](int side, int64_t channel) __attribute__((always_inline)) {
        for (int i = 0; i < G; ++i) {
          const V g = upstream(grad, channel, v + i), xhat = fma<W, C>(x.at(channel, v + i) - norm[i].a, norm[i].b, norm[i].c);
          sum[side][i] += g;
          sum_xhat[side][i] = fma<W, C>(g, xhat, sum_xhat[side][i]);
        }
      };
      const int64_t last = std::min<int64_t>(first + kChain, n_);
      int64_t channel = first;
      for (; channel + kSide <= last; channel += kSide) {
        for (int side = 0; side < kSide; ++side) take(side, channel + side);
      }
      if (channel < last) take(0, channel);
      for (int i = 0; i < G; ++i) total[i] += sum[0][i] + sum[1][i], total_xhat[i] += sum_xhat[0][i] + sum_xhat[1][i];
    }
    const V count = splat<W>(static_cast<C>(n_));
    for (int i = 0; i < G; ++i) mean[i] = total[i] / count, mean_xhat[i] = total_xhat[i] / count;
  }

  struct Next { const T *x, *grad; };  // where the next tile begins, which is on its way meanwhile; null: nowhere

  template <bool Dx, bool Sums>
  FUSEWIRE_INLINE void write(const Channels<T>& x, const Channels<T>& grad, T* dx, int64_t pitch, const PixelNorm<C> (&norm)[kVectors],
                             const V (&mean)[kVectors], const V (&mean_xhat)[kVectors], const Next& next) const {
    for (int64_t i = 0; i < n_; ++i) {
      if (next.x) fetch_pixels(next.x + i * k_.x_channel), fetch_pixels(next.grad + i * k_.grad_channel);
      V by_xhat{}, plain{};
      const V weight = splat<W>(weight_ ? weight_[i] : C(1));
      for (int v = 0; v < kVectors; ++v) {
        const V dy = grad.at(i, v), xhat = fma<W, C>(x.at(i, v) - norm[v].a, norm[v].b, norm[v].c);
        if constexpr (Sums) by_xhat = fma<W, C>(dy, xhat, by_xhat), plain += dy;
        if constexpr (Dx) store<W>(dx + i * pitch + v * W, fma<W, C>(xhat, -mean_xhat[v], dy * weight - mean[v]) * norm[v].b);
      }
      if constexpr (Sums) {
        C *to_xhat = lanes_ + i * W, *to_plain = lanes_ + (n_ + i) * W;
        store<W>(to_xhat, load<W>(to_xhat) + by_xhat), store<W>(to_plain, load<W>(to_plain) + plain);
      }
    }
  }

  FUSEWIRE_INLINE void tile(const Channels<T>& x, const Channels<T>& grad, T* dx, int64_t pitch, const Next& next) const {
    PixelNorm<C> norm[kVectors];
    V mean[kVectors], mean_xhat[kVectors];
    for (int v = 0; v < kVectors; v += kSideBySide<T>) {
      PixelMoments<T>(Channels<T>{x.x + v * W, x.pitch}, n_).norm(static_cast<C>(k_.eps), norm + v);
      if (dx) means(x, grad, norm + v, v, mean + v, mean_xhat + v);
    }
    if (!dx) return write<false, true>(x, grad, dx, pitch, norm, mean, mean_xhat, next);
    if (!k_.sums) return write<true, false>(x, grad, dx, pitch, norm, mean, mean_xhat, next);
    write<true, true>(x, grad, dx, pitch, norm, mean, mean_xhat, next);
  }

  // A tile in its tensor, or a copy of it in `room`, where pixels that are not there are zero.
  FUSEWIRE_INLINE Channels<T> read(const T* from, int64_t pitch, int count, T* room) const {
    if (count == kPixels && !channels_meet<T>(pitch)) return {from, pitch};
    copy_pixels(from, pitch, room, kPixels, n_, count);
    for (int64_t i = 0; count < kPixels && i < n_; ++i) std::memset(room + i * kPixels + count, 0, (kPixels - count) * sizeof(T));
    return {room, kPixels};
  }

 public:
  explicit PictureGradients(const PictureGradientTask& k)
      : k_(k), n_(k.channels), room_(new C[n_ + 2 * n_ * W]()), tiles_(new T[3 * n_ * kPixels]),
        weight_(affine_vector<T>(k.weight, n_, room_.get())), lanes_(room_.get() + n_) {}

  void run(int64_t block) const {
    const int64_t per_picture = (k_.pixels + kPixels - 1) / kPixels, end = k_.blocks.end(block);
    const bool apart = channels_meet<T>(k_.x_channel) || channels_meet<T>(k_.grad_channel);
    const auto at = [&](const void* data, int64_t batch, int64_t item) {
      return static_cast<const T*>(data) + item / per_picture * batch + item % per_picture * kPixels;
    };
    if (k_.sums) std::memset(lanes_, 0, 2 * n_ * W * sizeof(C));
    for (int64_t item = k_.blocks.begin(block); item < end; ++item) {
      const int64_t first = item % per_picture * kPixels;
      const int count = static_cast<int>(std::min<int64_t>(kPixels, k_.pixels - first));
      const auto x = read(at(k_.x, k_.x_batch, item), k_.x_channel, count, tiles_.get());
      const auto grad = read(at(k_.grad, k_.grad_batch, item), k_.grad_channel, count, tiles_.get() + n_ * kPixels);
      T *const room = tiles_.get() + 2 * n_ * kPixels, *const dx = k_.dx ? static_cast<T*>(k_.dx) + item / per_picture * n_ * k_.pixels + first : nullptr;
      const bool whole = count == kPixels, more = !apart && item + 1 < end;
      tile(x, grad, dx && !whole ? room : dx, whole ? k_.pixels : kPixels,
           {more ? at(k_.x, k_.x_batch, item + 1) : nullptr, more ? at(k_.grad, k_.grad_batch, item + 1) : nullptr});
      if (dx && !whole) copy_pixels(room, kPixels, dx, k_.pixels, n_, count);
    }
    if (!k_.sums) return;
    C* sums = static_cast<C*>(k_.sums) + block * 2 * n_;
    for (int64_t i = 0; i < 2 * n_; ++i) sums[i] = sum_of_lanes<W, C>(load<W>(lanes_ + i * W));
  }
};

template <typename T>
static void run(const PictureGradientTask& k, int64_t begin, int64_t end) {
  const PictureGradients<T> pictures(k);
  for (int64_t block = begin; block < end; ++block) pictures.run(block);
}

void norm_picture_gradients(const PictureGradientTask& k, int64_t begin, int64_t end, float) { run<float>(k, begin, end); }
void norm_picture_gradients(const PictureGradientTask& k, int64_t begin, int64_t end, double) { run<double>(k, begin, end); }
void norm_picture_gradients(const PictureGradientTask& k, int64_t begin, int64_t end, bfloat16) { run<bfloat16>(k, begin, end); }
void norm_picture_gradients(const PictureGradientTask& k, int64_t begin, int64_t end, float16) { run<float16>(k, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
