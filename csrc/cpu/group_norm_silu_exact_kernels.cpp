// GroupNorm with SiLU, exact: PyTorch's order of operations, element by element. Loops, compiled once per ISA level.
#include "cpu/group_norm_silu_rows.h"

namespace fusewire::FUSEWIRE_ISA {

// exact: what of a [C, spatial] or [spatial, C] row PyTorch does how.
struct ExactSteps { bool centered, scaled, shifted; };

template <typename T, bool Fused, int Silu, typename Row, typename At>  // Silu: 0 none, 1 by vectors, 2 by the C library
FUSEWIRE_INLINE void exact_element(const T* x, T* out, const ExactSteps& steps, const Row& row, const At& at) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  const auto v = at.load(x), factor = row.template get<N>(kFactor, at);
  // without weight and bias PyTorch subtracts the mean first (contiguous pictures only)
  auto y = steps.centered ? (v - row.template get<N>(kCenter, at)) * factor : stock_fma<Fused, N, C>(v, factor, row.template get<N>(kOffset, at));
  y = rounded<T, N>(y);
  if (steps.scaled) y = rounded<T, N>(y * row.template get<N>(kAdd, at));  // 1 + scale lies where close has what is added
  if (steps.shifted) y = rounded<T, N>(y + row.template get<N>(kShift, at));
  // None of the 65536 values of bfloat16 rounds otherwise by the shorter way (three of float16 do)
  if constexpr (Silu == 1) {
    if constexpr (std::is_same_v<T, bfloat16>) y = y / (1 + close_exponential<float, N>(-y));
    else y = silu<true, N, C>(y);
  }
  if constexpr (Silu == 2) y = silu_by_library<N, C>(y);
  at.store(out, y);
}

// `count` elements that lie at `position` of the output.
template <typename T, bool Fused, typename Row>
FUSEWIRE_INLINE void exact_row(const GroupNormTask& k, const T* x, T* out, int64_t position, int64_t count, const ExactSteps& steps, const Row& row) {
  constexpr int N = kLanes<compute_t<T>>;
  if (!k.silu) {
    return for_columns<N>(0, count, [&](const auto& at) __attribute__((always_inline)) { exact_element<T, Fused, 0>(x, out, steps, row, at); });
  }
  const int64_t total = k.batch * k.sample();
  for (int64_t begin = 0; begin < count;) {
    // PyTorch's silu splits the output into chunks, one for each thread; what does not fill its step at a chunk's end is done one by one
    const int64_t chunk = (position + begin) / k.silu_chunk * k.silu_chunk;
    const int64_t length = chunk + k.silu_chunk < total ? k.silu_chunk : total - chunk;
    const int64_t whole = chunk + (k.silu_step ? length - length % k.silu_step : 0) - position;
    const bool vector = begin < whole;
    const int64_t stop = vector ? whole : chunk + length - position, end = stop < count ? stop : count;
    if (vector) {
      for_columns<N>(begin, end, [&](const auto& at) __attribute__((always_inline)) { exact_element<T, Fused, 1>(x, out, steps, row, at); });
    } else {
      for_columns<N>(begin, end, [&](const auto& at) __attribute__((always_inline)) { exact_element<T, Fused, 2>(x, out, steps, row, at); });
    }
    begin = end;
  }
}

template <typename T>
static ExactSteps exact_steps(const GroupNormTask& k) {
  return {!k.channels_last && !k.weight.data && !k.bias.data, k.scale.data != nullptr, k.shift.data != nullptr};
}

// PyTorch's factor and offset of channel c, and the modulation as it rounds it, by `put(row, value)`.
template <typename T, bool Fused, typename Put>
FUSEWIRE_INLINE void exact_coefficients(const GroupNormTask& k, int64_t n, int64_t c, compute_t<T> mean, compute_t<T> rstd, const Put& put) {
  using C = compute_t<T>;
  const bool centered = exact_steps<T>(k).centered;
  const C factor = rstd * parameter<T>(k.weight, 0, c, 1);
  put(kCenter, mean);
  put(kFactor, centered ? rstd : factor);
  put(kOffset, stock_fma(Fused && (k.fused_offset || !k.channels_last), -factor, mean, parameter<T>(k.bias, 0, c, 0)));
  put(kAdd, to_float(from_float<T>(1 + parameter<T>(k.scale, n, c, 0))));
  put(kShift, parameter<T>(k.shift, n, c, 0));
}

template <typename T>
static compute_t<T> exact_rstd(compute_t<T> variance, double eps) {
  using C = compute_t<T>;
  return static_cast<C>(1 / std::sqrt((variance < 0 ? C(0) : variance) + eps));
}

