// Gated activations and their gradients: loops over rows, compiled once per ISA level.
#include "cpu/gated_mlp.h"

#include <memory>

#include "common/activations.h"
#include "common/column_fold.h"
#include "common/row_access.h"

namespace fusewire::FUSEWIRE_ISA {

// The biases as contiguous vectors of the compute type, and room for K gathered rows of three tensors.
template <typename T, int K>
struct GatedMemory {
  using C = compute_t<T>;
  std::unique_ptr<C[]> wide;
  std::unique_ptr<T[]> rows;
  const C *hidden_bias = nullptr, *gate_bias = nullptr;

  explicit GatedMemory(const GatedTask& k) {
    if (k.gate_bias.data) {
      wide.reset(new C[2 * k.width]);
      const auto read = [&](const BiasHalf& b, C* room) { return wide_vector(static_cast<const T*>(b.data), b.stride, k.width, room); };
      if (k.hidden_bias.data) hidden_bias = read(k.hidden_bias, wide.get());
      gate_bias = read(k.gate_bias, wide.get() + k.width);
    }
    rows.reset(new T[3 * K * row_pitch<T>(k.width)]);
  }
  void gather(const LeadingRows& from, int64_t row, int count, int64_t n, int which, const T** found) const {
    gather_rows(from, row, count, n, rows.get() + which * K * row_pitch<T>(n), found);
  }
};

template <typename T, typename Act, bool Gated, bool Bias>
static void forward(const GatedTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>, kBlock = 16;
  const GatedMemory<T, kBlock> memory(k);
  const int64_t n = k.width;
  const C *const hidden_bias = memory.hidden_bias, *const gate_bias = memory.gate_bias;  // not read again after each store
  const T *hidden[kBlock], *gate[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    memory.gather(k.gate, i, count, n, 0, gate);
    if constexpr (Gated) memory.gather(k.hidden, i, count, n, 1, hidden);
    for (int r = 0; r < count; ++r) {
      T* out = static_cast<T*>(k.out) + (i + r) * n;
      for_columns<N>(0, n, [&](const auto& at) __attribute__((always_inline)) {
        lanes<C, N> g = at.load(gate[r]);
        if constexpr (Bias) g += at.load(gate_bias);
        lanes<C, N> y = Act::template value<T, N>(g);
        if constexpr (Gated) y = (Bias ? at.load(hidden[r]) + at.load(hidden_bias) : at.load(hidden[r])) * y;
        at.store(out, y);
      });
    }
  }
}

template <typename T, typename Act, bool Gated, bool Bias>
static void backward(const GatedGradientTask& k, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>, kSide = 4, kHalves = Gated ? 2 : 1;
  const GatedTask& f = k.forward;
  const GatedMemory<T, kSide> memory(f);
  const int64_t n = f.width;
  const std::unique_ptr<C[]> group(new C[k.sums ? kHalves * n : 0]());
  C *hidden_sums = group.get() + k.hidden_at, *gate_sums = group.get() + k.gate_at;
  const auto rows = [&](int64_t i, auto rows_at_once) __attribute__((always_inline)) {
    constexpr int K = rows_at_once;
    const T *grad[K], *hidden[K]{}, *gate[K];
    memory.gather(k.grad, i, K, n, 0, grad);
    memory.gather(f.gate, i, K, n, 1, gate);
    if constexpr (Gated) memory.gather(f.hidden, i, K, n, 2, hidden);
    T *dhidden = static_cast<T*>(k.dhidden) + i * k.stride, *dgate = static_cast<T*>(k.dgate) + i * k.stride;
    for_columns<N>(0, n, [&](const auto& at) __attribute__((always_inline)) {
      using V = lanes<C, N>;
      V of_hidden{}, of_gate{};
      for (int r = 0; r < K; ++r) {
        V g = at.load(gate[r]), y, slope;
        if constexpr (Bias) g += at.load(memory.gate_bias);
        Act::template both<T, N>(g, y, slope);
        const V dy = at.load(grad[r]);
        if constexpr (Gated) {
          V h = at.load(hidden[r]);
          if constexpr (Bias) h += at.load(memory.hidden_bias);
          slope *= h;
          y *= dy;
          if constexpr (Bias) of_hidden += y;
          at.store(dhidden + r * k.stride, y);
        }
        slope *= dy;
        if constexpr (Bias) of_gate += slope;
        at.store(dgate + r * k.stride, slope);
      }
      if constexpr (Bias) {
        if (k.sums) {
          if constexpr (Gated) at.store(hidden_sums, at.load(hidden_sums) + of_hidden);
          at.store(gate_sums, at.load(gate_sums) + of_gate);
        }
      }
    });
  };
  for (int64_t block = begin; block < end; ++block) {
    for_block<kSide>(k.blocks, block, kHalves * n, group.get(), k.sums ? static_cast<C*>(k.sums) + block * kHalves * n : nullptr, rows);
  }
}

// Calls f(activation, gated, bias), the last two as constants.
template <typename F>
FUSEWIRE_INLINE void choose(const GatedTask& k, const F& f) {
  constexpr std::bool_constant<true> yes;
  constexpr std::bool_constant<false> no;
  const bool gated = k.hidden.data, bias = k.gate_bias.data;
  const auto with = [&](auto act) __attribute__((always_inline)) {
    if (gated) return bias ? f(act, yes, yes) : f(act, yes, no);
    return bias ? f(act, no, yes) : f(act, no, no);
  };
  switch (k.activation) {
    case GatedActivation::gelu_erf: return with(GeluErf{});
    case GatedActivation::silu: return with(Silu{});
    case GatedActivation::gelu_tanh: return bias ? f(GeluTanh{}, no, yes) : f(GeluTanh{}, no, no);
    case GatedActivation::quick_gelu: return bias ? f(QuickGelu{}, no, yes) : f(QuickGelu{}, no, no);
  }
}

template <typename T>
static void run(const GatedTask& k, int64_t begin, int64_t end) {
  choose(k, [&](auto act, auto gated, auto bias) { forward<T, decltype(act), gated, bias>(k, begin, end); });
}

template <typename T>
static void run(const GatedGradientTask& k, int64_t begin, int64_t end) {
  choose(k.forward, [&](auto act, auto gated, auto bias) { backward<T, decltype(act), gated, bias>(k, begin, end); });
}

#define FUSEWIRE_GATED(T)                                                                                          \
  void gated_rows(const GatedTask& k, int64_t begin, int64_t end, T) { run<T>(k, begin, end); }                 \
  void gated_gradient_blocks(const GatedGradientTask& k, int64_t begin, int64_t end, T) { run<T>(k, begin, end); }
FUSEWIRE_GATED(float)
FUSEWIRE_GATED(double)
FUSEWIRE_GATED(bfloat16)
FUSEWIRE_GATED(float16)

}  // namespace fusewire::FUSEWIRE_ISA
