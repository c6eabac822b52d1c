// Matrix products on AMX tiles (Intel processors from 2023 on), in bfloat16, float16 and float32.
//
// The hardware multiplies bfloat16 only, at many times the rate of AVX-512. A float is the exact sum of three bfloat16 (8 + 8 + 8 bits of
// significand), a float16 of two, so their products are sums of bfloat16 products; those of the lowest order, below one unit in the last
// place of a float, are left out: 6 of 9 for float32, 3 of 4 for float16 (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations"). A tile instruction sums 16 pairs before it adds to the
// accumulator, so that the sums are more accurate than one long chain.
//
// Included by amx_*.cpp only, which are compiled with FUSEWIRE_ISA=amx.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/scalar.h"
#include "common/transpose16.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int64_t kStep = 32;        // elements of the summed dimension in a tile
constexpr int64_t kSide = 32;        // rows and columns of a block: 2 x 2 tiles of results
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPartBytes = 2 * kTileBytes;  // one part of one step of an operand

template <typename T>
constexpr int parts_of = std::is_same_v<T, bfloat16> ? 1 : std::is_same_v<T, float16> ? 2 : 3;

// Tiles 0-7 as 16 rows of 64 bytes while in scope; what was configured before comes back after (oneDNN keeps a configuration of its own).
class TileScope {
 public:
  TileScope() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    asm volatile("" : : "r"(config) : "memory");  // GCC's tile intrinsics do not tell the compiler that they read memory
    _tile_loadconfig(config);
  }
  ~TileScope() {
    if (before_[0]) _tile_loadconfig(before_);
    else _tile_release();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// One step of the products, into tiles 0-3. Parts of the left operand `a` lie `a_part` bytes apart, those of the right one, `b`, beside each other.
// Loads stand right before the first product that needs them: the next ones are under way while the products run. `a_streams`, `b_streams`: that operand
// comes from the second-level cache and goes by, without driving out of the first what is used again.
#define FUSEWIRE_AMX_LOAD_A(tile, from)                                                       \
  if constexpr (a_streams) _tile_stream_loadd(tile, from, 64);                                \
  else _tile_loadd(tile, from, 64)
#define FUSEWIRE_AMX_LOAD_B(tile, from)                                                       \
  if constexpr (b_streams) _tile_stream_loadd(tile, from, 64);                                \
  else _tile_loadd(tile, from, 64)
#define FUSEWIRE_AMX_NEW_A(part)                                                              \
  FUSEWIRE_AMX_LOAD_A(4, a + (part) * a_part);                                                \
  _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);                                           \
  FUSEWIRE_AMX_LOAD_A(5, a + (part) * a_part + kTileBytes);                                   \
  _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)
#define FUSEWIRE_AMX_NEW_B(part)                                                              \
  FUSEWIRE_AMX_LOAD_B(6, b + (part) * kPartBytes);                                            \
  _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);                                           \
  FUSEWIRE_AMX_LOAD_B(7, b + (part) * kPartBytes + kTileBytes);                               \
  _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7)
#define FUSEWIRE_AMX_NEW(a_at, b_at)                                                          \
  FUSEWIRE_AMX_LOAD_B(6, b + (b_at) * kPartBytes);                                            \
  FUSEWIRE_AMX_LOAD_A(4, a + (a_at) * a_part);                                                \
  _tile_dpbf16ps(0, 4, 6);                                                                    \
  FUSEWIRE_AMX_LOAD_B(7, b + (b_at) * kPartBytes + kTileBytes);                               \
  _tile_dpbf16ps(1, 4, 7);                                                                    \
  FUSEWIRE_AMX_LOAD_A(5, a + (a_at) * a_part + kTileBytes);                                   \
  _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)

// Every product but high.high, of two operands in three parts.
#define FUSEWIRE_AMX_LOWER                                                                    \
  FUSEWIRE_AMX_NEW(0, 2);                                                                     \
  FUSEWIRE_AMX_NEW_B(1);                                                                      \
  FUSEWIRE_AMX_NEW_A(1);                                                                      \
  FUSEWIRE_AMX_NEW_B(0);                                                                      \
  FUSEWIRE_AMX_NEW_A(2)

// Those of two parts: high.low, high.high, low.high; each load serves as many products as can be. `WHOLE`: low.low too.
#define FUSEWIRE_AMX_HALVES                                                                   \
  FUSEWIRE_AMX_NEW(0, 1);                                                                     \
  FUSEWIRE_AMX_NEW_B(0);                                                                      \
  FUSEWIRE_AMX_NEW_A(1)
#define FUSEWIRE_AMX_WHOLE                                                                    \
  FUSEWIRE_AMX_NEW(1, 1);                                                                     \
  FUSEWIRE_AMX_NEW_A(0);                                                                      \
  FUSEWIRE_AMX_NEW_B(0);                                                                      \
  FUSEWIRE_AMX_NEW_A(1)

#define FUSEWIRE_AMX_STEP(parts)                                                              \
  if constexpr ((parts) == 1) {                                                               \
    FUSEWIRE_AMX_NEW(0, 0);                                                                   \
  } else if constexpr ((parts) == 2) {                                                        \
    FUSEWIRE_AMX_HALVES;                                                                      \
  } else {                                                                                    \
    FUSEWIRE_AMX_LOWER;                                                                       \
    FUSEWIRE_AMX_NEW_A(0);                                                                    \
  }

