// Global response normalisation: loops over blocks, samples and rows, compiled once per ISA level.
#include "cpu/global_response_norm.h"

#include <memory>

#include "common/column_fold.h"
#include "common/row_access.h"

namespace fusewire::FUSEWIRE_ISA {

// Rows that one thread reads, kSide at a time: in place where their channels lie side by side, otherwise through scratch memory.
template <typename T>
class RowReader {
  const LeadingRows& rows_;
  const int64_t n_;
  const std::unique_ptr<T[]> room_;

 public:
  static constexpr int kSide = 4;
  RowReader(const LeadingRows& rows, int64_t n) : rows_(rows), n_(n), room_(rows.channel == 1 ? nullptr : new T[kSide * row_pitch<T>(n)]) {}
  FUSEWIRE_INLINE void get(int64_t row, int count, const T** p) const { gather_rows(rows_, row, count, n_, room_.get(), p); }
};

// Block `item % count` of sample `item / count`: each channel's sums over its rows.
template <typename T, bool Backward>
static void sum_blocks(const ResponseTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>, Kinds = Backward ? 3 : 1;
  const int64_t n = k.channels;
  const RowReader<T> of_x(k.x, n), of_grad(k.grad, Backward ? n : 0);
  const std::unique_ptr<C[]> group(new C[Kinds * n]());
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / k.blocks.count * k.blocks.rows;
    C* sums = static_cast<C*>(k.sums) + item * Kinds * n;
    for_block<RowReader<T>::kSide>(k.blocks, item % k.blocks.count, Kinds * n, group.get(), sums, [&](int64_t row, auto count) {
      constexpr int K = decltype(count)::value;
      const T *x[K], *grad[K] = {};
      of_x.get(first + row, K, x);
      if constexpr (Backward) of_grad.get(first + row, K, grad);
      for_columns<N>(0, n, [&](const auto& at) __attribute__((always_inline)) {
        auto squares = at.load(group.get());
        lanes<C, N> products{}, grads{};
        if constexpr (Backward) products = at.load(group.get() + n), grads = at.load(group.get() + 2 * n);
        for (int r = 0; r < K; ++r) {
          const auto v = at.load(x[r]);
          squares += v * v;
          if constexpr (Backward) {
            const auto g = at.load(grad[r]);
            products += g * v;
            grads += g;
          }
        }
        at.store(group.get(), squares);
        if constexpr (Backward) at.store(group.get() + n, products), at.store(group.get() + 2 * n, grads);
      });
    });
  }
}

// With S the sum of grad * x of a channel: the gradients are, of weight n * S; of n, weight * S; of g, what g / (mean(g) + eps) makes of that; and
// of x by way of g, its share x / g, none where g is 0.
template <typename T>
static void samples(const ResponseTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t n = k.channels;
  const int kinds = k.kinds(), kept = k.factor_kinds();
  const std::unique_ptr<C[]> room(new C[(kinds + 1) * n]);
  const C* weight = wide_vector(static_cast<const T*>(k.weight), k.weight_stride, n, room.get() + kinds * n);
  for (int64_t b = begin; b < end; ++b) {
    const C* sums = static_cast<const C*>(k.sums) + b * k.blocks.count * kinds * n;
    C *total = room.get(), *factor = static_cast<C*>(k.factors) + b * kept * n;
    for (int64_t c = 0; c < kinds * n; ++c) total[c] = 0;
    for (int64_t block = 0; block < k.blocks.count; ++block)
      for (int64_t c = 0; c < kinds * n; ++c) total[c] += sums[block * kinds * n + c];
    double mean = 0;
    for (int64_t c = 0; c < n; ++c) {
      total[c] = std::sqrt(total[c]);
      mean += total[c];
    }
    const double scale = 1 / (mean / n + k.eps);
    for (int64_t c = 0; c < n; ++c) factor[c] = 1 + weight[c] * static_cast<C>(total[c] * scale);
    if (kinds == 1) continue;
    const C *norm = total, *product = total + n, *grad = total + 2 * n;
    double through_mean = 0;
    for (int64_t c = 0; c < n; ++c) through_mean += static_cast<double>(weight[c]) * product[c] * norm[c];
    through_mean *= scale * scale / n;
    for (int64_t c = 0; c < n; ++c) {
      factor[n + c] = norm[c] == 0 ? 0 : static_cast<C>((static_cast<double>(weight[c]) * product[c] * scale - through_mean) / norm[c]);
      factor[2 * n + c] = static_cast<C>(norm[c] * scale * product[c]);
      factor[3 * n + c] = grad[c];
    }
  }
}

template <typename T, bool Backward>
static void write_rows(const ResponseTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>, kSide = RowReader<T>::kSide;
  const int64_t n = k.channels;
  const RowReader<T> of_x(k.x, n), of_grad(k.grad, Backward ? n : 0);
  const std::unique_ptr<C[]> room(new C[n]);
  const C* bias = Backward ? nullptr : wide_vector(static_cast<const T*>(k.bias), k.bias_stride, n, room.get());
  T* out = static_cast<T*>(k.out);
  for (int64_t row = begin; row < end;) {
    const int64_t sample = row / k.blocks.rows, last = (sample + 1) * k.blocks.rows < end ? (sample + 1) * k.blocks.rows : end;
    const C* factor = static_cast<const C*>(k.factors) + sample * k.factor_kinds() * n;
    for (; row < last; row += kSide) {
      const int count = last - row < kSide ? static_cast<int>(last - row) : kSide;
      const T *x[kSide], *grad[kSide] = {};
      of_x.get(row, count, x);
      if constexpr (Backward) of_grad.get(row, count, grad);
      for_columns<N>(0, n, [&](const auto& at) __attribute__((always_inline)) {
        const auto scale = at.load(factor), offset = at.load(Backward ? factor + n : bias);
        for (int r = 0; r < count; ++r) {
          const auto v = at.load(x[r]);
          if constexpr (Backward) {
            at.store(out + (row + r) * n, fma<N, C>(at.load(grad[r]), scale, v * offset));
          } else {
            at.store(out + (row + r) * n, fma<N, C>(v, scale, offset));
          }
        }
      });
    }
    row = last;
  }
}

#define FUSEWIRE_DEFINE_RESPONSE(T)                                                           \
  void response_blocks(const ResponseTask& k, int64_t begin, int64_t end, T) {                \
    (k.grad.data ? sum_blocks<T, true> : sum_blocks<T, false>)(k, begin, end);                \
  }                                                                                           \
  void response_samples(const ResponseTask& k, int64_t begin, int64_t end, T) { samples<T>(k, begin, end); } \
  void response_rows(const ResponseTask& k, int64_t begin, int64_t end, T) {                  \
    (k.grad.data ? write_rows<T, true> : write_rows<T, false>)(k, begin, end);                \
  }
FUSEWIRE_DEFINE_RESPONSE(float)
FUSEWIRE_DEFINE_RESPONSE(double)
FUSEWIRE_DEFINE_RESPONSE(bfloat16)
FUSEWIRE_DEFINE_RESPONSE(float16)

}  // namespace fusewire::FUSEWIRE_ISA
