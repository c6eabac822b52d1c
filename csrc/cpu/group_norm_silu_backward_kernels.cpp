// The gradients of GroupNorm with SiLU: loops, compiled once per ISA level.
#include "cpu/group_norm_silu_backward.h"

#include <memory>

#include "common/activations.h"
#include "cpu/group_norm_silu_rows.h"

namespace fusewire::FUSEWIRE_ISA {

// What weight, bias, scale and shift make of xhat in channel c of sample n.
template <typename T>
FUSEWIRE_INLINE void modulation_of(const GroupNormTask& k, int64_t n, int64_t c, compute_t<T>& factor, compute_t<T>& offset) {
  const compute_t<T> scale = 1 + parameter<T>(k.scale, n, c, 0);
  factor = parameter<T>(k.weight, 0, c, 1) * scale;
  offset = parameter<T>(k.bias, 0, c, 0) * scale + parameter<T>(k.shift, n, c, 0);
}

constexpr int64_t kKept = 1 << 18;  // numbers of a group, apart from its dx, that the cache keeps

template <typename C>
using GradientPlane = PlaneRow<C, GradientRow, kGradientRows>;
template <typename C>
using GradientPixel = PixelRow<C, GradientRow>;

// xhat of x, and dh of grad.
template <typename T, bool Silu, typename Row, typename More, typename At>
FUSEWIRE_INLINE void xhat_and_gradient(const T* x, const T* grad, const Row& row, const More& more, const At& at,
                                       lanes<compute_t<T>, kLanes<compute_t<T>>>& xhat, lanes<compute_t<T>, kLanes<compute_t<T>>>& dh) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  const auto v = at.load(x) + row.template get<N>(kAdd, at);
  xhat = stock_fma<kHasFma, N, C>(v - row.template get<N>(kCenter, at), row.template get<N>(kFactor, at), row.template get<N>(kOffset, at));
  dh = at.load(grad);
  if constexpr (Silu) {
    lanes<C, N> value, slope;
    const auto h = stock_fma<kHasFma, N, C>(xhat, more.template get<N>(kScaled, at), more.template get<N>(kShifted, at));
    fusewire::FUSEWIRE_ISA::Silu::both<T, N>(h, value, slope);
    dh *= slope;
  }
}

// dx of a run of elements. `kept`: their dh, from the sums before (may be dx itself); null: computed again.
template <typename T, bool Silu, typename Row, typename More>
FUSEWIRE_INLINE void gradient_row(const T* x, const T* grad, const compute_t<T>* kept, T* dx, int64_t count, const Row& row, const More& more) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  const auto write = [&](const auto& at, lanes<C, N> dh) __attribute__((always_inline)) {
    const auto centered = at.load(x) + row.template get<N>(kAdd, at) - row.template get<N>(kCenter, at);
    const auto rest = stock_fma<kHasFma, N, C>(centered, more.template get<N>(kByCentered, at), more.template get<N>(kConstant, at));
    at.store(dx, stock_fma<kHasFma, N, C>(dh, more.template get<N>(kByGrad, at), rest));
  };
  if (kept) return for_columns<N>(0, count, [&](const auto& at) __attribute__((always_inline)) { write(at, at.load(kept)); });
  for_columns<N>(0, count, [&](const auto& at) __attribute__((always_inline)) {
    lanes<C, N> xhat, dh;
    xhat_and_gradient<T, Silu>(x, grad, row, more, at, xhat, dh);
    write(at, dh);
  });
}

// Zero in the lanes beyond the elements of a column.
template <int N, typename V>
FUSEWIRE_INLINE void clear_beyond(const Whole<N>&, V&) {}
template <int N, typename V>
FUSEWIRE_INLINE void clear_beyond(const Part<N>& at, V& x) {
  for (int l = static_cast<int>(at.n); l < N; ++l) x[l] = 0;
}

