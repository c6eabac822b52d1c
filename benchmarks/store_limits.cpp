// What the memory-bound ops could take at best: the same bytes read and written, with next to nothing computed. A function for benchmarks/store_limits.py.
#include <immintrin.h>

#include <cstdint>

// c = a + b, and d = a - b where there is a second output; without b, c = a + a. Bytes [begin, end), multiples of 64; kStream: written past the caches.
template <bool kStream>
static void move(const char* a, const char* b, char* c, char* d, int64_t begin, int64_t end) {
  const auto put = [](char* p, __m512i x) {
    if constexpr (kStream) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x);
    else _mm512_storeu_si512(p, x);
  };
  for (int64_t i = begin; i < end; i += 64) {
    const __m512i x = _mm512_loadu_si512(a + i), y = b ? _mm512_loadu_si512(b + i) : x;
    put(c + i, _mm512_add_epi32(x, y));
    if (d) put(d + i, _mm512_sub_epi32(x, y));
  }
  if constexpr (kStream) _mm_sfence();
}

extern "C" void store_limits(const char* a, const char* b, char* c, char* d, int64_t bytes, int64_t threads, int64_t streams) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t lines = bytes / 64, begin = lines * t / threads * 64, end = lines * (t + 1) / threads * 64;
    (streams ? move<true> : move<false>)(a, b, c, d, begin, end);
  }
}
