// QK norm with rotary embedding: loops over blocks of heads, compiled once per ISA level.
#include "cpu/qk_norm_rope.h"

#include <cmath>
#include <type_traits>
#include <vector>

#include "common/torch_sum.h"

namespace fusewire::FUSEWIRE_ISA {

// What differs between the roundings. S: the type in which squares are summed and the root is taken.
// kRoundNorm: the normalised value is rounded to T before the weight. kRoundHead: the head is rounded to T, and to float, before the rotation.
template <typename S_, bool kRoundNorm_, bool kRotate_, bool kRoundHead_>
struct Mode {
  using S = S_;
  static constexpr bool kRoundNorm = kRoundNorm_, kRotate = kRotate_, kRoundHead = kRoundHead_;
};

constexpr int kRows = 16;  // rows whose roots are taken together: one vector of AVX-512

// kRows rows of one tensor that lie at a constant distance, all of one token where there is a rotation.
template <typename T>
struct Rows {
  const T* x;
  int64_t x_stride;
  T* out;
  int64_t out_stride;
  int64_t count;
};

template <typename T>
struct Vectors {
  const compute_t<T>* weight;  // [D] or null
  const float* cos;            // [D/2] of this token
  const float* sin;
  compute_t<T>* head;  // scratch [D]
};

// rstd_r = 1 / sqrt(mean(x_r^2) + eps)
template <typename T, typename S>
static void roots(const Rows<T>& rows, int64_t dim, double eps, S* rstd) {
  constexpr int W = kSumLanes<S>;
  S lanes[kRows][W], sum[kRows];
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* x = rows.x + r * rows.x_stride;
    const auto square = [x](int64_t i) {
      const S v = static_cast<S>(to_float(x[i]));
      return v * v;
    };
    if (dim < W) {
      sum[r] = torch_sum<S>(dim, square);
    } else {
      torch_sum_lanes<S>(dim, square, lanes[r], &sum[r]);
    }
  }
  if (dim >= W) {
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int j = 0; j < W; ++j) sum[r] += lanes[r][j];
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < rows.count; ++r) rstd[r] = 1 / std::sqrt(sum[r] / static_cast<S>(dim) + static_cast<S>(eps));
}

// y = x * rstd * weight
template <typename T, typename M>
static inline compute_t<T> normalised(T x, typename M::S rstd, const compute_t<T>* weight, int64_t i) {
  const compute_t<T> y = to_float(x) * rstd;
  if (!weight) return y;
  return (M::kRoundNorm ? round_to<T>(y) : y) * weight[i];
}

template <typename T, typename M>
static void apply(const Rows<T>& rows, int64_t dim, const typename M::S* rstd, const Vectors<T>& v) {
  using C = compute_t<T>;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* x = rows.x + r * rows.x_stride;
    T* out = rows.out + r * rows.out_stride;
    const typename M::S root = rstd[r];
    if constexpr (!M::kRotate) {
      if (v.weight) {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) out[i] = from_float<T>(normalised<T, M>(x[i], root, v.weight, i));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) out[i] = from_float<T>(normalised<T, M>(x[i], root, nullptr, i));
      }
    } else {
      C* head = v.head;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) {
        const C y = normalised<T, M>(x[i], root, v.weight, i);
        head[i] = M::kRoundHead ? round_to<T>(y) : y;
      }
      // (a, b) -> (a cos - b sin, b cos + a sin); in float for every dtype where the stock code is followed
      using R = std::conditional_t<M::kRoundHead, float, C>;
#pragma omp simd
      for (int64_t i = 0; i < dim / 2; ++i) {
        const R a = static_cast<R>(head[2 * i]), b = static_cast<R>(head[2 * i + 1]), c = v.cos[i], s = v.sin[i];
        out[2 * i] = from_float<T>(static_cast<C>(a * c - b * s));
        out[2 * i + 1] = from_float<T>(static_cast<C>(b * c + a * s));
      }
    }
  }
}