// The sums over one channel's `count` pixels, in float64 from at most 4096 elements on, and until then in chains of kChain: rounding errors grow with
// the length of a chain. `kept`, unless null, gets dh.
template <typename T, bool Silu, bool Keep>
FUSEWIRE_INLINE void plane_sums(const T* x, const T* grad, compute_t<T>* kept, int64_t count, const PlaneRow<compute_t<T>>& row,
                                const GradientPlane<compute_t<T>>& more, double (&total)[kGradientSums]) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  constexpr int64_t kChain = 16 * N, kBlock = 16 * kChain;
  for (int64_t i = 0; i < count;) {
    const int64_t block = i + kBlock < count ? i + kBlock : count;
    lanes<C, N> sums[kGradientSums]{};
    while (i < block) {
      const int64_t end = i + kChain < block ? i + kChain : block;
      lanes<C, N> sum[kGradientSums]{};
      for_columns<N>(i, end, [&](const auto& at) __attribute__((always_inline)) {
        lanes<C, N> xhat, dh;
        xhat_and_gradient<T, Silu>(x, grad, row, more, at, xhat, dh);
        if constexpr (Keep) at.store(kept, dh);
        clear_beyond(at, xhat), clear_beyond(at, dh);
        sum[kOfShift] += dh, sum[kOfXhat] += xhat;
        sum[kOfFactor] = stock_fma<kHasFma, N, C>(dh, xhat, sum[kOfFactor]);
      });
      for (int s = 0; s < kGradientSums; ++s) sums[s] += sum[s];
      i = end;
    }
    for (int s = 0; s < kGradientSums; ++s)
      for (int l = 0; l < N; ++l) total[s] += sums[s][l];
  }
}

// dh of `count` elements between their sums and dx: in dx itself where that holds it, otherwise in `room`, if any.
template <typename T>
FUSEWIRE_INLINE compute_t<T>* kept_at(T* dx, compute_t<T>* room) {
  if constexpr (std::is_same_v<T, compute_t<T>>) return dx;
  return dx ? room : nullptr;
}

// The means of a group from the sums of its channels, and the three coefficients of dx. xhat = (v - center) * rstd + beyond. `put(c, row, value)`.
template <typename T, typename Put>
FUSEWIRE_INLINE void group_gradient(const GroupNormGradientTask& k, int64_t n, int64_t g, double rstd, double beyond, const Put& put) {
  using C = compute_t<T>;
  const int64_t c = k.norm.channels, d = k.norm.group_channels();
  const double *sums = k.sums + n * kGradientSums * c, count = static_cast<double>(d * k.norm.spatial);
  double mean = 0, mean_xhat = 0;
  for (int64_t j = g * d; j < (g + 1) * d; ++j) {
    C factor, offset;
    modulation_of<T>(k.norm, n, j, factor, offset);
    mean += sums[kOfShift * c + j] * factor, mean_xhat += sums[kOfFactor * c + j] * factor;
  }
  mean /= count, mean_xhat /= count;
  double* values = k.groups + (n * k.norm.groups + g) * kGroupValues;
  values[kRstd] = rstd, values[kMean] = mean, values[kMeanXhat] = mean_xhat;
  for (int64_t j = g * d; j < (g + 1) * d; ++j) {
    C factor, offset;
    modulation_of<T>(k.norm, n, j, factor, offset);
    put(j, kByGrad, static_cast<C>(rstd * factor));
    put(j, kByCentered, static_cast<C>(-rstd * mean_xhat * rstd));
    put(j, kConstant, static_cast<C>(-rstd * (mean + mean_xhat * beyond)));
  }
}

template <typename T, bool Silu>
static void gradient_planes(const GroupNormGradientTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const GroupNormTask& norm = k.norm;
  const int64_t d = norm.group_channels(), s = norm.spatial, c = norm.channels;
  const std::unique_ptr<GradientPlane<C>[]> planes(new GradientPlane<C>[d]);
  const bool apart = !std::is_same_v<T, C> && norm.out && d * s <= kKept;
  const std::unique_ptr<C[]> room(apart ? new C[d * s] : nullptr);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / norm.groups, g = i % norm.groups;
    const T *x = static_cast<const T*>(norm.x) + n * norm.x_batch + g * d * s, *grad = static_cast<const T*>(k.grad) + n * k.grad_batch + g * d * s;
    T* const dx = norm.out ? static_cast<T*>(norm.out) + i * d * s : nullptr;
    C* const kept = kept_at<T>(dx, room.get());
    const GroupMoments<C> m = plane_moments<T>(norm, x, n, g);
    PlaneRow<C> row;
    row.value[kCenter] = m.center, row.value[kFactor] = static_cast<C>(m.rstd), row.value[kOffset] = static_cast<C>(-m.offset * m.rstd);
    for (int64_t j = 0; j < d; ++j) {
      row.value[kAdd] = parameter<T>(norm.add, n, g * d + j, 0);
      modulation_of<T>(norm, n, g * d + j, planes[j].value[kScaled], planes[j].value[kShifted]);
      double total[kGradientSums]{};
      if (kept) {
        plane_sums<T, Silu, true>(x + j * s, grad + j * s, kept + j * s, s, row, planes[j], total);
      } else {
        plane_sums<T, Silu, false>(x + j * s, grad + j * s, nullptr, s, row, planes[j], total);
      }
      for (int t = 0; t < kGradientSums; ++t) k.sums[(n * kGradientSums + t) * c + g * d + j] = total[t];
    }
    group_gradient<T>(k, n, g, m.rstd, -m.offset * m.rstd, [&](int64_t channel, GradientRow r, C value) { planes[channel - g * d].value[r] = value; });
    if (!dx) continue;
    for (int64_t j = 0; j < d; ++j) {
      row.value[kAdd] = parameter<T>(norm.add, n, g * d + j, 0);
      gradient_row<T, Silu>(x + j * s, grad + j * s, kept ? kept + j * s : nullptr, dx + j * s, s, row, planes[j]);
    }
  }
}

