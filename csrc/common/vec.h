// Short vectors of floats or doubles, and how rows of every storage type are loaded into and rounded out of them.
// For *_kernels.cpp: everything lives in the namespace of the ISA level it is compiled for.
//
// They are GCC's and Clang's vector types: any lane count works at any level (the compiler splits what is wider than a register), which
// is what lets one processor repeat the summation order of another. Intrinsics appear only where the types have no word for it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/isa.h"
#include "common/scalar.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"        // GCC 12's own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // the same
#pragma GCC diagnostic ignored "-Wpsabi"                // no vector type crosses a call that is not inlined
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fusewire::FUSEWIRE_ISA {

#if defined(__AVX512F__)
inline constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kRegisterBytes = 32;
#else
inline constexpr int kRegisterBytes = 16;
#endif

template <typename C, int N>
struct lanes_of { typedef C type __attribute__((vector_size(N * sizeof(C)))); };
template <typename C, int N>
using lanes = typename lanes_of<C, N>::type;
// The lane count that fills a register.
template <typename C>
inline constexpr int kLanes = kRegisterBytes / sizeof(C);

template <typename To, typename From>
FUSEWIRE_INLINE To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

template <int N, typename C>
FUSEWIRE_INLINE lanes<C, N> splat(C x) { return x - lanes<C, N>{}; }  // x - 0 keeps the sign of zero

// a * b + c with one rounding.
template <int N, typename C>
FUSEWIRE_INLINE lanes<C, N> fma(lanes<C, N> a, lanes<C, N> b, lanes<C, N> c) {
  constexpr int bytes = N * sizeof(C);
  [[maybe_unused]] constexpr bool single = sizeof(C) == 4;
  if constexpr (bytes > kRegisterBytes && kRegisterBytes == 32) {
    using Half = lanes<C, N / 2>;
    struct Pair { Half low, high; };
    const auto x = bits_as<Pair>(a), y = bits_as<Pair>(b), z = bits_as<Pair>(c);
    return bits_as<lanes<C, N>>(Pair{fma<N / 2, C>(x.low, y.low, z.low), fma<N / 2, C>(x.high, y.high, z.high)});
  }
#if defined(__AVX512F__)
  if constexpr (bytes == 64 && single) return bits_as<lanes<C, N>>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
  if constexpr (bytes == 64 && !single) return bits_as<lanes<C, N>>(_mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
#endif
#if defined(__FMA__)
  if constexpr (bytes == 32 && single) return bits_as<lanes<C, N>>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
  if constexpr (bytes == 32 && !single) return bits_as<lanes<C, N>>(_mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(c)));
  if constexpr (bytes == 16 && single) return bits_as<lanes<C, N>>(_mm_fmadd_ps(bits_as<__m128>(a), bits_as<__m128>(b), bits_as<__m128>(c)));
#endif
  lanes<C, N> y;
  for (int i = 0; i < N; ++i) y[i] = std::fma(a[i], b[i], c[i]);
  return y;
}

#if defined(__AVX512BW__)
// Word i goes to word 2 i + 1, the upper half of lane i: the even words are masked.
FUSEWIRE_INLINE __m512i odd_words() {
  return _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
}
// The upper halves of 16 lanes, side by side in the lower half of the register.
FUSEWIRE_INLINE __m256i upper_halves(__m512i x) {
  const __m512i from = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(from, x));
}
#endif

// N elements of storage type T, as compute_t<T>.
template <int N, typename T>
FUSEWIRE_INLINE lanes<compute_t<T>, N> load(const T* p) {
  if constexpr (sizeof(T) >= 4) {
    lanes<T, N> x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  } else {
    lanes<uint16_t, N> raw;
    std::memcpy(&raw, p, sizeof(raw));
#if defined(__AVX512BW__)
    if constexpr (std::is_same_v<T, bfloat16> && N == 16) {  // one shuffle, where widening and shifting would be two steps
      return bits_as<lanes<float, N>>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, odd_words(), _mm512_castsi256_si512(bits_as<__m256i>(raw))));
    }
#endif
    if constexpr (std::is_same_v<T, bfloat16>) return bits_as<lanes<float, N>>(__builtin_convertvector(raw, lanes<uint32_t, N>) << 16);
#if defined(__AVX512F__)
    if constexpr (N == 16) return bits_as<lanes<float, N>>(_mm512_cvtph_ps(bits_as<__m256i>(raw)));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return bits_as<lanes<float, N>>(_mm256_cvtph_ps(bits_as<__m128i>(raw)));
#endif
    lanes<float, N> x;
    for (int i = 0; i < N; ++i) x[i] = to_float(p[i]);
    return x;
  }
}

// The upper halves of the lanes hold bfloat16 after this: rounded to nearest even, denormals kept (vcvtneps2bf16 would take them for
// zero). A NaN that came from bfloat16 or from arithmetic stays one: only payloads that fill the lower half as well would carry over.
template <int N>
FUSEWIRE_INLINE lanes<uint32_t, N> round_to_upper_half(lanes<float, N> x) {
  const auto bits = bits_as<lanes<uint32_t, N>>(x);
#if defined(__AVX512BW__)
  if constexpr (N == 16) {  // up by half a unit, and down again to even where that was a tie
    const __m512i up = _mm512_add_epi32(bits_as<__m512i>(bits), _mm512_set1_epi32(0x8000));
    const __mmask16 tie = _mm512_testn_epi32_mask(up, _mm512_set1_epi32(0xffff));
    return bits_as<lanes<uint32_t, N>>(_mm512_mask_and_epi32(up, tie, up, _mm512_set1_epi32(static_cast<int>(0xfffeffffu))));
  }
#endif
  return bits + 0x7fff + ((bits >> 16) & 1);
}

