// adaLN: loops over rows, compiled once per ISA level.
#include "cpu/adaln.h"

#include <cmath>
#include <cstdlib>

#include "common/row_norm.h"
#include "common/torch_sum.h"

namespace fusewire::FUSEWIRE_ISA {

enum class Mode { close, exact_portable, exact_fused };

// The rows of one thread. Modulations are read once per sample into contiguous rows of the compute type; then blocks of R rows share each load of
// them. A row is read once from memory, stays in the L1 cache for its statistics and its modulation, and is written once.
template <typename T, Mode M, bool kStreams>
class AdalnRows {
  using C = compute_t<T>;
  static constexpr int N = kLanes<C>;
  static constexpr bool kExact = M != Mode::close, kFused = M == Mode::exact_fused;
  // close keeps the sum x + gate * y in the compute type for the norm; exact rounds it first, as stock does.
  using Sum = std::conditional_t<kExact, T, C>;
  // Rows of a block. close takes gated sums one by one: x, y, the sum and the modulations of one row stay in the L1 cache, which is worth more than
  // sharing the loads of the modulations.
  static constexpr int R = 4, kGated = kExact ? R : 1;
  static constexpr bool kKept = kStreams || !std::is_same_v<Sum, T>;  // the norm reads the sum from scratch memory, not from the output
  using V = lanes<C, N>;

  const AdalnTask& k_;
  const int64_t n_;
  const StockMoments<T, kFused> stock_;
  // Room for one row each: modulations, weight and bias; for R rows each: gathered x, y, y2, and the sum
  C *gate_room_[2], *shift_room_[2], *scale_room_[2], *weight_, *bias_;
  T* gathered_[3];
  Sum* sum_;
  // The modulations of the current sample or token
  const C *gate_[2], *shift_[2], *scale_[2];

  static C* contiguous(const Rows& m, int64_t b, int64_t t, int64_t n, C* room, bool plus_one) {
    const T* p = m.at<T>(b, t);
    if constexpr (std::is_same_v<T, C>) {
      if (m.channel == 1 && !plus_one) return const_cast<C*>(p);
    }
    const C one = plus_one ? 1 : 0;
    if (m.channel == 1) {
      for_columns<N>(0, n, [&](auto at) {
        const V value = one + at.load(p);
        at.store(room, kExact ? rounded<T, N>(value) : value);
      });
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const C value = one + to_float(p[i * m.channel]);
        room[i] = kExact ? to_float(from_float<T>(value)) : value;
      }
    }
    return room;
  }

  // R rows of x from token t on: in place where their channels are contiguous, otherwise copied.
  template <int K>
  void gather(const Rows& x, int64_t b, int64_t t, T* room, const T* (&rows)[K]) const {
    for (int r = 0; r < K; ++r) {
      const T* p = x.at<T>(b, t + r);
      rows[r] = p;
      if (x.channel != 1) {
        T* copy = room + r * n_;
        for (int64_t i = 0; i < n_; ++i) copy[i] = p[i * x.channel];
        rows[r] = copy;
      }
    }
  }

  // Elements from a row of x to the one that is read K rows later; 0 where rows are gathered.
  template <int K>
  static int64_t further(const Rows& x) { return x.channel == 1 ? K * x.token : 0; }

  void modulations(int64_t b, int64_t t) {
    const Rows* gates[] = {&k_.gate, &k_.gate2};
    for (int i = 0; i < 2; ++i) {
      if (gates[i]->data) gate_[i] = contiguous(*gates[i], b, t, n_, gate_room_[i], false);
      if (i < k_.modulations) {
        shift_[i] = contiguous(k_.shift[i], b, t, n_, shift_room_[i], false);
        scale_[i] = contiguous(k_.scale[i], b, t, n_, scale_room_[i], true);
      }
    }
  }

  static FUSEWIRE_INLINE V gated(V x, V gate, V y) {
    if constexpr (kExact) return rounded<T, N>(x + rounded<T, N>(gate * y));
    return fma<N, C>(gate, y, x);
  }

  using Coefficients = RowNorm<C>;  // as the branches of `normalised` use them