template <typename T>
FUSEWIRE_INLINE compute_t<T>* gradient_rows_of(const GroupNormGradientTask& k, int64_t n) {
  return static_cast<compute_t<T>*>(k.rows) + n * kGradientRows * k.norm.channels;
}

template <typename T>
static void modulation_rows(const GroupNormGradientTask& k, int64_t n) {
  const int64_t c = k.norm.channels;
  compute_t<T>* rows = gradient_rows_of<T>(k, n);
  for (int64_t j = 0; j < c; ++j) modulation_of<T>(k.norm, n, j, rows[kScaled * c + j], rows[kShifted * c + j]);
}

template <typename T, bool Silu, bool Keep>
static void pixel_gradient_sums(const GroupNormGradientTask& k, int64_t n, int64_t begin, int64_t end, void* blocks) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>, kTile = Keep ? 1 : 4, kChain = 16;  // pixels side by side: fewer where each has a third row to write
  const int64_t c = k.norm.channels, count = kGradientSums * c;
  const std::unique_ptr<C[]> chain(new C[count]);  // the sums of kChain pixels: rounding errors grow with the length of a chain
  const PixelRow<C> row{coefficients<T>(k.norm, n, kCenter), c};
  const GradientPixel<C> more{gradient_rows_of<T>(k, n), c};
  for (int64_t block = begin; block < end; ++block) {
    C *const all_sums = static_cast<C*>(blocks) + block * count, *const sums = chain.get();
    std::memset(all_sums, 0, count * sizeof(C));
    std::memset(sums, 0, count * sizeof(C));
    const int64_t last = (block + 1) * kPixelBlock < k.norm.spatial ? (block + 1) * kPixelBlock : k.norm.spatial;
    for (int64_t p = block * kPixelBlock; p < last; p += kTile) {
      const int64_t tile = last - p < kTile ? last - p : kTile;
      const T *x = static_cast<const T*>(k.norm.x) + n * k.norm.x_batch + p * c, *grad = static_cast<const T*>(k.grad) + n * k.grad_batch + p * c;
      C* const kept = Keep ? static_cast<C*>(k.norm.out) + (n * k.norm.spatial + p) * c : nullptr;
      for_columns<N>(0, c, [&](const auto& at) __attribute__((always_inline)) {
        auto shift = at.load(sums), factor = at.load(sums + kOfFactor * c), all = at.load(sums + kOfXhat * c);
        for (int64_t r = 0; r < tile; ++r) {
          lanes<C, N> xhat, dh;
          xhat_and_gradient<T, Silu>(x + r * c, grad + r * c, row, more, at, xhat, dh);
          if constexpr (Keep) at.store(kept + r * c, dh);
          shift += dh, all += xhat;
          factor = stock_fma<kHasFma, N, C>(dh, xhat, factor);
        }
        at.store(sums, shift), at.store(sums + kOfFactor * c, factor), at.store(sums + kOfXhat * c, all);
      });
      if ((p + tile) % kChain && p + tile < last) continue;
      for_columns<N>(0, count, [&](const auto& at) __attribute__((always_inline)) {
        at.store(all_sums, at.load(all_sums) + at.load(sums));
        at.store(sums, lanes<C, N>{});
      });
    }
  }
}

template <typename T, bool Silu>
static void choose_pixel_sums(const GroupNormGradientTask& k, int64_t n, int64_t begin, int64_t end, void* blocks) {
  if (kept_at<T>(static_cast<T*>(k.norm.out), nullptr)) return pixel_gradient_sums<T, Silu, true>(k, n, begin, end, blocks);
  pixel_gradient_sums<T, Silu, false>(k, n, begin, end, blocks);
}

