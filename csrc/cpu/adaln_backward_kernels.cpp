// The gradients of adaLN: loops over blocks of tokens, compiled once per ISA level.
#include "cpu/adaln_backward.h"

#include <memory>

#include "common/column_fold.h"
#include "common/row_access.h"
#include "common/row_norm.h"

namespace fusewire::FUSEWIRE_ISA {

// The blocks of one thread. A row's passes: the gated sum again, its statistics, the means that its gradient subtracts, and everything that is written.
// All but the first find the row in the cache; several rows side by side would not, and their streams would disturb each other.
// M modulations, G gates; Affine: a weight or a bias, or both.
template <typename T, int M, int G, bool Affine>
class AdalnGradientRows {
  using C = compute_t<T>;
  using X = std::conditional_t<G != 0, C, T>;  // what is normalised: the gated sum as close keeps it, or x itself
  using V = lanes<C, kLanes<C>>;
  static constexpr int N = kLanes<C>, kKinds = 2 * M + G + 2 * Affine, kVectors = 7, kInputs = 6;

  const AdalnGradientTask& k_;
  const int64_t n_;
  std::unique_ptr<C[]> room_;      // one row each: the sums of a group; 1 + scales, gates, weight and bias, the gated sum
  std::unique_ptr<T[]> gathered_;  // one row each: inputs whose channels are not contiguous
  C* group_;
  const C *scale_[2]{}, *gate_[2]{}, *weight_ = nullptr, *bias_ = nullptr;
  const T *x_ = nullptr, *y_[2]{}, *grad_[2]{}, *residual_ = nullptr;  // the current row
  const X* normed_ = nullptr;

  C* room(int i) const { return room_.get() + (kKinds + i) * n_; }
  const C* vector(const Rows& v, int64_t b, int64_t t, C* room) const { return wide_vector(v.at<T>(b, t), v.channel, n_, room); }

  void modulations(int64_t b, int64_t t) {
    for (int m = 0; m < M; ++m) {
      const C* scale = vector(k_.scale[m], b, t, room(m));
      for_columns<N>(0, n_, [&](const auto& at) __attribute__((always_inline)) { at.store(room(m), C(1) + at.load(scale)); });
      scale_[m] = room(m);
    }
    for (int g = 0; g < G; ++g) gate_[g] = vector(k_.gate[g], b, t, room(2 + g));
  }

  const T* gather(const LeadingRows& from, int64_t i, int input) const {
    const T* row[1];
    gather_rows(from, i, 1, n_, gathered_.get() + input * n_, row);
    return row[0];
  }

  void read(int64_t i) {
    if constexpr (G != 0) residual_ = gather(k_.grad_residual, i, 0);
    for (int g = 0; g < G; ++g) y_[g] = gather(k_.y[g], i, 1 + g);
    for (int m = 0; m < M; ++m) grad_[m] = gather(k_.grad[m], i, 3 + m);
    if constexpr (M != 0) x_ = gather(k_.x, i, 5);
    if constexpr (M != 0 && G == 0) normed_ = x_;
    if constexpr (M != 0 && G != 0) {
      C* sum = room(6);
      for_columns<N>(0, n_, [&](const auto& at) __attribute__((always_inline)) {
        V value = fma<N, C>(at.load(gate_[0]), at.load(y_[0]), at.load(x_));
        if constexpr (G == 2) value = fma<N, C>(at.load(gate_[1]), at.load(y_[1]), value);
        at.store(sum, value);
      });
      normed_ = sum;
    }
  }

  // The gradient of the norm's output: that of each modulated output times its 1 + scale.
  template <typename At>
  FUSEWIRE_INLINE V upstream(const At& at) const {
    V up = at.load(grad_[0]) * at.load(scale_[0]);
    if constexpr (M == 2) up = fma<N, C>(at.load(grad_[1]), at.load(scale_[1]), up);
    return up;
  }

  GradientMeans<C> means(const RowNorm<C>& row) const {
    return gradient_means<false>(normed_, n_, row, [&](const auto& at) __attribute__((always_inline)) -> V {
      if constexpr (Affine) return upstream(at) * at.load(weight_);
      return upstream(at);
    });
  }