template <typename T, typename M>
static void block(const Rows<T>& rows, int64_t dim, double eps, const Vectors<T>& v) {
  typename M::S rstd[kRows];
  // The head dimensions of SD3 and Flux as constants: the loops over one row are unrolled
  const auto run = [&](auto d) {
    roots<T, typename M::S>(rows, d, eps, rstd);
    apply<T, M>(rows, d, rstd, v);
  };
  if (dim == 64) return run(std::integral_constant<int64_t, 64>{});
  if (dim == 128) return run(std::integral_constant<int64_t, 128>{});
  run(dim);
}

// Rows whose elements are not side by side go through scratch memory.
template <typename T, typename M>
static void strided_block(Rows<T> rows, const QkTensor& t, int64_t dim, double eps, const Vectors<T>& v, T* scratch) {
  const Rows<T> given = rows;
  if (t.x_stride[3] != 1) {
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int64_t i = 0; i < dim; ++i) scratch[r * dim + i] = given.x[r * given.x_stride + i * t.x_stride[3]];
    }
    rows.x = scratch;
    rows.x_stride = dim;
  }
  if (t.out_stride[3] != 1) {
    rows.out = scratch;  // x's rows may be there too: each element is read before its place is written
    rows.out_stride = dim;
  }
  block<T, M>(rows, dim, eps, v);
  if (t.out_stride[3] == 1) return;
  for (int64_t r = 0; r < rows.count; ++r) {
    for (int64_t i = 0; i < dim; ++i) given.out[r * given.out_stride + i * t.out_stride[3]] = scratch[r * dim + i];
  }
}

template <typename T, typename M>
static void tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t dim = n.dim, *xs = t.x_stride, *os = t.out_stride;
  const bool inner = xs[3] == 1 && os[3] == 1;
  std::vector<C> weight(t.weight ? dim : 0), head(M::kRotate ? dim : 0);
  for (int64_t i = 0; t.weight && i < dim; ++i) weight[i] = to_float(static_cast<const T*>(t.weight)[i * t.weight_stride]);
  std::vector<T> scratch(inner ? 0 : kRows * dim);
  std::vector<float> table(M::kRotate ? dim : 0);
  const Vectors<T> v{t.weight ? weight.data() : nullptr, table.data(), table.data() + dim / 2, head.data()};
  // Without a rotation the heads of consecutive tokens are one run of rows where both tensors allow it
  const bool merge = !M::kRotate && xs[1] == t.heads * xs[2] && os[1] == t.heads * os[2];
  for (int64_t i = begin; i < end;) {
    const int64_t b = i / t.tokens, token = i % t.tokens;
    const int64_t run = !merge ? 1 : (end - i < t.tokens - token ? end - i : t.tokens - token);
    if (M::kRotate) {
      for (int64_t j = 0; j < dim / 2; ++j) {
        table[j] = n.cos[token * n.cos_stride[0] + j * n.cos_stride[1]];
        table[dim / 2 + j] = n.sin[token * n.sin_stride[0] + j * n.sin_stride[1]];
      }
    }
    const T* x = static_cast<const T*>(t.x) + b * xs[0] + token * xs[1];
    T* out = static_cast<T*>(t.out) + b * os[0] + token * os[1];
    for (int64_t row = 0; row < run * t.heads; row += kRows) {
      const int64_t left = run * t.heads - row;
      const Rows<T> rows{x + row * xs[2], xs[2], out + row * os[2], os[2], left < kRows ? left : kRows};
      if (inner) {
        block<T, M>(rows, dim, n.eps, v);
      } else {
        strided_block<T, M>(rows, t, dim, n.eps, v, scratch.data());
      }
    }
    i += run;
  }
}

template <typename T>
static void choose(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  if (n.exact && !n.torch_rms) {
    if (n.cos) return tokens<T, Mode<float, true, true, true>>(n, t, begin, end);
    return tokens<T, Mode<float, true, false, false>>(n, t, begin, end);
  }
  if (!n.cos) return tokens<T, Mode<C, false, false, false>>(n, t, begin, end);
  if (n.exact) return tokens<T, Mode<C, false, true, true>>(n, t, begin, end);
  tokens<T, Mode<C, false, true, false>>(n, t, begin, end);
}

void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, float) { choose<float>(n, t, begin, end); }
void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, double) { choose<double>(n, t, begin, end); }
void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, bfloat16) { choose<bfloat16>(n, t, begin, end); }
void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, float16) { choose<float16>(n, t, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