// out = x + add over `count` elements, rounded: where the exact norm then reads from.
template <typename T, typename Row>
FUSEWIRE_INLINE void add_row(const T* x, T* out, int64_t count, const Row& row) {
  constexpr int N = kLanes<compute_t<T>>;
  for_columns<N>(0, count, [&](const auto& at) __attribute__((always_inline)) { at.store(out, at.load(x) + row.template get<N>(kAdd, at)); });
}

template <typename T, bool Fused>
static void exact_planes(const GroupNormTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t d = k.group_channels(), s = k.spatial;
  const StockMoments<T, Fused> stock(d * s, k.order);
  const ExactSteps steps = exact_steps<T>(k);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / k.groups, g = i % k.groups, position = i * d * s;
    const T* x = static_cast<const T*>(k.x) + n * k.x_batch + g * d * s;
    T* out = static_cast<T*>(k.out) + position;
    if (k.add.data) {
      for (int64_t j = 0; j < d; ++j) {
        PlaneRow<C> row;
        row.value[kAdd] = parameter<T>(k.add, n, g * d + j, 0);
        add_row(x + j * s, out + j * s, s, row);
      }
      x = out;
    }
    const T* rows[1] = {x};
    C mean[1], variance[1];
    stock(rows, mean, variance);
    const C rstd = exact_rstd<T>(variance[0], k.eps);
    for (int64_t j = 0; j < d; ++j) {
      PlaneRow<C> row;
      exact_coefficients<T, Fused>(k, n, g * d + j, mean[0], rstd, [&](GroupNormRow r, C value) { row.value[r] = value; });
      exact_row<T, Fused>(k, x + j * s, out + j * s, position + j * s, s, steps, row);
    }
  }
}

// Where the exact norm of [spatial, C] pictures reads sample n: out holds x + add, if anything is added.
template <typename T>
static const T* exact_source(const GroupNormTask& k, int64_t n) {
  return k.add.data ? static_cast<const T*>(k.out) + n * k.sample() : static_cast<const T*>(k.x) + n * k.x_batch;
}

template <typename T, bool Fused>
static void exact_pixels(const GroupNormTask& k, int64_t begin, int64_t end) {
  const int64_t c = k.channels;
  const ExactSteps steps = exact_steps<T>(k);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / k.spatial;
    const PixelRow<compute_t<T>> row{coefficients<T>(k, n, kCenter), c};
    exact_row<T, Fused>(k, exact_source<T>(k, n) + (i - n * k.spatial) * c, static_cast<T*>(k.out) + i * c, i * c, c, steps, row);
  }
}

template <typename T>
static void add_pixels(const GroupNormTask& k, int64_t begin, int64_t end) {
  const int64_t c = k.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / k.spatial;
    const PixelRow<compute_t<T>> row{coefficients<T>(k, n, kCenter), c};
    add_row(static_cast<const T*>(k.x) + n * k.x_batch + (i - n * k.spatial) * c, static_cast<T*>(k.out) + i * c, c, row);
  }
}

template <typename T, bool Fused>
static void store_exact(const GroupNormTask& k, int64_t n, int64_t g, compute_t<T> sum, compute_t<T> square) {
  using C = compute_t<T>;
  const int64_t c = k.channels, d = k.group_channels();
  const C share = C(1) / static_cast<C>(d * k.spatial), mean = sum * share;
  const C rstd = exact_rstd<T>(stock_fma(Fused, square, share, -(mean * mean)), k.eps);
  C* rows = coefficients<T>(k, n, kCenter);
  for (int64_t j = g * d; j < (g + 1) * d; ++j) {
    exact_coefficients<T, Fused>(k, n, j, mean, rstd, [&](GroupNormRow r, C value) { rows[r * c + j] = value; });
  }
}

// The lanes of one of PyTorch's vectors added up: by halves in its AVX2 kernels for floats, otherwise one after another.
template <bool Fused, typename C, int N>
FUSEWIRE_INLINE C stock_lane_sum(lanes<C, N> v) {
  if constexpr (Fused && sizeof(C) == 4) return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  C sum = v[0];
  for (int i = 1; i < N; ++i) sum += v[i];
  return sum;
}

