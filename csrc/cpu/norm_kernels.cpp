// RMSNorm and LayerNorm: loops over rows, compiled once per ISA level.
#include <memory>

#include "common/row_access.h"
#include "common/row_norm.h"
#include "common/torch_sum.h"
#include "cpu/norm_affine.h"

namespace fusewire::FUSEWIRE_ISA {

// The rows of one thread, kBlock at a time: one that lies contiguous is read in place, any other through scratch memory.
template <typename T, NormKind Kind, bool Fused>
class NormRows {
  using C = compute_t<T>;
  using X = std::conditional_t<Kind == NormKind::layer_wide, float, T>;  // what the statistics are taken of
  static constexpr int N = kLanes<C>;
  // kSide rows share each load of weight and bias; in 32 bits and more the rows' own loads take longer
  static constexpr int kBlock = 16, kSide = sizeof(T) == 2 && (Fused || Kind == NormKind::layer_close) ? 4 : 1;
  static constexpr bool kRms = Kind >= NormKind::rms_close, kClose = Kind == NormKind::layer_close || Kind == NormKind::rms_close;
  using V = lanes<C, N>;

  const NormTask& k_;
  const int64_t n_;
  const StockMoments<X, Fused> stock_;
  std::unique_ptr<C[]> affine_;
  std::unique_ptr<T[]> in_, out_;
  std::unique_ptr<X[]> wide_;
  const C *weight_, *bias_;

  template <int K>
  FUSEWIRE_INLINE void statistics(const X* const (&x)[K], RowNorm<C> (&row)[K]) const {
    if constexpr (kClose) {
      for (int r = 0; r < K; ++r) row[r] = row_norm<kRms>(x[r], n_, static_cast<C>(k_.eps));
    } else if constexpr (kRms) {
      // diffusers takes the root in float whatever the dtype
      using S = std::conditional_t<Kind == NormKind::rms_diffusers, float, C>;
      for (int r = 0; r < K; ++r) {
        const S mean = torch_sum<S>(Squares<S, X>{x[r]}, n_) / static_cast<S>(n_);
        row[r] = {0, static_cast<C>(1 / std::sqrt(mean + static_cast<S>(k_.eps))), 0};
      }
    } else {
      C mean[K], variance[K];
      stock_(x, mean, variance);
      for (int r = 0; r < K; ++r) {
        const C rstd = 1 / std::sqrt(variance[r] + static_cast<C>(k_.eps));
        row[r] = {mean[r], rstd, -rstd * mean[r]};
      }
    }
  }

  template <bool Weight, bool Bias>
  FUSEWIRE_INLINE static V value(V x, const RowNorm<C>& row, V weight, V bias) {
    if constexpr (kClose) {
      const V y = row_normalised<kRms, N, C>(x, row);
      if constexpr (Weight && Bias) return fma<N, C>(y, weight, bias);
      return Weight ? y * weight : Bias ? y + bias : y;
    } else if constexpr (kRms) {
      V y = x * splat<N>(row.b);
      if constexpr (Weight) y = (Kind == NormKind::rms_diffusers ? rounded<T, N>(y) : y) * weight;
      return Bias ? rounded<T, N>(y) + bias : y;
    } else {  // ATen's layer norm: 16-bit types fold the mean into an addend, the others subtract it first
      const V y = sizeof(X) == sizeof(C) ? (x - splat<N>(row.a)) * splat<N>(row.b) : stock_fma<Fused, N, C>(x, splat<N>(row.b), splat<N>(row.c));
      return Weight || Bias ? stock_fma<Fused, N, C>(y, Weight ? weight : splat<N>(C(1)), bias) : y;
    }
  }

  template <int K, bool Weight, bool Bias>
  FUSEWIRE_INLINE void write(const X* const (&x)[K], T* const* out, const RowNorm<C> (&row)[K]) const {
    for_columns<N>(0, n_, [&](const auto& at) __attribute__((always_inline)) {
      V weight{}, bias{};
      if constexpr (Weight) weight = at.load(weight_);
      if constexpr (Bias) bias = at.load(bias_);
      for (int r = 0; r < K; ++r) at.store(out[r], value<Weight, Bias>(at.load(x[r]), row[r], weight, bias));
    });
  }

