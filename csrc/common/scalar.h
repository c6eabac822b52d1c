// Storage types and their conversions to float. Written so that loops over them vectorise, and so that every rounding is to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

namespace fusewire {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(float16 x) {
#if defined(__F16C__) || defined(__AVX512F__) || defined(__FLT16_MANT_DIG__)
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
#else
#error "a compiler with _Float16 is needed"
#endif
}

template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // NaN stays NaN (0x7fc0, as c10::BFloat16 gives); everything else rounds to nearest even, denormals included.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}
template <>
inline float16 from_float<float16>(float x) {
  _Float16 y = static_cast<_Float16>(x);
  float16 z;
  std::memcpy(&z, &y, 2);
  return z;
}
template <typename T>
inline T from_float(double x) { return static_cast<T>(x); }

// from_float and back, staying in 32 bits: what storing x as a T makes of it.
template <typename T>
inline float round_to(float x) { return to_float(from_float<T>(x)); }
template <>
inline float round_to<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000u : rounded;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <typename T>
inline double round_to(double x) { return x; }

// The type a row is computed in: double for double, float for all else.
template <typename T>
struct compute { using type = float; };
template <>
struct compute<double> { using type = double; };
template <typename T>
using compute_t = typename compute<T>::type;

}  // namespace fusewire