// Of linears and convolutions: float16 is all of its two parts, and a sum that cancels shows the least product.
#define FUSEWIRE_AMX_STEP_OF_ALL(parts)                                                       \
  if constexpr ((parts) == 2) {                                                               \
    FUSEWIRE_AMX_WHOLE;                                                                       \
  } else {                                                                                    \
    FUSEWIRE_AMX_STEP(parts);                                                                 \
  }

// Tiles 0-3 become the sums c[32][32], or zeros at first; and c becomes what they hold.
[[gnu::always_inline]] inline void take_sums(const float* c, int64_t row_floats, bool first) {
  const int64_t stride = row_floats * sizeof(float);
  asm volatile("" ::: "memory");  // as in TileScope
  if (first) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  } else {
    _tile_loadd(0, c, stride); _tile_loadd(1, c + 16, stride);
    _tile_loadd(2, c + 16 * row_floats, stride); _tile_loadd(3, c + 16 * row_floats + 16, stride);
  }
}
[[gnu::always_inline]] inline void leave_sums(float* c, int64_t row_floats) {
  const int64_t stride = row_floats * sizeof(float);
  _tile_stored(0, c, stride); _tile_stored(1, c + 16, stride);
  _tile_stored(2, c + 16 * row_floats, stride); _tile_stored(3, c + 16 * row_floats + 16, stride);
  asm volatile("" ::: "memory");
}

// c[32][32] (+)= a . b over `steps` steps. Operands: [step][part][2 tiles][1024 bytes]. Every element is
// summed in one order, whatever its neighbours. `lower_first`: the small products of all steps before the large ones, so that fewer sums
// are rounded at full size; for results that an exponential will magnify.
// `whole`: float16's fourth product too, so that nothing is rounded but sums; for results whose difference from another sum will matter.
// `a_streams`: see above.
template <int parts, bool lower_first = false, bool whole = false, bool a_streams = false>
[[gnu::always_inline]] inline void multiply_block(const char* a, const char* b, int64_t steps, float* c, int64_t row_floats, bool first) {
  constexpr int64_t a_part = kPartBytes;
  constexpr bool b_streams = false;
  take_sums(c, row_floats, first);
  if constexpr (lower_first && parts == 3) {
    const char *const first_a = a, *const first_b = b;
    for (int64_t s = 0; s < steps; ++s, a += parts * kPartBytes, b += parts * kPartBytes) { FUSEWIRE_AMX_LOWER; }
    a = first_a, b = first_b;
  }
  for (int64_t s = 0; s < steps; ++s, a += parts * kPartBytes, b += parts * kPartBytes) {
    if constexpr (parts == 2 && whole) {
      FUSEWIRE_AMX_WHOLE;
    } else if constexpr (parts == 3 && lower_first) {
      FUSEWIRE_AMX_NEW(0, 0);
    } else {
      FUSEWIRE_AMX_STEP(parts);
    }
  }
  leave_sums(c, row_floats);
}

// The parts of 32 elements of a row as units: pairs of bfloat16 along the summed dimension. Which elements pair up is free as long as both
// operands agree: neighbours where bfloat16 is copied, i and i + 16 where floats are cut.
inline __m512i pair(__m512i low, __m512i high) { return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high); }

// The largest magnitude seen tells whether a row may be split: not where it holds infinities, NaN or floats that would round to an infinite
// bfloat16, nor where all of it is so small that its lower parts, or their products, would be flushed to zero. Such rows are left to AVX-512.
struct Range {
  __m512i bits = _mm512_setzero_si512();
  void add(__m512 x) { bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff))); }
  // `least`: the smallest exponent of a row's largest element. Two operands' exponents sum to more than -100 where they split.
  bool splits(int least) const {
    const uint32_t highest = _mm512_reduce_max_epu32(bits);
    return highest == 0 || (highest <= 0x7f7f0000 && static_cast<int>(highest >> 23) - 127 >= least);
  }
};
constexpr int kLeastExponent = -50;

template <int parts>
[[gnu::always_inline]] inline void split_pair(__m512 low, __m512 high, __m512i (&units)[parts]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 4
  for (int p = 0; p < parts; ++p) {  // the nearest bfloat16 is the upper half of these; `pair` does not look at the lower
    const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low), half), b = _mm512_add_epi32(_mm512_castps_si512(high), half);
    units[p] = pair(a, b);
    if (p + 1 == parts) break;
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));  // exact: what the rounding left
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
  }
}

// 32 contiguous elements.
template <int parts, typename T>
[[gnu::always_inline]] inline void units_of(const T* x, __m512i (&units)[parts], Range& range) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    static_assert(parts == 1);
    units[0] = _mm512_loadu_si512(x);
  } else {
    __m512 low, high;
    if constexpr (std::is_same_v<T, float>) {
      low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    } else {
      const __m256i* p = reinterpret_cast<const __m256i*>(x);
      low = _mm512_cvtph_ps(_mm256_loadu_si256(p)), high = _mm512_cvtph_ps(_mm256_loadu_si256(p + 1));
    }
    range.add(low), range.add(high);
    split_pair<parts>(low, high, units);
  }
}

// 32 elements of a row of any stride, `count` of which exist.
template <int parts, typename T>
[[gnu::always_inline]] inline void units_of(const T* x, int64_t stride, int64_t count, __m512i (&units)[parts], Range& range) {
  if (stride == 1 && count >= kStep) return units_of<parts>(x, units, range);
  alignas(64) T staged[kStep] = {};
  for (int64_t i = 0; i < (count < kStep ? count : kStep); ++i) staged[i] = x[i * stride];
  units_of<parts>(static_cast<const T*>(staged), units, range);
}

}  // namespace fusewire::FUSEWIRE_ISA