  // r = x + gate * y + gate2 * y2 into the residual output, and into `sum` where the norm reads another type. Measures: and what LayerNorm needs of it.
  template <bool Second, bool Measures, int K>
  void residuals(int64_t b, int64_t t, const T* const (&x)[K], const Sum* (&sums)[K], Coefficients (&row)[K]) const {
    const T *y[K], *y2[K]{};
    gather<K>(k_.y, b, t, gathered_[1], y);
    if constexpr (Second) gather<K>(k_.y2, b, t, gathered_[2], y2);
    const int64_t next_x = further<K>(k_.x), next_y = further<K>(k_.y), n = n_;
    const bool widen = k_.modulations != 0, asks = k_.asks_ahead;
    const C *gate = gate_[0], *gate2 = gate_[1];
    for (int r = 0; r < K; ++r) {
      T* const out = static_cast<T*>(k_.residual) + (b * k_.tokens + t + r) * n;
      Sum* const wide = sum_ + r * n;
      const T *const from = x[r], *const added = y[r], *const added2 = y2[r];
      const auto value = [&](const auto& at) __attribute__((always_inline)) {
        V sum = gated(at.load(from), at.load(gate), at.load(added));
        if constexpr (Second) sum = gated(sum, at.load(gate2), at.load(added2));
        return sum;
      };
      const auto make = [&](const auto& at) __attribute__((always_inline)) {
        if (asks) {
          __builtin_prefetch(from + next_x + at.j);  // memory answers while these rows are computed; y's next rows are asked for by `modulate`
          if (!widen) __builtin_prefetch(added + next_y + at.j);
          if constexpr (!kStreams) __builtin_prefetch(out + K * n + at.j, 1);
        }
        const V sum = value(at);
        put(at, out, sum);
        if constexpr (kKept) {
          if (widen) at.store(wide, sum);
        }
        return sum;
      };
      if constexpr (kKept) sums[r] = wide;
      else sums[r] = out;
      if constexpr (Measures) row[r] = layer_norm_of(moments_on_the_way(sums[r], n, value, make), static_cast<C>(k_.eps));
      else for_columns<N>(0, n, make);
    }
  }

  template <int K, typename X>
  void statistics(const X* const (&x)[K], Coefficients (&row)[K]) const {
    const C eps = static_cast<C>(k_.eps);
    if constexpr (!kExact) {
      for (int r = 0; r < K; ++r) row[r] = k_.rms ? row_norm<true>(x[r], n_, eps) : row_norm<false>(x[r], n_, eps);
    } else if (k_.rms) {
      for (int r = 0; r < K; ++r) {
        const C mean = torch_sum<C>(Squares<C, X>{x[r]}, n_) / static_cast<C>(n_);
        row[r] = {0, 1 / std::sqrt(mean + eps), 0};
      }
    } else {
      C mean[K], variance[K];
      stock_(x, mean, variance);
      for (int r = 0; r < K; ++r) {
        const C rstd = 1 / std::sqrt(variance[r] + eps);
        row[r] = {mean[r], rstd, -rstd * mean[r]};
      }
    }
  }

  // Plain: LayerNorm without weight and bias.
  template <bool Plain, typename At>
  FUSEWIRE_INLINE V normalised(V x, const Coefficients& row, const At& at) const {
    const V a = splat<N>(row.a), b = splat<N>(row.b), c = splat<N>(row.c);
    const bool rms = !Plain && k_.rms;
    const C *weight = Plain ? nullptr : weight_, *bias = Plain ? nullptr : bias_;
    if constexpr (!kExact) {
      V y = rms ? x * b : fma<N, C>(x - a, b, c);
      if (weight) y *= at.load(weight);
      return bias ? y + at.load(bias) : y;
    } else if (rms) {  // diffusers' RMSNorm
      V y = rounded<T, N>(x * b);
      if (weight) y = rounded<T, N>(y * at.load(weight));
      return bias ? rounded<T, N>(y + at.load(bias)) : y;
    } else {  // ATen's layer norm: 16-bit types fold the mean into an addend, the others subtract it first
      V y = sizeof(T) == sizeof(C) ? (x - a) * b : stock_fma<kFused, N, C>(x, b, c);
      if (weight || bias) y = stock_fma<kFused, N, C>(y, weight ? at.load(weight) : splat<N>(C(1)), bias ? at.load(bias) : V{});
      return rounded<T, N>(y);
    }
  }