  template <int K>
  FUSEWIRE_INLINE void rows(const T* const* given, T* const* out) const {
    const X* x[K];
    for (int r = 0; r < K; ++r) {
      if constexpr (std::is_same_v<X, T>) {
        x[r] = given[r];
      } else {
        x[r] = wide_vector(given[r], 1, n_, wide_.get() + r * n_);
      }
    }
    RowNorm<C> row[K];
    statistics<K>(x, row);
    if (weight_ && bias_) return write<K, true, true>(x, out, row);
    if (weight_) return write<K, true, false>(x, out, row);
    if (bias_) return write<K, false, true>(x, out, row);
    write<K, false, false>(x, out, row);
  }

 public:
  explicit NormRows(const NormTask& k)
      : k_(k), n_(k.channels), stock_(k.channels, k.order), affine_(new C[2 * n_]), in_(k.x.channel == 1 ? nullptr : new T[kBlock * row_pitch<T>(n_)]),
        out_(k.out.channel == 1 ? nullptr : new T[kBlock * row_pitch<T>(n_)]), wide_(std::is_same_v<X, T> ? nullptr : new X[kSide * n_]) {
    weight_ = affine_vector<T>(k.weight, n_, affine_.get());
    bias_ = affine_vector<T>(k.bias, n_, affine_.get() + n_);
  }

  void run(int64_t begin, int64_t end) const {
    const T* x[kBlock];
    T* out[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int count = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
      gather_rows(k_.x, i, count, n_, in_.get(), x);
      for (int r = 0; r < count; ++r) {
        out[r] = k_.out.channel == 1 ? static_cast<T*>(const_cast<void*>(k_.out.data)) + k_.out.offset(i + r) : out_.get() + r * row_pitch<T>(n_);
      }
      int r = 0;
      for (; r + kSide <= count; r += kSide) rows<kSide>(x + r, out + r);
      for (; r < count; ++r) rows<1>(x + r, out + r);
      if (k_.out.channel != 1) scatter_rows(k_.out, i, count, n_, out_.get());
    }
  }
};

template <typename T, NormKind Kind, bool Fused>
static void run(const NormTask& k, int64_t begin, int64_t end) { NormRows<T, Kind, Fused>(k).run(begin, end); }

template <typename T>
static void choose(const NormTask& k, int64_t begin, int64_t end) {
  const bool fused = k.order != StockOrder::portable;
  switch (k.kind) {
    case NormKind::layer_close: return run<T, NormKind::layer_close, false>(k, begin, end);
    case NormKind::rms_close: return run<T, NormKind::rms_close, false>(k, begin, end);
    case NormKind::rms_torch: return run<T, NormKind::rms_torch, false>(k, begin, end);
    case NormKind::rms_diffusers: return run<T, NormKind::rms_diffusers, false>(k, begin, end);
    case NormKind::layer_torch: return (fused ? run<T, NormKind::layer_torch, true> : run<T, NormKind::layer_torch, false>)(k, begin, end);
    case NormKind::layer_wide:
      if constexpr (sizeof(T) == 2) return (fused ? run<T, NormKind::layer_wide, true> : run<T, NormKind::layer_wide, false>)(k, begin, end);
  }
}

void norm_rows(const NormTask& k, int64_t begin, int64_t end, float) { choose<float>(k, begin, end); }
void norm_rows(const NormTask& k, int64_t begin, int64_t end, double) { choose<double>(k, begin, end); }
void norm_rows(const NormTask& k, int64_t begin, int64_t end, bfloat16) { choose<bfloat16>(k, begin, end); }
void norm_rows(const NormTask& k, int64_t begin, int64_t end, float16) { choose<float16>(k, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
