// The gradients of RMSNorm and LayerNorm: loops over blocks of rows, compiled once per ISA level.
#include <memory>

#include "common/column_fold.h"
#include "common/row_access.h"
#include "common/row_norm.h"
#include "cpu/norm.h"

namespace fusewire::FUSEWIRE_ISA {

// One pass over a row of grad and x finds its statistics, a second what its gradient subtracts; the third writes dx for K rows side by side and adds
// them to the sums over rows. All but the first pass find the rows in the cache.
template <typename T, bool Rms>
class NormGradientRows {
  using C = compute_t<T>;
  static constexpr int N = kLanes<C>, kSide = 4;
  using V = lanes<C, N>;

  const NormGradientTask& k_;
  const int64_t n_;
  std::unique_ptr<C[]> room_;
  std::unique_ptr<T[]> gathered_;
  const C* weight_;
  C* group_;  // [2, C]: the sums of up to kGroup rows

  template <int K, bool Weight, bool Sums>
  FUSEWIRE_INLINE void write(int64_t i, const T* const* grad, const T* const* x, const RowNorm<C> (&row)[K], const GradientMeans<C> (&means)[K]) const {
    T* dx = static_cast<T*>(k_.dx) + i * n_;
    for_columns<N>(0, n_, [&](const auto& at) __attribute__((always_inline)) {
      V weight{}, by_xhat{}, plain{};
      if constexpr (Weight) weight = at.load(weight_);
      if constexpr (Sums) by_xhat = at.load(group_), plain = at.load(group_ + n_);
      for (int r = 0; r < K; ++r) {
        const V dy = at.load(grad[r]), xhat = row_normalised<Rms, N, C>(at.load(x[r]), row[r]);
        if constexpr (Sums) by_xhat = fma<N, C>(dy, xhat, by_xhat), plain += dy;
        if (k_.dx) at.store(dx + r * n_, row_gradient<Rms, N, C>(Weight ? dy * weight : dy, xhat, row[r], means[r]));
      }
      if constexpr (Sums) at.store(group_, by_xhat), at.store(group_ + n_, plain);
    });
  }

  template <int K>
  FUSEWIRE_INLINE void rows(int64_t i) const {
    const T *grad[K], *x[K];
    gather_rows(k_.grad, i, K, n_, gathered_.get(), grad);
    gather_rows(k_.x, i, K, n_, gathered_.get() + kSide * row_pitch<T>(n_), x);
    RowNorm<C> row[K];
    GradientMeans<C> means[K]{};
    for (int r = 0; r < K; ++r) {
      row[r] = row_norm<Rms>(x[r], n_, static_cast<C>(k_.eps));
      if (!k_.dx) continue;
      const T* dy = grad[r];
      if (weight_) {
        means[r] = gradient_means<Rms>(x[r], n_, row[r], [&](const auto& at) __attribute__((always_inline)) -> V { return at.load(dy) * at.load(weight_); });
      } else {
        means[r] = gradient_means<Rms>(x[r], n_, row[r], [&](const auto& at) __attribute__((always_inline)) -> V { return at.load(dy); });
      }
    }
    if (weight_ && k_.sums) return write<K, true, true>(i, grad, x, row, means);
    if (weight_) return write<K, true, false>(i, grad, x, row, means);
    if (k_.sums) return write<K, false, true>(i, grad, x, row, means);
    write<K, false, false>(i, grad, x, row, means);
  }

 public:
  explicit NormGradientRows(const NormGradientTask& k)
      : k_(k), n_(k.channels), room_(new C[3 * n_]()),
        gathered_(k.x.channel == 1 && k.grad.channel == 1 ? nullptr : new T[2 * kSide * row_pitch<T>(n_)]), weight_(nullptr), group_(room_.get() + n_) {
    if (k.weight.data) weight_ = wide_vector(static_cast<const T*>(k.weight.data), k.weight.stride, n_, room_.get());
  }

  void run(int64_t block) {
    C* sums = k_.sums ? static_cast<C*>(k_.sums) + block * 2 * n_ : nullptr;
    for_block<kSide>(k_.blocks, block, 2 * n_, group_, sums, [&](int64_t i, auto count) { rows<count>(i); });
  }
};

template <typename T, bool Rms>
static void run(const NormGradientTask& k, int64_t begin, int64_t end) {
  NormGradientRows<T, Rms> rows(k);
  for (int64_t block = begin; block < end; ++block) rows.run(block);
}

#define FUSEWIRE_NORM_GRADIENT(T)                                                        \
  void norm_gradient_blocks(const NormGradientTask& k, int64_t begin, int64_t end, T) {  \
    (k.rms ? run<T, true> : run<T, false>)(k, begin, end);                               \
  }
FUSEWIRE_NORM_GRADIENT(float)
FUSEWIRE_NORM_GRADIENT(double)
FUSEWIRE_NORM_GRADIENT(bfloat16)
FUSEWIRE_NORM_GRADIENT(float16)

}  // namespace fusewire::FUSEWIRE_ISA