  template <typename At>
  FUSEWIRE_INLINE static void put(const At& at, T* out, V value) {
    if constexpr (kStreams) at.stream(out, value);
    else at.store(out, value);
  }
  template <typename At>
  FUSEWIRE_INLINE static void put(const At& at, T* out, V y, V scale, V shift) {
    put(at, out, kExact ? rounded<T, N>(y * scale) + shift : fma<N, C>(y, scale, shift));
  }

  // Columns [begin, n) of row i.
  template <typename X>
  void modulate_row(int64_t i, int64_t begin, const X* x, const Coefficients& row, const T* ahead) const {
    const bool asks = k_.asks_ahead;
    for_columns<N>(begin, n_, [&](auto at) {
      if (asks) __builtin_prefetch(ahead + at.j);
      const V y = normalised<false>(at.load(x), row, at);
      for (int m = 0; m < k_.modulations; ++m) put(at, static_cast<T*>(k_.out[m]) + i * n_, y, at.load(scale_[m]), at.load(shift_[m]));
    });
  }

  // K rows from row i on, plain LayerNorm; the columns beyond the last whole vector are left.
  template <bool Dual, bool Asks, int K, typename X>
  void modulate_block(int64_t i, const X* const (&x)[K], const Coefficients (&row)[K], const T* const (&ahead)[K]) const {
    T *out = static_cast<T*>(k_.out[0]) + i * n_, *out2 = static_cast<T*>(k_.out[1]) + i * n_;
    for (Whole<N> at{0}; at.j + N <= n_; at.j += N) {
      const V scale = at.load(scale_[0]), shift = at.load(shift_[0]);
      for (int r = 0; r < K; ++r) {
        if constexpr (Asks) {
          __builtin_prefetch(ahead[r] + at.j);
          if constexpr (!kStreams) __builtin_prefetch(out + (K + r) * n_ + at.j, 1);
        }
        const V y = normalised<true>(at.load(x[r]), row[r], at);
        put(at, out + r * n_, y, scale, shift);
        if constexpr (Dual) put(at, out2 + r * n_, y, at.load(scale_[1]), at.load(shift_[1]));
      }
    }
  }

  // `from`: whose next rows are wanted.
  template <int K, typename X>
  void modulate(int64_t b, int64_t t, const X* const (&x)[K], const Coefficients (&row)[K], const Rows& from) const {
    const int64_t i = b * k_.tokens + t;
    const T* ahead[K];
    for (int r = 0; r < K; ++r) ahead[r] = from.at<T>(b, t + r) + further<K>(from);
    int64_t done = 0;
    if constexpr ((K == R || K == kGated) && M != Mode::exact_portable) {
      if (!k_.rms && !weight_ && !bias_) {
        if (k_.modulations == 2) {
          k_.asks_ahead ? modulate_block<true, true>(i, x, row, ahead) : modulate_block<true, false>(i, x, row, ahead);
        } else {
          k_.asks_ahead ? modulate_block<false, true>(i, x, row, ahead) : modulate_block<false, false>(i, x, row, ahead);
        }
        done = n_ / N * N;
      }
    }
    for (int r = 0; r < K; ++r) modulate_row(i + r, done, x[r], row[r], ahead[r]);
  }

  template <int K>
  void block(int64_t b, int64_t t) const {
    const T* x[K];
    Coefficients row[K];
    gather<K>(k_.x, b, t, gathered_[0], x);
    if (!k_.y.data) {
      statistics<K>(x, row);
      return modulate<K>(b, t, x, row, k_.x);
    }
    const Sum* sums[K];
    if constexpr (!kExact) {
      if (k_.modulations && !k_.rms) {
        k_.y2.data ? residuals<true, true, K>(b, t, x, sums, row) : residuals<false, true, K>(b, t, x, sums, row);
        return modulate<K>(b, t, sums, row, k_.y);
      }
    }
    k_.y2.data ? residuals<true, false, K>(b, t, x, sums, row) : residuals<false, false, K>(b, t, x, sums, row);
    if (!k_.modulations) return;
    statistics<K>(sums, row);
    modulate<K>(b, t, sums, row, k_.y);
  }

