// QK norm with rotary embedding: loops over blocks of heads, compiled once per ISA level.
#include "cpu/qk_norm_rope.h"

#include <cmath>
#include <type_traits>
#include <vector>

#include "common/pairs.h"
#include "common/torch_sum.h"
#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

// What differs between the roundings. S: the type in which squares are summed and the root is taken.
// kRoundNorm: the normalised value is rounded to T before the weight. kRoundHead: the head is rounded to T, and to float, before the rotation.
// kStockSum: squares are summed in PyTorch's order. kNorm: there is a norm; kHalves: an element's partner is half a head away, not beside it.
template <typename S_, bool kRoundNorm_, bool kRotate_, bool kRoundHead_, bool kStockSum_ = true, bool kNorm_ = true, bool kHalves_ = false>
struct Mode {
  using S = S_;
  static constexpr bool kRoundNorm = kRoundNorm_, kRotate = kRotate_, kRoundHead = kRoundHead_, kStockSum = kStockSum_, kNorm = kNorm_, kHalves = kHalves_;
};

constexpr int kRows = 16;  // rows whose roots are taken together: one vector of AVX-512
constexpr int kAhead = 4;  // blocks of rows: a block takes less time than memory takes to answer

// Up to kRows rows of one tensor that lie at a constant distance, all of one token where there is a rotation.
template <typename T>
struct HeadRows {
  const T* x;
  int64_t x_stride;
  T* out;
  int64_t out_stride;
  int64_t count;
  bool streams;
};

template <typename T>
struct Vectors {
  const compute_t<T>* weight;  // [D] or null
  const float* cos;            // [D], each value twice; for halves [D/2]
  const float* sin;            // [D], each value twice, the first of them negated; for halves [D/2]
};

#if defined(__AVX512F__)
// The sums of 16 vectors' lanes, side by side: half the lanes remain after each of four steps.
FUSEWIRE_INLINE lanes<float, 16> sums_of_lanes(const __m512 (&v)[16]) {
  __m512 two[8], four[4], eight[2];
  for (int i = 0; i < 8; ++i) two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  return bits_as<lanes<float, 16>>(_mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd)));
}

// As `roots`, in an order of its own. dim is a multiple of 32. All kRows sums stay in registers, whatever rows.count is: stores to memory between those
// that go past the caches hold them up.
template <typename T>
FUSEWIRE_INLINE void close_roots(const HeadRows<T>& rows, int64_t dim, double eps, float* rstd) {
  using V = lanes<float, 16>;
  __m512 sum[kRows];
  for (int r = 0; r < kRows; ++r) {
    const T* x = rows.x + (r < rows.count ? r : 0) * rows.x_stride;
    V even{}, odd{};
    for (int64_t j = 0; j < dim; j += 32) {
      const V a = load<16>(x + j), b = load<16>(x + j + 16);
      even = fma<16, float>(a, a, even), odd = fma<16, float>(b, b, odd);
    }
    sum[r] = bits_as<__m512>(even + odd);
  }
  const V mean = sums_of_lanes(sum) / splat<16>(static_cast<float>(dim)) + splat<16>(static_cast<float>(eps));
  _mm512_storeu_ps(rstd, _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(bits_as<__m512>(mean))));
}
#endif

// rstd_r = 1 / sqrt(mean(x_r^2) + eps)
template <bool kStockSum, typename T, typename S>
FUSEWIRE_INLINE void roots(const HeadRows<T>& rows, int64_t dim, double eps, S* rstd) {
#if defined(__AVX512F__)
  if constexpr (!kStockSum && sizeof(T) <= sizeof(float) && std::is_same_v<S, float>) {
    if (dim % 32 == 0) return close_roots(rows, dim, eps, rstd);
  }
#endif
  constexpr int W = kSumLanes<S>;
  S sum[kRows], lane[kRows][W];
  for (int64_t r = 0; r < rows.count; ++r) {
    const Squares<S, T> squares{rows.x + r * rows.x_stride};
    if (dim < W) {
      sum[r] = torch_sum<S>(squares, dim);
    } else {
      torch_sum_lanes<S>(squares, dim, lane[r], &sum[r]);
    }
  }
  if (dim >= W) {
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int j = 0; j < W; ++j) sum[r] += lane[r][j];
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < rows.count; ++r) rstd[r] = 1 / std::sqrt(sum[r] / static_cast<S>(dim) + static_cast<S>(eps));
}