  template <bool PerToken>
  void write(int64_t i, const RowNorm<C>& row, const GradientMeans<C>& means) const {
    const int64_t begin = i * n_;
    T* const dx = k_.dx ? static_cast<T*>(k_.dx) + begin : nullptr;
    T* const dy[2] = {k_.dy[0] ? static_cast<T*>(k_.dy[0]) + begin : nullptr, k_.dy[1] ? static_cast<T*>(k_.dy[1]) + begin : nullptr};
    for_columns<N>(0, n_, [&](const auto& at) __attribute__((always_inline)) {
      const auto add = [&](int kind, V a, V b) __attribute__((always_inline)) {
        if constexpr (PerToken) {
          if (k_.of_tokens[kind]) return at.store(static_cast<T*>(k_.of_tokens[kind]) + begin, a * b);
        }
        C* sum = group_ + kind * n_;
        at.store(sum, fma<N, C>(a, b, at.load(sum)));
      };
      V total{};  // the gradient of r
      if constexpr (M != 0) {
        const V xhat = row_normalised<false, N, C>(at.load(normed_), row);
        V norm = xhat;
        if constexpr (Affine) norm = fma<N, C>(xhat, at.load(weight_), at.load(bias_));
        for (int m = 0; m < M; ++m) {
          const V grad = at.load(grad_[m]);
          add(2 * m, grad, splat<N>(C(1)));
          add(2 * m + 1, grad, norm);
        }
        V up = upstream(at);
        if constexpr (Affine) {
          add(2 * M + G, up, xhat);
          add(2 * M + G + 1, up, splat<N>(C(1)));
          up *= at.load(weight_);
        }
        total = row_gradient<false, N, C>(up, xhat, row, means);
      }
      if constexpr (G != 0) total += at.load(residual_);
      for (int g = 0; g < G; ++g) {
        add(2 * M + g, total, at.load(y_[g]));
        if (dy[g]) at.store(dy[g], total * at.load(gate_[g]));
      }
      if (dx) at.store(dx, total);
    });
  }

  template <bool PerToken>
  void row(int64_t i) {
    read(i);
    RowNorm<C> norm{};
    GradientMeans<C> subtracted{};
    if constexpr (M != 0) {
      // An RMSNorm is a norm whose a and c are zero, and whose gradient subtracts no mean
      const C eps = static_cast<C>(k_.eps);
      norm = k_.rms ? row_norm<true>(normed_, n_, eps) : row_norm<false>(normed_, n_, eps);
      subtracted = means(norm);
      if (k_.rms) subtracted.g = 0;
    }
    write<PerToken>(i, norm, subtracted);
  }

  bool copies() const {
    bool in_place = (!M || k_.x.channel == 1) && (!G || k_.grad_residual.channel == 1);
    for (int m = 0; m < M; ++m) in_place &= k_.grad[m].channel == 1;
    for (int g = 0; g < G; ++g) in_place &= k_.y[g].channel == 1;
    return !in_place;
  }

 public:
  explicit AdalnGradientRows(const AdalnGradientTask& k)
      : k_(k), n_(k.channels), room_(new C[(kKinds + kVectors) * n_]()), gathered_(copies() ? new T[kInputs * n_] : nullptr), group_(room_.get()) {
    if constexpr (Affine) {  // what is absent is a weight of 1 or a bias of 0
      for (int64_t i = 0; i < n_; ++i) room(4)[i] = 1;
      weight_ = k.weight.data ? vector(k.weight, 0, 0, room(4)) : room(4);
      bias_ = k.bias.data ? vector(k.bias, 0, 0, room(5)) : room(5);
    }
  }

  void run(int64_t block) {
    const int64_t b = block / k_.blocks.count, first = b * k_.tokens;
    C* sums = k_.sums ? static_cast<C*>(k_.sums) + block * kKinds * n_ : nullptr;
    if (!k_.per_token) modulations(b, 0);
    for_block<1>(k_.blocks, block % k_.blocks.count, kKinds * n_, group_, sums, [&](int64_t t, auto) __attribute__((always_inline)) {
      if (!k_.per_token) return row<false>(first + t);
      modulations(b, t);
      row<true>(first + t);
    });
  }
};

template <typename T, int M, int G, bool Affine>
static void run(const AdalnGradientTask& k, int64_t begin, int64_t end) {
  AdalnGradientRows<T, M, G, Affine> rows(k);
  for (int64_t block = begin; block < end; ++block) rows.run(block);
}

template <typename T>
static void choose(const AdalnGradientTask& k, int64_t begin, int64_t end) {
  const bool affine = k.weight.data || k.bias.data;
  if (k.modulations == 0) return run<T, 0, 1, false>(k, begin, end);
  if (k.modulations == 2) return (affine ? run<T, 2, 0, true> : run<T, 2, 0, false>)(k, begin, end);
  if (k.gates == 0) return (affine ? run<T, 1, 0, true> : run<T, 1, 0, false>)(k, begin, end);
  if (k.gates == 1) return (affine ? run<T, 1, 1, true> : run<T, 1, 1, false>)(k, begin, end);
  (affine ? run<T, 1, 2, true> : run<T, 1, 2, false>)(k, begin, end);
}

void adaln_gradient_blocks(const AdalnGradientTask& k, int64_t begin, int64_t end, float) { choose<float>(k, begin, end); }
void adaln_gradient_blocks(const AdalnGradientTask& k, int64_t begin, int64_t end, double) { choose<double>(k, begin, end); }
void adaln_gradient_blocks(const AdalnGradientTask& k, int64_t begin, int64_t end, bfloat16) { choose<bfloat16>(k, begin, end); }
void adaln_gradient_blocks(const AdalnGradientTask& k, int64_t begin, int64_t end, float16) { choose<float16>(k, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