  template <int K>
  bool blocks(int64_t b, int64_t& i, int64_t last) const {
    if (i + K > last) return false;
    block<K>(b, i - b * k_.tokens);
    i += K;
    return true;
  }

 public:
  // Room for n elements of every kind, for R rows of those that a block has several of.
  static size_t room(int64_t n) { return n * (8 * sizeof(C) + R * (3 * sizeof(T) + sizeof(Sum))) + 64; }

  AdalnRows(const AdalnTask& k, void* room) : k_(k), n_(k.channels), stock_(k.channels, k.order) {
    C* wide = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(room) + 63) / 64 * 64);
    const auto next = [&] { return (wide += n_) - n_; };
    for (int i = 0; i < 2; ++i) gate_room_[i] = next(), shift_room_[i] = next(), scale_room_[i] = next();
    C *weight = next(), *bias = next();
    weight_ = k.weight.data ? contiguous(k.weight, 0, 0, n_, weight, false) : nullptr;
    bias_ = k.bias.data ? contiguous(k.bias, 0, 0, n_, bias, false) : nullptr;
    sum_ = reinterpret_cast<Sum*>(wide);
    T* narrow = reinterpret_cast<T*>(sum_ + R * n_);
    for (int i = 0; i < 3; ++i) gathered_[i] = narrow + i * R * n_;
  }

  void run(int64_t begin, int64_t end) {
    bool per_token = (k_.gate.token | k_.gate2.token) != 0;
    for (int i = 0; i < k_.modulations; ++i) per_token |= (k_.shift[i].token | k_.scale[i].token) != 0;
    for (int64_t i = begin; i < end;) {
      const int64_t b = i / k_.tokens, next = (b + 1) * k_.tokens, last = next < end ? next : end;
      if (!per_token) modulations(b, 0);
      const bool alone = per_token || M == Mode::exact_portable, gates = k_.y.data && k_.modulations;
      while (i < last) {
        if (per_token) modulations(b, i - b * k_.tokens);
        if (alone || !(gates ? blocks<kGated>(b, i, last) : blocks<R>(b, i, last))) blocks<1>(b, i, last);
      }
    }
  }
};

template <typename T, Mode M, bool kStreams = false>
static void run(const AdalnTask& k, int64_t begin, int64_t end) {
  using Kernel = AdalnRows<T, M, kStreams>;
  if constexpr (!kStreams && M != Mode::exact_portable && !std::is_same_v<T, double>) {
    if (k.streams) return run<T, M, true>(k, begin, end);
  }
  void* room = std::malloc(Kernel::room(k.channels));
  Kernel(k, room).run(begin, end);
  std::free(room);
  if constexpr (kStreams) end_of_stream();
}

template <typename T>
static void rows(const AdalnTask& k, int64_t begin, int64_t end) {
  if (!k.exact) return run<T, Mode::close>(k, begin, end);
  if (k.order == StockOrder::portable) return run<T, Mode::exact_portable>(k, begin, end);
  return run<T, Mode::exact_fused>(k, begin, end);
}

template <typename T, bool Fused>
static void moments(const T* x, int64_t rows, int64_t channels, double eps, StockOrder order, compute_t<T>* out) {
  const StockMoments<T, Fused> stock(channels, order);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row[1] = {x + i * channels};
    compute_t<T> mean[1], variance[1];
    stock(row, mean, variance);
    out[2 * i] = mean[0];
    out[2 * i + 1] = 1 / std::sqrt(variance[0] + static_cast<compute_t<T>>(eps));
  }
}

#define FUSEWIRE_ADALN(T)                                                                                                            \
  void adaln_rows(const AdalnTask& k, int64_t begin, int64_t end, T) { rows<T>(k, begin, end); }                                     \
  void layer_norm_moments(const T* x, int64_t rows, int64_t channels, double eps, StockOrder order, compute_t<T>* out) {             \
    (order == StockOrder::portable ? moments<T, false> : moments<T, true>)(x, rows, channels, eps, order, out);                      \
  }
FUSEWIRE_ADALN(float)
FUSEWIRE_ADALN(double)
FUSEWIRE_ADALN(bfloat16)
FUSEWIRE_ADALN(float16)

}  // namespace fusewire::FUSEWIRE_ISA