// PyTorch's sums of a small picture: 32-byte vectors along the group's channels, pixel after pixel into one vector.
template <typename T, bool Fused>
static void exact_small(const GroupNormTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int N = 32 / sizeof(C), kHalves = sizeof(C) / sizeof(T);
  using V = lanes<C, N>;
  const int64_t c = k.channels, d = k.group_channels();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / k.groups, g = i % k.groups;
    V sum{}, square{};
    const auto take = [&](V v) {
      sum += v;
      square += v * v;
    };
    const auto take_pair = [&](V a, V b) {
      sum += a + b;
      square += a * a + b * b;
    };
    for (int64_t p = 0; p < k.spatial; ++p) {
      const T* x = exact_source<T>(k, n) + p * c + g * d;
      int64_t j = 0;
      for (; j + kHalves * N <= d; j += kHalves * N) {
        if constexpr (kHalves == 2) take_pair(load<N>(x + j), load<N>(x + j + N));
        else take(load<N>(x + j));
      }
      if (d - j > N) take_pair(load<N>(x + j), load_part<N>(x + j + N, d - j - N));
      else if (d - j > 0) take(load_part<N>(x + j, d - j));
    }
    store_exact<T, Fused>(k, n, g, stock_lane_sum<Fused, C, N>(sum), stock_lane_sum<Fused, C, N>(square));
  }
}

template <typename T, bool Fused>
static void thread_sums(const GroupNormTask& k, int64_t begin, int64_t end, void* sums) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  const int64_t c = k.channels;
  while (begin < end) {
    const int64_t n = begin / k.spatial, next = (n + 1) * k.spatial, last = next < end ? next : end;
    C* sum = static_cast<C*>(sums) + n * 2 * c;
    pixel_sums(exact_source<T>(k, n) + (begin - n * k.spatial) * c, last - begin, c, sum, sum + c,
               [&](const auto&, auto v, auto& s, auto& q) __attribute__((always_inline)) { s += v, q = stock_fma<Fused, N, C>(v, v, q); });
    begin = last;
  }
}

template <typename T, bool Fused>
static void exact_large(const GroupNormTask& k, const void* sums, int64_t threads) {
  using C = compute_t<T>;
  const int64_t c = k.channels, d = k.group_channels();
  for (int64_t n = 0; n < k.batch; ++n) {
    for (int64_t g = 0; g < k.groups; ++g) {
      C sum = 0, square = 0;
      for (int64_t j = g * d; j < (g + 1) * d; ++j) {
        for (int64_t t = 0; t < threads; ++t) {
          const C* one = static_cast<const C*>(sums) + (t * k.batch + n) * 2 * c + j;
          sum += one[0], square += one[c];
        }
      }
      store_exact<T, Fused>(k, n, g, sum, square);
    }
  }
}

// By whether PyTorch's kernels fuse multiply-adds.
#define FUSEWIRE_FUSED(f) (k.order == StockOrder::portable ? &f<T, false> : &f<T, true>)
template <typename T>
struct Exact {
  static void planes(const GroupNormTask& k, int64_t begin, int64_t end) { FUSEWIRE_FUSED(exact_planes)(k, begin, end); }
  static void pixels(const GroupNormTask& k, int64_t begin, int64_t end) { FUSEWIRE_FUSED(exact_pixels)(k, begin, end); }
  static void small(const GroupNormTask& k, int64_t begin, int64_t end) { FUSEWIRE_FUSED(exact_small)(k, begin, end); }
  static void sums(const GroupNormTask& k, int64_t begin, int64_t end, void* sums) { FUSEWIRE_FUSED(thread_sums)(k, begin, end, sums); }
  static void large(const GroupNormTask& k, const void* sums, int64_t threads) { FUSEWIRE_FUSED(exact_large)(k, sums, threads); }
};

#define FUSEWIRE_EXACT_GROUP_NORM(T)                                                                                                    \
  void group_norm_exact_planes(const GroupNormTask& k, int64_t begin, int64_t end, T) { Exact<T>::planes(k, begin, end); }              \
  void group_norm_add(const GroupNormTask& k, int64_t begin, int64_t end, T) { add_pixels<T>(k, begin, end); }                          \
  void group_norm_small(const GroupNormTask& k, int64_t begin, int64_t end, T) { Exact<T>::small(k, begin, end); }                      \
  void group_norm_thread_sums(const GroupNormTask& k, int64_t begin, int64_t end, void* sums, T) { Exact<T>::sums(k, begin, end, sums); } \
  void group_norm_large(const GroupNormTask& k, const void* sums, int64_t threads, T) { Exact<T>::large(k, sums, threads); }            \
  void group_norm_exact_pixels(const GroupNormTask& k, int64_t begin, int64_t end, T) { Exact<T>::pixels(k, begin, end); }
FUSEWIRE_EXACT_GROUP_NORM(float)
FUSEWIRE_EXACT_GROUP_NORM(double)
FUSEWIRE_EXACT_GROUP_NORM(bfloat16)
FUSEWIRE_EXACT_GROUP_NORM(float16)

}  // namespace fusewire::FUSEWIRE_ISA
