// Vectors of 32-bit units for the matrix product: a unit is one float, or (AVX512-BF16) a pair of bfloat16 neighbours along the inner dimension.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/transpose16.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from GCC 12's own AVX-512 headers (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace fusewire::FUSEWIRE_ISA {

#if defined(__AVX512F__)

using Units = __m512;
constexpr int kUnitLanes = 16;
constexpr int kTileRows = 14;  // 14 x 2 accumulators, 2 operands, 1 broadcast: 31 of 32 registers
inline Units zero() { return _mm512_setzero_ps(); }
inline Units load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Units a) { _mm512_storeu_ps(p, a); }
inline Units broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline Units add(Units a, Units b) { return _mm512_add_ps(a, b); }
inline Units multiply_add(Units a, Units b, Units sum) { return _mm512_fmadd_ps(a, b, sum); }
#if defined(__AVX512BF16__)
inline Units multiply_add_pairs(Units a, Units b, Units sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
#endif
inline void transpose(Units r[16]) { transpose16(r); }

#elif defined(__AVX2__)

using Units = __m256;
constexpr int kUnitLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 operands, 1 broadcast: 15 of 16 registers
inline Units zero() { return _mm256_setzero_ps(); }
inline Units load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Units a) { _mm256_storeu_ps(p, a); }
inline Units broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline Units add(Units a, Units b) { return _mm256_add_ps(a, b); }
inline Units multiply_add(Units a, Units b, Units sum) { return _mm256_fmadd_ps(a, b, sum); }
inline void transpose(Units r[8]) {
  Units t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const Units a = r[i], b = r[4 + i];
    r[i] = _mm256_permute2f128_ps(a, b, 0x20);
    r[4 + i] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}

#else  // any processor: the compiler's own vectors of 16 bytes

typedef float Units __attribute__((vector_size(16)));
constexpr int kUnitLanes = 4;
constexpr int kTileRows = 6;
inline Units zero() { return Units{0, 0, 0, 0}; }
inline Units load(const float* p) { Units a; std::memcpy(&a, p, sizeof a); return a; }
inline void store(float* p, Units a) { std::memcpy(p, &a, sizeof a); }
inline Units broadcast(const float* p) { return Units{*p, *p, *p, *p}; }
inline Units add(Units a, Units b) { return a + b; }
inline Units multiply_add(Units a, Units b, Units sum) { return sum + a * b; }
inline void transpose(Units r[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
}

#endif

}  // namespace fusewire::FUSEWIRE_ISA
