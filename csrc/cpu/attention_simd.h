// Vectors of float at the ISA level that this translation unit is compiled for, and the two kinds of operand that the tiles multiply.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/exp2.h"
#include "common/scalar.h"
#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from GCC 12's own AVX-512 headers (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace fusewire::FUSEWIRE_ISA {

#if defined(__AVX512F__)

using vf = __m512;
constexpr int kLanes = 16;
constexpr int kTileVectors = 4;  // 6 x 4 accumulators, 4 operands: 28 of 32 registers, 10 loads for 24 multiplications
inline vf vset(float x) { return _mm512_set1_ps(x); }
inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where a is NaN
inline float vmax_of(vf a) { return _mm512_reduce_max_ps(a); }
inline vf vkeep(vf a, vf bias) {  // -inf where bias is -inf, even if a is NaN
  const vf low = vset(-INFINITY);
  return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(bias, low, _CMP_EQ_OQ), low);
}
template <int degree>
inline vf vexp2(vf x) {
  const vf f = _mm512_reduce_ps(x, 0x09);  // x - floor(x); 0 for -inf
  vf p = vset(Exp2<degree>::c[degree - 1]);
#pragma GCC unroll 8
  for (int i = degree - 2; i >= 0; --i) p = vfma(p, f, vset(Exp2<degree>::c[i]));
  return _mm512_scalef_ps(vfma(p, f, vset(1.0f)), x);
}
inline void load_f16(const float16* p, float* out) { vstore(out, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }
inline void store_f16(float16* p, const float* x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, vload(x), 0)); }

#elif defined(__AVX2__)

using vf = __m256;
constexpr int kLanes = 8;
constexpr int kTileVectors = 2;  // 6 x 2 accumulators, 2 operands, 1 broadcast: 15 of 16 registers
inline vf vset(float x) { return _mm256_set1_ps(x); }
inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline float vmax_of(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline vf vkeep(vf a, vf bias) {
  const vf low = vset(-INFINITY);
  return _mm256_blendv_ps(a, low, _mm256_cmp_ps(bias, low, _CMP_EQ_OQ));
}
template <int degree>
inline vf vexp2(vf x) {
  const vf clamped = _mm256_max_ps(vset(-127.0f), x);  // keeps NaN; 2^-127 and below become 0
  const vf n = _mm256_floor_ps(clamped), f = vsub(clamped, n);
  vf p = vset(Exp2<degree>::c[degree - 1]);
#pragma GCC unroll 8
  for (int i = degree - 2; i >= 0; --i) p = vfma(p, f, vset(Exp2<degree>::c[i]));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return vmul(vfma(p, f, vset(1.0f)), _mm256_castsi256_ps(power));
}
inline void load_f16(const float16* p, float* out) { vstore(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
inline void store_f16(float16* p, const float* x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(vload(x), 0)); }

#else  // any processor: the compiler's own vectors of 16 bytes

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
inline vf vset(float x) { return vf{x, x, x, x}; }
inline vf vload(const float* p) { vf a; std::memcpy(&a, p, sizeof a); return a; }
inline void vstore(float* p, vf a) { std::memcpy(p, &a, sizeof a); }
inline vf vadd(vf a, vf b) { return a + b; }
inline vf vsub(vf a, vf b) { return a - b; }
inline vf vmul(vf a, vf b) { return a * b; }
inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline float vmax_of(vf a) { return std::fmax(std::fmax(a[0], a[2]), std::fmax(a[1], a[3])); }
inline vf vkeep(vf a, vf bias) { return bias == vset(-INFINITY) ? vset(-INFINITY) : a; }
template <int degree>
inline vf vexp2(vf x) {
  const vf clamped = x < vset(-127.0f) ? vset(-127.0f) : x;  // keeps NaN
  vf n = __builtin_convertvector(__builtin_convertvector(clamped, vi), vf);  // towards 0; x is never above 0 by more than rounding
  n = n > clamped ? n - vset(1.0f) : n;
  const vf f = clamped - n;
  vf p = vset(Exp2<degree>::c[degree - 1]);
#pragma GCC unroll 8
  for (int i = degree - 2; i >= 0; --i) p = vfma(p, f, vset(Exp2<degree>::c[i]));
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  vf two_n;
  std::memcpy(&two_n, &power, sizeof two_n);
  return vfma(p, f, vset(1.0f)) * two_n;
}
inline void load_f16(const float16* p, float* out) { for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]); }
inline void store_f16(float16* p, const float* x) { for (int i = 0; i < kLanes; ++i) p[i] = from_float<float16>(x[i]); }

#endif

// The sum of the lanes without rounding: an error here would be an error of a whole row.
inline double sum_of(vf a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))));
#else
  alignas(64) float lanes[kLanes];
  vstore(lanes, a);
  double sum[kLanes];
  for (int i = 0; i < kLanes; ++i) sum[i] = static_cast<double>(lanes[i]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
#endif
}

// An operand of a tile is made of 32-bit units along the summed dimension: one float, or a pair of bf16.
struct FloatUnits {
  using vector = vf;
  static constexpr int pack = 1;        // elements in a unit
  static constexpr int exp_degree = 6;
  static vector splat(const uint32_t* p) { float x; std::memcpy(&x, p, 4); return vset(x); }
  static vector load(const uint32_t* p) { return vload(reinterpret_cast<const float*>(p)); }
  static vf mac(vf acc, vector a, vector b) { return vfma(a, b, acc); }
};

#if defined(__AVX512BF16__)
struct Bf16Units {
  using vector = __m512bh;
  static constexpr int pack = 2;
  static constexpr int exp_degree = 3;
  static vector splat(const uint32_t* p) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p)); }
  static vector load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vf mac(vf acc, vector a, vector b) { return _mm512_dpbf16_ps(acc, a, b); }
};
#endif

}  // namespace fusewire::FUSEWIRE_ISA
