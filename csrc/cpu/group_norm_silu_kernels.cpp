// GroupNorm with SiLU, close: loops, compiled once per ISA level.
#include "cpu/group_norm_silu_rows.h"

#include <cstdlib>

#include "common/activations.h"

namespace fusewire::FUSEWIRE_ISA {

// close: `count` elements of x in one pass.
template <typename T, bool Silu, bool Added, typename Row>
FUSEWIRE_INLINE void close_row(const T* x, T* out, int64_t count, const Row& row) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  for_columns<N>(0, count, [&](const auto& at) __attribute__((always_inline)) {
    auto v = at.load(x);
    if constexpr (Added) v += row.template get<N>(kAdd, at);
    v = stock_fma<kHasFma, N, C>(v - row.template get<N>(kCenter, at), row.template get<N>(kFactor, at), row.template get<N>(kOffset, at));
    if constexpr (Silu) v = logistic<T, N>(v, v);
    at.store(out, v);
  });
}

template <typename T, bool Silu, bool Added>
static void close_planes(const GroupNormTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t d = k.group_channels(), s = k.spatial;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / k.groups, g = i % k.groups;
    const T* x = static_cast<const T*>(k.x) + n * k.x_batch + g * d * s;
    T* out = static_cast<T*>(k.out) + i * d * s;
    const GroupMoments<C> m = plane_moments<T>(k, x, n, g);
    for (int64_t j = 0; j < d; ++j) {
      const Affine<C> a = close_affine<T>(k, n, g * d + j, m);
      PlaneRow<C> row;
      row.value[kCenter] = m.center, row.value[kFactor] = a.factor, row.value[kOffset] = a.offset;
      row.value[kAdd] = parameter<T>(k.add, n, g * d + j, 0);
      close_row<T, Silu, Added>(x + j * s, out + j * s, s, row);
    }
  }
}

template <typename T>
static void planes(const GroupNormTask& k, int64_t begin, int64_t end) {
  if (k.add.data) return (k.silu ? close_planes<T, true, true> : close_planes<T, false, true>)(k, begin, end);
  (k.silu ? close_planes<T, true, false> : close_planes<T, false, false>)(k, begin, end);
}

template <typename T>
static void guess(const GroupNormTask& k, int64_t n) {
  using C = compute_t<T>;
  const T* x = static_cast<const T*>(k.x) + n * k.x_batch;
  const int64_t d = k.group_channels();
  C *center = coefficients<T>(k, n, kCenter), *add = coefficients<T>(k, n, kAdd);
  for (int64_t c = 0; c < k.channels; ++c) add[c] = parameter<T>(k.add, n, c, 0);
  for (int64_t g = 0; g < k.groups; ++g) {
    C sum = 0;
    for (int64_t c = g * d; c < (g + 1) * d; ++c) sum += to_float(x[c]) + add[c];
    for (int64_t c = g * d; c < (g + 1) * d; ++c) center[c] = sum / static_cast<C>(d);
  }
}

template <typename T>
static void block_sums(const GroupNormTask& k, int64_t n, int64_t begin, int64_t end, void* sums) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  const int64_t c = k.channels;
  const C *center = coefficients<T>(k, n, kCenter), *add = coefficients<T>(k, n, kAdd);
  for (int64_t block = begin; block < end; ++block) {
    C *sum = static_cast<C*>(sums) + block * 2 * c, *square = sum + c;
    std::memset(sum, 0, 2 * c * sizeof(C));
    const int64_t first = block * kPixelBlock, last = first + kPixelBlock < k.spatial ? first + kPixelBlock : k.spatial;
    const T* x = static_cast<const T*>(k.x) + n * k.x_batch + first * c;
    const auto take = [&](const auto& at, auto v, auto& s, auto& q) __attribute__((always_inline)) {
      const auto d = v - at.load(center);
      s += d, q = stock_fma<kHasFma, N, C>(d, d, q);
    };
    const auto take_added = [&](const auto& at, auto v, auto& s, auto& q) __attribute__((always_inline)) { take(at, v + at.load(add), s, q); };
    k.add.data ? pixel_sums(x, last - first, c, sum, square, take_added) : pixel_sums(x, last - first, c, sum, square, take);
  }
}

template <typename T>
static bool finish(const GroupNormTask& k, int64_t n, const void* sums, bool again) {
  using C = compute_t<T>;
  const int64_t c = k.channels, d = k.group_channels();
  C *center = coefficients<T>(k, n, kCenter), *factor = coefficients<T>(k, n, kFactor), *offset = coefficients<T>(k, n, kOffset);
  double* total = static_cast<double*>(std::calloc(2 * c, sizeof(double)));
  for (int64_t b = 0; b < k.blocks(); ++b) {
    const C* sum = static_cast<const C*>(sums) + b * 2 * c;
    for (int64_t j = 0; j < 2 * c; ++j) total[j] += sum[j];
  }
  bool good = true;
  for (int64_t g = 0; g < k.groups; ++g) {
    WideSums group;
    for (int64_t j = g * d; j < (g + 1) * d; ++j) group.sum += total[j], group.square += total[c + j];
    GroupMoments<C> m;
    const bool close_enough = group_moments(center[g * d], group, static_cast<double>(d * k.spatial), k.eps, m);
    good &= close_enough;
    for (int64_t j = g * d; j < (g + 1) * d; ++j) {
      const Affine<C> a = close_affine<T>(k, n, j, m);
      factor[j] = a.factor, offset[j] = a.offset;
      if (!again && !close_enough) center[j] = static_cast<C>(m.center + m.offset);
    }
  }
  std::free(total);
  return good || again;
}

template <typename T, bool Silu, bool Added>
static void close_pixels(const GroupNormTask& k, int64_t begin, int64_t end) {
  const int64_t c = k.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / k.spatial;
    const PixelRow<compute_t<T>> row{coefficients<T>(k, n, kCenter), c};
    close_row<T, Silu, Added>(static_cast<const T*>(k.x) + n * k.x_batch + (i - n * k.spatial) * c, static_cast<T*>(k.out) + i * c, c, row);
  }
}

template <typename T>
static void pixels(const GroupNormTask& k, int64_t begin, int64_t end) {
  if (k.add.data) return (k.silu ? close_pixels<T, true, true> : close_pixels<T, false, true>)(k, begin, end);
  (k.silu ? close_pixels<T, true, false> : close_pixels<T, false, false>)(k, begin, end);
}

#define FUSEWIRE_GROUP_NORM(T)                                                                                                          \
  void group_norm_planes(const GroupNormTask& k, int64_t begin, int64_t end, T) { planes<T>(k, begin, end); }                           \
  void group_norm_guess(const GroupNormTask& k, int64_t n, T) { guess<T>(k, n); }                                                       \
  void group_norm_block_sums(const GroupNormTask& k, int64_t n, int64_t begin, int64_t end, void* sums, T) {                            \
    block_sums<T>(k, n, begin, end, sums);                                                                                              \
  }                                                                                                                                     \
  bool group_norm_finish(const GroupNormTask& k, int64_t n, const void* sums, bool again, T) { return finish<T>(k, n, sums, again); }   \
  void group_norm_pixels(const GroupNormTask& k, int64_t begin, int64_t end, T) { pixels<T>(k, begin, end); }
FUSEWIRE_GROUP_NORM(float)
FUSEWIRE_GROUP_NORM(double)
FUSEWIRE_GROUP_NORM(bfloat16)
FUSEWIRE_GROUP_NORM(float16)

}  // namespace fusewire::FUSEWIRE_ISA
