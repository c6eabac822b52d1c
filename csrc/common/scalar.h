// Storage types and their conversions to float. Written so that loops over them vectorise, and so that every rounding is to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

// These functions are compiled at every ISA level under one name, so they must never be emitted on their own: the linker would keep
// one copy, perhaps one that this processor cannot run.
#define FUSEWIRE_INLINE inline __attribute__((always_inline))

namespace fusewire {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

FUSEWIRE_INLINE float to_float(float x) { return x; }
FUSEWIRE_INLINE double to_float(double x) { return x; }
FUSEWIRE_INLINE float to_float(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
FUSEWIRE_INLINE float to_float(float16 x) {
#if defined(__F16C__) || defined(__AVX512F__) || defined(__FLT16_MANT_DIG__)
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
#else
#error "a compiler with _Float16 is needed"
#endif
}

template <typename T>
FUSEWIRE_INLINE T from_float(float x);
template <>
FUSEWIRE_INLINE float from_float<float>(float x) { return x; }
template <>
FUSEWIRE_INLINE bfloat16 from_float<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // NaN stays NaN (0x7fc0, as c10::BFloat16 gives); everything else rounds to nearest even, denormals included.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}
template <>
FUSEWIRE_INLINE float16 from_float<float16>(float x) {
  _Float16 y = static_cast<_Float16>(x);
  float16 z;
  std::memcpy(&z, &y, 2);
  return z;
}
template <typename T>
FUSEWIRE_INLINE T from_float(double x) { return static_cast<T>(x); }

// The type a row is computed in: double for double, float for all else.
template <typename T>
struct compute { using type = float; };
template <>
struct compute<double> { using type = double; };
template <typename T>
using compute_t = typename compute<T>::type;

}  // namespace fusewire