template <int N, typename T>
FUSEWIRE_INLINE void store(T* p, lanes<compute_t<T>, N> x) {
  if constexpr (sizeof(T) >= 4) {
    std::memcpy(p, &x, sizeof(x));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512BW__)
    if constexpr (N == 16) {
      const __m256i raw = upper_halves(bits_as<__m512i>(round_to_upper_half<N>(x)));
      std::memcpy(p, &raw, sizeof(raw));
      return;
    }
#endif
    const auto raw = __builtin_convertvector(round_to_upper_half<N>(x) >> 16, lanes<uint16_t, N>);
    std::memcpy(p, &raw, sizeof(raw));
  } else {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
      const __m256i raw = _mm512_cvtps_ph(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      std::memcpy(p, &raw, sizeof(raw));
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (N == 8) {
      const __m128i raw = _mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      std::memcpy(p, &raw, sizeof(raw));
      return;
    }
#endif
    for (int i = 0; i < N; ++i) p[i] = from_float<T>(x[i]);
  }
}

// As `store`, past the caches; p lies at a multiple of what is stored. An ordinary store where the processor has no such instruction.
template <int N, typename T>
FUSEWIRE_INLINE void stream(T* p, lanes<compute_t<T>, N> x) {
#if defined(__SSE2__)
  T part[N];
  store<N>(part, x);
#if defined(__AVX512F__)
  if constexpr (sizeof(part) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_as<__m512i>(part));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(part) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_as<__m256i>(part));
#endif
  if constexpr (sizeof(part) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_as<__m128i>(part));
#endif
  store<N>(p, x);
}

// 2 N neighbouring elements at a multiple of what they take: of 16-bit types two vectors fill a register, which one shuffle packs.
template <bool kStreams, int N, typename T>
FUSEWIRE_INLINE void put_pair(T* p, lanes<compute_t<T>, N> a, lanes<compute_t<T>, N> b) {
#if defined(__AVX512BW__)
  if constexpr (N == 16 && sizeof(T) == 2) {
    __m512i both;
    if constexpr (std::is_same_v<T, bfloat16>) {
      const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,  //
                                           31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
      both = _mm512_permutex2var_epi16(bits_as<__m512i>(round_to_upper_half<N>(a)), odd, bits_as<__m512i>(round_to_upper_half<N>(b)));
    } else {
      constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(bits_as<__m512>(a), nearest)), _mm512_cvtps_ph(bits_as<__m512>(b), nearest), 1);
    }
    if constexpr (kStreams) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    return _mm512_storeu_si512(p, both);
  }
#endif
  if constexpr (kStreams) stream<N>(p, a), stream<N>(p + N, b);
  else store<N>(p, a), store<N>(p + N, b);
}

// What was streamed is seen by whoever sees what this thread stores next.
FUSEWIRE_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// What x becomes by being stored as T and loaded again.
template <typename T, int N>
FUSEWIRE_INLINE lanes<compute_t<T>, N> rounded(lanes<compute_t<T>, N> x) {
  if constexpr (sizeof(T) >= 4) {
    return x;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return bits_as<lanes<float, N>>(round_to_upper_half<N>(x) & 0xffff0000u);
  } else {
    T through[N];
    store<N>(through, x);
    return load<N>(through);
  }
}

// The first n < N elements; the other lanes are 0.
template <int N, typename T>
FUSEWIRE_INLINE lanes<compute_t<T>, N> load_part(const T* p, int64_t n) {
  T part[N] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load<N>(part);
}
template <int N, typename T>
FUSEWIRE_INLINE void store_part(T* p, lanes<compute_t<T>, N> x, int64_t n) {
  T part[N];
  store<N>(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

// A column of a row: `load(p)` and `store(p, x)` at element j, whole vectors or the n left over.
template <int N>
struct Whole {
  int64_t j;
  template <typename T>
  FUSEWIRE_INLINE auto load(const T* p) const { return FUSEWIRE_ISA::load<N>(p + j); }
  template <typename T>
  FUSEWIRE_INLINE void store(T* p, lanes<compute_t<T>, N> x) const { FUSEWIRE_ISA::store<N>(p + j, x); }
  template <typename T>
  FUSEWIRE_INLINE void stream(T* p, lanes<compute_t<T>, N> x) const { FUSEWIRE_ISA::stream<N>(p + j, x); }
};
template <int N>
struct Part {
  int64_t j, n;
  template <typename T>
  FUSEWIRE_INLINE auto load(const T* p) const { return load_part<N>(p + j, n); }
  template <typename T>
  FUSEWIRE_INLINE void store(T* p, lanes<compute_t<T>, N> x) const { store_part<N>(p + j, x, n); }
  template <typename T>
  FUSEWIRE_INLINE void stream(T* p, lanes<compute_t<T>, N> x) const { store(p, x); }
};

// Calls body(column) for the columns [begin, channels) of a row.
template <int N, typename Body>
FUSEWIRE_INLINE void for_columns(int64_t begin, int64_t channels, const Body& body) {
  int64_t j = begin;
  for (; j + N <= channels; j += N) body(Whole<N>{j});
  if (j < channels) body(Part<N>{j, channels - j});
}

}  // namespace fusewire::FUSEWIRE_ISA
