// Gradients of attention on AMX tiles.
#include "cpu/amx.h"
#include "cpu/attention_backward_task.h"

namespace fusewire::FUSEWIRE_ISA {

// A packed square is [part][2 tiles of 16 rows (left) or columns (right)], as multiply_block reads it. Elements k and k + 16 make a unit.
template <int parts>
class TileSquares {
  static_assert(kSide == 32 && kStep == 32);

 public:
  static constexpr int64_t kBytes = parts * kPartBytes;
  static constexpr bool kPlain = false;

  void rows(const float* x, int64_t stride, char* to) {
    for (int64_t r = 0; r < kSide; ++r) {
      __m512i units[parts];
      split(x + r * stride, x + r * stride + 16, units);
      for (int p = 0; p < parts; ++p) _mm512_store_si512(to + p * kPartBytes + r * 64, units[p]);
    }
  }
  void rows_right(const float* x, int64_t stride, char* to) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      __m512 squares[parts][16];
      for (int64_t r = 0; r < 16; ++r) {
        const float* row = x + (tile * 16 + r) * stride;
        __m512i units[parts];
        split(row, row + 16, units);
        for (int p = 0; p < parts; ++p) squares[p][r] = _mm512_castsi512_ps(units[p]);
      }
      store_transposed(squares, to + tile * kTileBytes);
    }
  }
  void cols_right(const float* x, int64_t stride, char* to) {
    for (int64_t k = 0; k < 16; ++k) {
      for (int64_t tile = 0; tile < 2; ++tile) {
        __m512i units[parts];
        split(x + k * stride + tile * 16, x + (k + 16) * stride + tile * 16, units);
        for (int p = 0; p < parts; ++p) _mm512_store_si512(to + p * kPartBytes + tile * kTileBytes + k * 64, units[p]);
      }
    }
  }
  void cols(const float* x, int64_t stride, char* to) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      __m512 squares[parts][16];
      for (int64_t k = 0; k < 16; ++k) {
        __m512i units[parts];
        split(x + k * stride + tile * 16, x + (k + 16) * stride + tile * 16, units);
        for (int p = 0; p < parts; ++p) squares[p][k] = _mm512_castsi512_ps(units[p]);
      }
      store_transposed(squares, to + tile * kTileBytes);
    }
  }

  bool splits() const { return parts == 1 || range_.splits(kLeastExponent); }
  static vf exp2(vf x) { return vexp2<parts == 1 ? 3 : 6>(x); }

  template <bool>
  static void multiply(const Operand& left, const Operand& right, const Extent& extent, float* c, bool first) {
    const char *a = left.data, *b = right.data;  // whose squares follow each other
    const int64_t steps = (extent.depth + kStep - 1) / kStep;
    if (parts == 3 && !first) {  // a short chain of sums, added to the long one
      alignas(64) float fresh[kSide * kSide];
      multiply_block<parts>(a, b, steps, fresh, kSide, true);
#pragma omp simd
      for (int64_t i = 0; i < kSide * kSide; ++i) c[i] += fresh[i];
    } else if (first) {
      multiply_block<parts, true, true>(a, b, steps, c, kSide, true);  // logits, which an exponential will magnify, and what is subtracted
    } else {
      multiply_block<parts>(a, b, steps, c, kSide, false);
    }
  }

 private:
  void split(const float* low, const float* high, __m512i (&units)[parts]) {
    const __m512 a = _mm512_loadu_ps(low), b = _mm512_loadu_ps(high);
    if constexpr (parts > 1) range_.add(a), range_.add(b);
    split_pair<parts>(a, b, units);
  }
  static void store_transposed(__m512 (&squares)[parts][16], char* to) {
    for (int p = 0; p < parts; ++p) {
      transpose16(squares[p]);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(to + p * kPartBytes + i * 64, squares[p][i]);
    }
  }

  Range range_;
};

template <typename T>
static bool run(const AttentionBackwardCall& call, const AttentionBackwardTask& task) {
  const TileScope tiles;
  return AttentionBackward<T, TileSquares<parts_of<T>>>(call, task).run();
}

bool attention_backward_task(const AttentionBackwardCall& call, const AttentionBackwardTask& task) {
  switch (call.type) {
    case AttentionType::f32: return run<float>(call, task);
    case AttentionType::f16: return run<float16>(call, task);
    default: return run<bfloat16>(call, task);
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
