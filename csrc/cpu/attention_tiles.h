// Register tiles of the two products of attention, and the softmax between them.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/attention_pack.h"
#include "cpu/attention_simd.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int64_t kKeys = 256;   // keys of a block, and the length of a row of logits
constexpr int64_t kChain = 128;  // units summed before the sum is added to memory: rounding errors grow with the length of a chain
constexpr int64_t kFewKeys = 64, kShortChain = 16;
static_assert(kKeys % kPanel == 0);

// acc[r][c] += sum over steps of a[r] * b[c]. `a` is read at r * a_row + step * a_step.
template <typename Units, int vectors, int a_row, int a_step>
[[gnu::always_inline]] inline void accumulate(vf (&acc)[kRows][vectors], const uint32_t* a, const uint32_t* b, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, a += a_step, b += vectors * kLanes) {
    typename Units::vector row[vectors];
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) row[c] = Units::load(b + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Units::vector x = Units::splat(a + r * a_row);
#pragma GCC unroll 8
      for (int c = 0; c < vectors; ++c) acc[r][c] = Units::mac(acc[r][c], x, row[c]);
    }
  }
}

// logits[r][:] = q[r] . k for one panel of keys, and highest[r][lane] = the largest so far in each lane. Long rows come in pieces of
// kChain units (`more`: added to what is there).
template <typename Units, int vectors>
void logits_tile(const uint32_t* q, const uint32_t* k, int64_t units, bool more, float* logits, float* highest) {
  vf acc[kRows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) acc[r][c] = vset(0);
  }
  accumulate<Units, vectors, kPadded, 1>(acc, q, k, units);
  if (more) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < vectors; ++c) acc[r][c] = vadd(acc[r][c], vload(logits + r * kKeys + c * kLanes));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    vf top = vload(highest + r * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) {
      vstore(logits + r * kKeys + c * kLanes, acc[r][c]);
      top = vmax(acc[r][c], top);
    }
    vstore(highest + r * kLanes, top);
  }
}

// out[r][:] = out[r][:] * decay[r] + weights[r] . v for one panel of channels, over at most kChain units.
template <typename Units, int vectors>
void output_tile(const uint32_t* weights, const uint32_t* v, int64_t units, const float* decay, float* out, int64_t out_row) {
  vf acc[kRows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) acc[r][c] = vset(0);
  }
  accumulate<Units, vectors, kKeys, 1>(acc, weights, v, units);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, out += out_row) {
    const vf keep = vset(decay[r]);
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) vstore(out + c * kLanes, vfma(vload(out + c * kLanes), keep, acc[r][c]));
  }
}

// Calls f with the number of vectors as a compile-time constant.
template <typename F>
inline void with_vectors(int64_t vectors, F&& f) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return f(std::integral_constant<int, 4>{});
    if (vectors == 3) return f(std::integral_constant<int, 3>{});
  }
  if (vectors == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

// Turns the logits of one row into weights 2^((s - highest) * factor), in place (as units), and updates the row's running values.
template <typename Units>
inline void softmax_row(float* logits, int64_t vectors, float block_highest, float factor, float& highest, float* total, float& decay) {
  const float now = std::max(highest, block_highest);
  decay = 1;
  if (now != highest) {
    decay = highest == -INFINITY ? 0.0f : vmax_of(vexp2<6>(vset((highest - now) * factor)));
    vstore(total, vmul(vload(total), vset(decay)));
    highest = now;
  }
  const vf base = vset(now == -INFINITY ? 0.0f : now), scale = vset(factor);
  vf sum = vload(total);
  if constexpr (Units::pack == 1) {
    for (int64_t i = 0; i < vectors; ++i) {
      const vf p = vexp2<Units::exp_degree>(vmul(vsub(vload(logits + i * kLanes), base), scale));
      sum = vadd(sum, p);
      vstore(logits + i * kLanes, p);
    }
  } else {
#if defined(__AVX512BF16__)
    // The sum is taken over the rounded weights, by the same instruction that multiplies them with the values.
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    uint32_t* out = reinterpret_cast<uint32_t*>(logits);
    for (int64_t i = 0; i < vectors; i += 2) {
      const vf low = vexp2<Units::exp_degree>(vmul(vsub(vload(logits + i * kLanes), base), scale));
      const vf high = i + 1 < vectors ? vexp2<Units::exp_degree>(vmul(vsub(vload(logits + (i + 1) * kLanes), base), scale)) : vset(0);
      const __m512bh p = _mm512_cvtne2ps_pbh(high, low);
      sum = _mm512_dpbf16_ps(sum, p, ones);
      _mm512_storeu_si512(out + i / 2 * kLanes, (__m512i)p);
    }
#endif
  }
  vstore(total, sum);
}

inline void highest_of(const float* logits, int64_t vectors, float* lane_highest) {
  vf highest = vset(-INFINITY);
  for (int64_t i = 0; i < vectors; ++i) highest = vmax(vload(logits + i * kLanes), highest);
  vstore(lane_highest, highest);
}

// bias[j] = what the mask adds to key begin + j for one query: 0 or -inf for a boolean mask.
template <typename T>
inline void read_bias(const T* mask, int64_t stride, int64_t count, float* bias) {
  if (stride == 1) {
    for (int64_t j = 0; j < count; ++j) bias[j] = static_cast<float>(to_float(mask[j]));
  } else {
    for (int64_t j = 0; j < count; ++j) bias[j] = static_cast<float>(to_float(mask[j * stride]));
  }
}
inline void read_bias(const uint8_t* mask, int64_t stride, int64_t count, float* bias) {
  for (int64_t j = 0; j < count; ++j) bias[j] = mask[j * stride] ? 0.0f : -INFINITY;
}
inline void read_bias(const AttentionMask& m, const AttentionTask& task, int64_t query, int64_t key, int64_t count, float* bias) {
  const int64_t at = task.batch * m.batch + task.head * m.head + query * m.query + key * m.key;
  switch (m.type) {
    case AttentionType::boolean: return read_bias(static_cast<const uint8_t*>(m.data) + at, m.key, count, bias);
    case AttentionType::f32: return read_bias(static_cast<const float*>(m.data) + at, m.key, count, bias);
    case AttentionType::bf16: return read_bias(static_cast<const bfloat16*>(m.data) + at, m.key, count, bias);
    case AttentionType::f16: return read_bias(static_cast<const float16*>(m.data) + at, m.key, count, bias);
    case AttentionType::f64: return read_bias(static_cast<const double*>(m.data) + at, m.key, count, bias);
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
