// 16 x 16 transpose of 32-bit lanes in AVX-512 registers.
#pragma once
#if defined(__AVX512F__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from GCC 12's own AVX-512 headers (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace fusewire::FUSEWIRE_ISA {

// In each 128-bit lane of four registers: r[i][j] <-> r[j][i]
inline void transpose4(__m512 r[4]) {
  const auto low = [](__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  const auto high = [](__m512 a, __m512 b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
  const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
  r[0] = low(a, c), r[1] = high(a, c), r[2] = low(b, d), r[3] = high(b, d);
}

// 128-bit lanes of four registers: lane j of r[i] <-> lane i of r[j]
inline void transpose4_lanes(__m512 r[4]) {
  const __m512 a = _mm512_shuffle_f32x4(r[0], r[1], 0x88), b = _mm512_shuffle_f32x4(r[0], r[1], 0xdd);
  const __m512 c = _mm512_shuffle_f32x4(r[2], r[3], 0x88), d = _mm512_shuffle_f32x4(r[2], r[3], 0xdd);
  r[0] = _mm512_shuffle_f32x4(a, c, 0x88), r[2] = _mm512_shuffle_f32x4(a, c, 0xdd);
  r[1] = _mm512_shuffle_f32x4(b, d, 0x88), r[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

// r[i][j] <-> r[j][i]
inline void transpose16(__m512 r[16]) {
  for (int i = 0; i < 16; i += 4) transpose4(r + i);
  for (int i = 0; i < 4; ++i) {
    __m512 t[4] = {r[i], r[4 + i], r[8 + i], r[12 + i]};
    transpose4_lanes(t);
    for (int j = 0; j < 4; ++j) r[4 * j + i] = t[j];
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
#endif