template <typename T>
static void finish_gradient(const GroupNormGradientTask& k, int64_t n, const void* blocks) {
  using C = compute_t<T>;
  const int64_t c = k.norm.channels, count = kGradientSums * c;
  double* sums = k.sums + n * count;
  std::memset(sums, 0, count * sizeof(double));
  for (int64_t b = 0; b < k.norm.blocks(); ++b) {
    const C* block = static_cast<const C*>(blocks) + b * count;
    for (int64_t j = 0; j < count; ++j) sums[j] += block[j];
  }
  const C *rstd = coefficients<T>(k.norm, n, kFactor), *offset = coefficients<T>(k.norm, n, kOffset);
  C* rows = gradient_rows_of<T>(k, n);
  for (int64_t g = 0; g < k.norm.groups; ++g) {
    const int64_t first = g * k.norm.group_channels();
    group_gradient<T>(k, n, g, rstd[first], offset[first], [&](int64_t j, GradientRow r, C value) { rows[r * c + j] = value; });
  }
}

template <typename T, bool Silu>
static void gradient_pixels(const GroupNormGradientTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t c = k.norm.channels, s = k.norm.spatial;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / s, at = (i - n * s) * c;
    T* const dx = static_cast<T*>(k.norm.out) + i * c;
    gradient_row<T, Silu>(static_cast<const T*>(k.norm.x) + n * k.norm.x_batch + at, static_cast<const T*>(k.grad) + n * k.grad_batch + at,
                          kept_at<T>(dx, nullptr), dx, c, PixelRow<C>{coefficients<T>(k.norm, n, kCenter), c},
                          GradientPixel<C>{gradient_rows_of<T>(k, n), c});
  }
}

template <typename T>
static void parameter_gradients(const GroupNormGradientTask& k, T* weight, T* bias, T* shift, T* scale, T* add) {
  using C = compute_t<T>;
  const GroupNormTask& norm = k.norm;
  const int64_t c = norm.channels;
  for (int64_t j = 0; j < c; ++j) {
    double of_weight = 0, of_bias = 0;
    for (int64_t n = 0; n < norm.batch; ++n) {
      const double *sums = k.sums + n * kGradientSums * c + j, *group = k.groups + (n * norm.groups + j / norm.group_channels()) * kGroupValues;
      const double a = sums[kOfShift * c], b = sums[kOfFactor * c], one_scale = 1.0 + parameter<T>(norm.scale, n, j, 0);
      const double w = parameter<T>(norm.weight, 0, j, 1), h = parameter<T>(norm.bias, 0, j, 0);
      of_weight += one_scale * b, of_bias += one_scale * a;
      if (shift) shift[n * c + j] = from_float<T>(static_cast<C>(a));
      if (scale) scale[n * c + j] = from_float<T>(static_cast<C>(w * b + h * a));
      if (add) {
        const double all = w * one_scale * a - static_cast<double>(norm.spatial) * group[kMean] - sums[kOfXhat * c] * group[kMeanXhat];
        add[n * c + j] = from_float<T>(static_cast<C>(group[kRstd] * all));
      }
    }
    if (weight) weight[j] = from_float<T>(static_cast<C>(of_weight));
    if (bias) bias[j] = from_float<T>(static_cast<C>(of_bias));
  }
}

#define FUSEWIRE_GROUP_NORM_GRADIENT(T)                                                                                                  \
  void group_norm_gradient_planes(const GroupNormGradientTask& k, int64_t begin, int64_t end, T) {                                       \
    (k.norm.silu ? gradient_planes<T, true> : gradient_planes<T, false>)(k, begin, end);                                                 \
  }                                                                                                                                      \
  void group_norm_gradient_rows(const GroupNormGradientTask& k, int64_t n, T) { modulation_rows<T>(k, n); }                              \
  void group_norm_gradient_sums(const GroupNormGradientTask& k, int64_t n, int64_t begin, int64_t end, void* blocks, T) {                \
    (k.norm.silu ? choose_pixel_sums<T, true> : choose_pixel_sums<T, false>)(k, n, begin, end, blocks);                                  \
  }                                                                                                                                      \
  void group_norm_gradient_finish(const GroupNormGradientTask& k, int64_t n, const void* blocks, T) { finish_gradient<T>(k, n, blocks); } \
  void group_norm_gradient_pixels(const GroupNormGradientTask& k, int64_t begin, int64_t end, T) {                                       \
    (k.norm.silu ? gradient_pixels<T, true> : gradient_pixels<T, false>)(k, begin, end);                                                 \
  }                                                                                                                                      \
  void group_norm_parameter_gradients(const GroupNormGradientTask& k, T* weight, T* bias, T* shift, T* scale, T* add) {                  \
    parameter_gradients<T>(k, weight, bias, shift, scale, add);                                                                          \
  }
FUSEWIRE_GROUP_NORM_GRADIENT(float)
FUSEWIRE_GROUP_NORM_GRADIENT(double)
FUSEWIRE_GROUP_NORM_GRADIENT(bfloat16)
FUSEWIRE_GROUP_NORM_GRADIENT(float16)

}  // namespace fusewire::FUSEWIRE_ISA