// head = x * rstd * weight; a pair of it (a, b) is turned to (a cos - b sin, b cos + a sin)
template <typename T, typename M, bool kWeight, bool kStreams>
FUSEWIRE_INLINE void apply(const HeadRows<T>& rows, int64_t dim, const typename M::S* rstd, const Vectors<T>& v) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* x = rows.x + r * rows.x_stride;
    T* out = rows.out + r * rows.out_stride;
    lanes<C, N> root{};
    if constexpr (M::kNorm) root = splat<N>(static_cast<C>(rstd[r]));
    const int64_t next_x = kAhead * kRows * rows.x_stride, next_out = kAhead * kRows * rows.out_stride;
    const auto make = [&](const auto& column) __attribute__((always_inline)) {
      __builtin_prefetch(x + next_x + column.j);  // memory answers while these rows are computed
      if constexpr (!kStreams) __builtin_prefetch(out + next_out + column.j, 1);
      lanes<C, N> y = column.load(x);
      if constexpr (M::kNorm) y *= root;
      if constexpr (kWeight) y = (M::kRoundNorm ? rounded<T, N>(y) : y) * column.load(v.weight);
      if constexpr (M::kRotate) {
        // in float for every dtype where the stock code is followed
        using R = std::conditional_t<M::kRoundHead, float, C>;
        if constexpr (M::kRoundHead) y = rounded<T, N>(y);
        const auto head = __builtin_convertvector(y, lanes<R, N>);
        const auto cos = __builtin_convertvector(column.load(v.cos), lanes<R, N>), sin = __builtin_convertvector(column.load(v.sin), lanes<R, N>);
        y = __builtin_convertvector(head * cos + swap_pairs<N, R>(head) * sin, lanes<C, N>);
      }
      return y;
    };
    int64_t j = 0;
    for (; j + 2 * N <= dim; j += 2 * N) {
      const auto first = make(Whole<N>{j});
      put_pair<kStreams, N>(out + j, first, make(Whole<N>{j + N}));
    }
    for_columns<N>(j, dim, [&](const auto& column) __attribute__((always_inline)) {
      if constexpr (kStreams) column.stream(out, make(column));
      else column.store(out, make(column));
    });
  }
}

// The pair (x[i], x[i + D/2]) = (a, b) is turned to (a cos - b sin, b cos + a sin); out may be x.
template <typename T, typename M>
FUSEWIRE_INLINE void turn_halves(const HeadRows<T>& rows, int64_t dim, const Vectors<T>& v) {
  using C = compute_t<T>;
  using R = std::conditional_t<M::kRoundHead, float, C>;
  constexpr int N = kLanes<C>;
  const int64_t half = dim / 2;
  for (int64_t r = 0; r < rows.count; ++r) {
    const T* x = rows.x + r * rows.x_stride;
    T* out = rows.out + r * rows.out_stride;
    for_columns<N>(0, half, [&](const auto& column) __attribute__((always_inline)) {
      const auto a = __builtin_convertvector(column.load(x), lanes<R, N>), b = __builtin_convertvector(column.load(x + half), lanes<R, N>);
      const auto cos = __builtin_convertvector(column.load(v.cos), lanes<R, N>), sin = __builtin_convertvector(column.load(v.sin), lanes<R, N>);
      column.store(out, __builtin_convertvector(a * cos - b * sin, lanes<C, N>));
      column.store(out + half, __builtin_convertvector(b * cos + a * sin, lanes<C, N>));
    });
  }
}

template <typename T, typename M>
static void block(const HeadRows<T>& rows, int64_t dim, double eps, const Vectors<T>& v) {
  typename M::S rstd[kRows];
  // The head dimensions of SD3 and Flux as constants: the loops over one row are unrolled
  const auto run = [&](auto d) __attribute__((always_inline)) {
    if constexpr (M::kHalves) return turn_halves<T, M>(rows, d, v);
    if constexpr (M::kNorm) roots<M::kStockSum, T, typename M::S>(rows, d, eps, rstd);
    const bool weighted = M::kNorm && v.weight;
    if (rows.streams) {
      weighted ? apply<T, M, true, true>(rows, d, rstd, v) : apply<T, M, false, true>(rows, d, rstd, v);
    } else {
      weighted ? apply<T, M, true, false>(rows, d, rstd, v) : apply<T, M, false, false>(rows, d, rstd, v);
    }
  };
  if (dim == 64) return run(std::integral_constant<int64_t, 64>{});
  if (dim == 128) return run(std::integral_constant<int64_t, 128>{});
  run(dim);
}

