// The gradients of QK norm with rotary embedding: loops over blocks of heads, compiled once per ISA level.
#include "cpu/qk_norm_rope_backward.h"

#include <memory>
#include <type_traits>

#include "common/column_fold.h"
#include "common/pairs.h"
#include "common/row_access.h"
#include "common/row_norm.h"

namespace fusewire::FUSEWIRE_ISA {

// The blocks of one thread. Every row of a weight's gradient gets its terms through `group_`.
template <typename T, bool Rotate>
class QkGradientRows {
  using C = compute_t<T>;
  static constexpr int N = kLanes<C>;
  using V = lanes<C, N>;

  const QkGradientTask& k_;
  const int64_t n_;
  std::unique_ptr<C[]> room_;
  std::unique_ptr<T[]> gathered_;
  const C* weight_ = nullptr;
  C *group_, *upstream_, *cos_, *sin_;  // the last three: a head's gradient turned back, and the tables of the current token
  int64_t token_ = -1;

  // A pair (a, b) was turned to (a cos - b sin, b cos + a sin): its gradient is turned the other way.
  void tables(int64_t token) {
    token_ = token;
    for (int64_t j = 0; j < n_ / 2; ++j) {
      cos_[2 * j] = cos_[2 * j + 1] = k_.cos[token * k_.cos_stride[0] + j * k_.cos_stride[1]];
      sin_[2 * j] = k_.sin[token * k_.sin_stride[0] + j * k_.sin_stride[1]];
      sin_[2 * j + 1] = -sin_[2 * j];
    }
  }

  template <typename Dim>
  FUSEWIRE_INLINE void head(int64_t i, Dim dim) {
    const T *grad[1], *x[1];
    gather_rows(k_.grad, i, 1, dim, gathered_.get(), grad);
    gather_rows(k_.x, i, 1, dim, gathered_.get() + n_, x);
    if constexpr (Rotate) {
      const int64_t token = i / k_.heads % k_.tokens;
      if (token != token_) tables(token);
      for_columns<N>(0, dim, [&](const auto& at) __attribute__((always_inline)) {
        const V dy = at.load(grad[0]);
        at.store(upstream_, fma<N, C>(dy, at.load(cos_), swap_pairs<N, C>(dy) * at.load(sin_)));
      });
      finish(i, dim, upstream_, x[0]);
    } else {
      finish(i, dim, grad[0], x[0]);
    }
  }

  // g: the gradient of xhat * weight.
  template <typename Dim, typename G>
  FUSEWIRE_INLINE void finish(int64_t i, Dim dim, const G* g, const T* x) {
    const RowNorm<C> row = row_norm<true>(x, dim, static_cast<C>(k_.eps));
    T* dx = k_.dx ? static_cast<T*>(k_.dx) + i * n_ : nullptr;
    if (dx) {
      const auto means = gradient_means<true>(x, dim, row, [&](const auto& at) __attribute__((always_inline)) -> V {
        return weight_ ? at.load(g) * at.load(weight_) : at.load(g);
      });
      for_columns<N>(0, dim, [&](const auto& at) __attribute__((always_inline)) {
        const V xhat = row_normalised<true, N, C>(at.load(x), row);
        at.store(dx, row_gradient<true, N, C>(weight_ ? at.load(g) * at.load(weight_) : at.load(g), xhat, row, means));
      });
    }
    if (!k_.sums) return;
    for_columns<N>(0, dim, [&](const auto& at) __attribute__((always_inline)) {
      at.store(group_, fma<N, C>(at.load(g), row_normalised<true, N, C>(at.load(x), row), at.load(group_)));
    });
  }

 public:
  explicit QkGradientRows(const QkGradientTask& k)
      : k_(k), n_(k.dim), room_(new C[5 * n_]()), gathered_(k.x.channel == 1 && k.grad.channel == 1 ? nullptr : new T[2 * n_]), group_(room_.get()),
        upstream_(group_ + n_), cos_(group_ + 2 * n_), sin_(group_ + 3 * n_) {
    if (k.weight) weight_ = wide_vector(static_cast<const T*>(k.weight), k.weight_stride, n_, group_ + 4 * n_);
  }

  void run(int64_t block) {
    C* sums = k_.sums ? static_cast<C*>(k_.sums) + block * n_ : nullptr;
    // The head dimensions of SD3 and Flux as constants: the loops over one head are unrolled
    const auto run = [&](auto dim) __attribute__((always_inline)) {
      for_block<1>(k_.blocks, block, n_, group_, sums, [&](int64_t i, auto) __attribute__((always_inline)) { head(i, dim); });
    };
    if (n_ == 64) return run(std::integral_constant<int64_t, 64>{});
    if (n_ == 128) return run(std::integral_constant<int64_t, 128>{});
    run(n_);
  }
};

template <typename T, bool Rotate>
static void run(const QkGradientTask& k, int64_t begin, int64_t end) {
  QkGradientRows<T, Rotate> rows(k);
  for (int64_t block = begin; block < end; ++block) rows.run(block);
}

template <typename T>
static void choose(const QkGradientTask& k, int64_t begin, int64_t end) { (k.cos ? run<T, true> : run<T, false>)(k, begin, end); }

void qk_gradient_blocks(const QkGradientTask& k, int64_t begin, int64_t end, float) { choose<float>(k, begin, end); }
void qk_gradient_blocks(const QkGradientTask& k, int64_t begin, int64_t end, double) { choose<double>(k, begin, end); }
void qk_gradient_blocks(const QkGradientTask& k, int64_t begin, int64_t end, bfloat16) { choose<bfloat16>(k, begin, end); }
void qk_gradient_blocks(const QkGradientTask& k, int64_t begin, int64_t end, float16) { choose<float16>(k, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