// Rows whose elements are not side by side go through scratch memory.
template <typename T, typename M>
static void strided_block(HeadRows<T> rows, const QkTensor& t, int64_t dim, double eps, const Vectors<T>& v, T* scratch) {
  const HeadRows<T> given = rows;
  if (t.x_stride[3] != 1) {
    for (int64_t r = 0; r < rows.count; ++r) {
      for (int64_t i = 0; i < dim; ++i) scratch[r * dim + i] = given.x[r * given.x_stride + i * t.x_stride[3]];
    }
    rows.x = scratch;
    rows.x_stride = dim;
  }
  rows.streams = false;
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
  std::vector<C> weight(t.weight ? dim : 0);
  for (int64_t i = 0; t.weight && i < dim; ++i) weight[i] = to_float(static_cast<const T*>(t.weight)[i * t.weight_stride]);
  std::vector<T> scratch(inner ? 0 : kRows * dim);
  std::vector<float> table(M::kRotate ? 2 * dim : 0);
  const Vectors<T> v{t.weight ? weight.data() : nullptr, table.data(), table.data() + dim};
  // Without a rotation the heads of consecutive tokens are one run of rows where both tensors allow it
  const bool merge = !M::kRotate && xs[1] == t.heads * xs[2] && os[1] == t.heads * os[2];
  for (int64_t i = begin; i < end;) {
    const int64_t b = i / t.tokens, token = i % t.tokens;
    const int64_t run = !merge ? 1 : (end - i < t.tokens - token ? end - i : t.tokens - token);
    if constexpr (M::kRotate) {
      for (int64_t j = 0; j < dim / 2; ++j) {
        if constexpr (M::kHalves) {
          table[j] = n.cos[token * n.cos_stride[0] + j * n.cos_stride[1]];
          table[dim + j] = n.sin[token * n.sin_stride[0] + j * n.sin_stride[1]];
          continue;
        }
        table[2 * j] = table[2 * j + 1] = n.cos[token * n.cos_stride[0] + j * n.cos_stride[1]];
        table[dim + 2 * j + 1] = n.sin[token * n.sin_stride[0] + j * n.sin_stride[1]];
        table[dim + 2 * j] = -table[dim + 2 * j + 1];
      }
    }
    const T* x = static_cast<const T*>(t.x) + b * xs[0] + token * xs[1];
    T* out = static_cast<T*>(t.out) + b * os[0] + token * os[1];
    for (int64_t row = 0; row < run * t.heads; row += kRows) {
      const int64_t left = run * t.heads - row;
      const HeadRows<T> rows{x + row * xs[2], xs[2], out + row * os[2], os[2], left < kRows ? left : kRows, t.streams};
      if (inner) {
        block<T, M>(rows, dim, n.eps, v);
      } else {
        strided_block<T, M>(rows, t, dim, n.eps, v, scratch.data());
      }
    }
    i += run;
  }
  if (t.streams) end_of_stream();
}

template <typename T>
static void choose(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  if (n.norm == kHalvesRotation) {
    if (n.exact) return tokens<T, Mode<C, false, true, true, false, false, true>>(n, t, begin, end);
    return tokens<T, Mode<C, false, true, false, false, false, true>>(n, t, begin, end);
  }
  if (n.norm == kRotation) {
    if (n.exact) return tokens<T, Mode<C, false, true, true, false, false>>(n, t, begin, end);
    return tokens<T, Mode<C, false, true, false, false, false>>(n, t, begin, end);
  }
  if (n.exact && n.norm == kRms) {
    if (n.cos) return tokens<T, Mode<float, true, true, true>>(n, t, begin, end);
    return tokens<T, Mode<float, true, false, false>>(n, t, begin, end);
  }
  if (n.exact && n.cos) return tokens<T, Mode<C, false, true, true>>(n, t, begin, end);
  if (n.exact) return tokens<T, Mode<C, false, false, false>>(n, t, begin, end);
  if (n.cos) return tokens<T, Mode<C, false, true, false, false>>(n, t, begin, end);
  tokens<T, Mode<C, false, false, false, false>>(n, t, begin, end);
}

void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, float) { choose<float>(n, t, begin, end); }
void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, double) { choose<double>(n, t, begin, end); }
void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, bfloat16) { choose<bfloat16>(n, t, begin, end); }
void qk_norm_tokens(const QkNorm& n, const QkTensor& t, int64_t begin, int64_t end, float16) { choose<float16>(n, t, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
