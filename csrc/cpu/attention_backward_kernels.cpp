// Gradients of attention in float32 arithmetic, and of bfloat16 by its own products where the processor has them; compiled once per ISA level.
#include "cpu/attention_backward_task.h"
#include "cpu/attention_tiles.h"

namespace fusewire::FUSEWIRE_ISA {

// Packed squares are floats [32][32]. An element of a left operand is read alone, so that its rows may run either way; a right one is read as vectors.
class FloatSquares {
 public:
  static constexpr int64_t kSide = 32, kBytes = kSide * kSide * sizeof(float);
  static constexpr bool kPlain = true;

  void rows(const float* x, int64_t stride, char* to) {
    for (int64_t r = 0; r < kSide; ++r) std::memcpy(to + r * kSide * sizeof(float), x + r * stride, kSide * sizeof(float));
  }
  void cols(const float* x, int64_t stride, char* to) { rows(x, stride, to); }
  void cols_right(const float* x, int64_t stride, char* to) { rows(x, stride, to); }
  void rows_right(const float* x, int64_t stride, char* to) { transpose_square(x, stride, reinterpret_cast<float*>(to), kSide); }
  bool splits() const { return true; }
  static vf exp2(vf x) { return vexp2<FloatUnits::exp_degree>(x); }

  // What starts a square, the logits, is summed as on the way forward, where they were normalised: then what rounds a query's largest logit rounds
  // its total too. What is added to a square is summed a step at a time: rounding errors grow with the length of a chain of sums.
  template <bool Cols>
  static void multiply(const Operand& a, const Operand& b, const Extent& extent, float* c, bool first) {
    const int64_t chain = first ? kChain : kSide;
    for (int64_t k = 0; k < extent.depth; k += chain) {
      const Operand left{a.data + k / kSide * a.step, a.step}, right{b.data + k / kSide * b.step, b.step};
      const int64_t length = std::min(chain, extent.depth - k);
      for (int64_t r = 0; r < extent.rows; r += kRowsAtOnce) {
        for (int64_t n = 0; n < extent.columns; n += 2 * kLanes) {
          if (extent.columns - n > kLanes) {
            multiply_chain<2, Cols>(left, right, r, n, length, c, first && k == 0);
          } else {
            multiply_chain<1, Cols>(left, right, r, n, length, c, first && k == 0);
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kRowsAtOnce = kLanes == 16 ? 8 : 4;  // times two vectors: accumulators that fit into the registers

  template <int64_t vectors, bool Cols>
  static void multiply_chain(const Operand& a, const Operand& b, int64_t row, int64_t column, int64_t length, float* c, bool first) {
    constexpr int64_t next_row = Cols ? 1 : kSide, next = Cols ? kSide : 1;
    vf sum[kRowsAtOnce][vectors];
    for (int64_t i = 0; i < kRowsAtOnce; ++i)
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] = vset(0);
    for (int64_t done = 0; done < length; done += kSide) {
      const float* left = reinterpret_cast<const float*>(a.data + done / kSide * a.step) + row * next_row;
      const float* right = reinterpret_cast<const float*>(b.data + done / kSide * b.step) + column;
      const int64_t count = std::min(kSide, length - done);
      for (int64_t k = 0; k < count; ++k, left += next, right += kSide) {
        vf columns[vectors];
        for (int64_t v = 0; v < vectors; ++v) columns[v] = vload(right + v * kLanes);
        for (int64_t i = 0; i < kRowsAtOnce; ++i) {
          const vf x = vset(left[i * next_row]);
          for (int64_t v = 0; v < vectors; ++v) sum[i][v] = vfma(x, columns[v], sum[i][v]);
        }
      }
    }
    for (int64_t i = 0; i < kRowsAtOnce; ++i) {
      for (int64_t v = 0; v < vectors; ++v) {
        float* to = c + (row + i) * kSide + column + v * kLanes;
        vstore(to, first ? sum[i][v] : vadd(vload(to), sum[i][v]));
      }
    }
  }
};

#if defined(__AVX512BF16__)
// Packed squares are pairs of neighbours along the summed dimension, as 16 units: a left operand is [row][unit], or by cols [unit][row]; a right one
// [unit][column].
class Bf16Squares {
 public:
  static constexpr int64_t kSide = 32, kUnits = kSide / 2, kBytes = kSide * kUnits * sizeof(uint32_t);
  static constexpr bool kPlain = false;

  void rows(const float* x, int64_t stride, char* to) {
    for (int64_t r = 0; r < kSide; ++r) _mm512_storeu_si512(to + r * 64, neighbours(x + r * stride));
  }
  void rows_right(const float* x, int64_t stride, char* to) {
    for (int64_t half = 0; half < 2; ++half) {
      __m512 square[16];
      for (int64_t r = 0; r < 16; ++r) square[r] = _mm512_castsi512_ps(neighbours(x + (half * 16 + r) * stride));
      transpose16(square);
      for (int64_t u = 0; u < kUnits; ++u) _mm512_storeu_ps(to + u * 128 + half * 64, square[u]);
    }
  }
  void cols_right(const float* x, int64_t stride, char* to) {
    // Two rows beside each other, as they come out of the conversion, become pairs.
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t u = 0; u < kUnits; ++u) {
      for (int64_t half = 0; half < 2; ++half) {
        const float *even = x + 2 * u * stride + half * 16, *odd = even + stride;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd), _mm512_loadu_ps(even));
        _mm512_storeu_si512(to + u * 128 + half * 64, _mm512_permutexvar_epi16(turns, both));
      }
    }
  }
  void cols(const float* x, int64_t stride, char* to) { cols_right(x, stride, to); }
  bool splits() const { return true; }
  static vf exp2(vf x) { return vexp2<Bf16Units::exp_degree>(x); }

  template <bool Cols>
  static void multiply(const Operand& a, const Operand& b, const Extent& extent, float* c, bool first) {
    for (int64_t r = 0; r < extent.rows; r += kRowsAtOnce) {
      if (extent.columns > kLanes) {
        tile<2, Cols>(a, b, r, extent.depth, c, first);
      } else {
        tile<1, Cols>(a, b, r, extent.depth, c, first);
      }
    }
  }

 private:
  static constexpr int64_t kRowsAtOnce = 8;  // times two vectors: enough sums at once to hide how long each takes

  static __m512i neighbours(const float* x) { return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x)); }

  template <int64_t vectors, bool Cols>
  static void tile(const Operand& a, const Operand& b, int64_t row, int64_t depth, float* c, bool first) {
    constexpr int64_t next_row = Cols ? 1 : kUnits, next = Cols ? kSide : 1;
    vf sum[kRowsAtOnce][vectors];
    for (int64_t i = 0; i < kRowsAtOnce; ++i)
      for (int64_t v = 0; v < vectors; ++v) sum[i][v] = vset(0);
    for (int64_t square = 0; square * kSide < depth; ++square) {
      const uint32_t* left = reinterpret_cast<const uint32_t*>(a.data + square * a.step) + row * next_row;
      const uint32_t* right = reinterpret_cast<const uint32_t*>(b.data + square * b.step);
      const int64_t count = std::min(kUnits, (depth - square * kSide + 1) / 2);
      for (int64_t u = 0; u < count; ++u, left += next, right += kSide) {
        Bf16Units::vector columns[vectors];
        for (int64_t v = 0; v < vectors; ++v) columns[v] = Bf16Units::load(right + v * kLanes);
        for (int64_t i = 0; i < kRowsAtOnce; ++i) {
          const Bf16Units::vector x = Bf16Units::splat(left + i * next_row);
          for (int64_t v = 0; v < vectors; ++v) sum[i][v] = Bf16Units::mac(sum[i][v], x, columns[v]);
        }
      }
    }
    for (int64_t i = 0; i < kRowsAtOnce; ++i) {
      for (int64_t v = 0; v < vectors; ++v) {
        float* to = c + (row + i) * kSide + v * kLanes;
        vstore(to, first ? sum[i][v] : vadd(vload(to), sum[i][v]));
      }
    }
  }
};
using SquaresOfBf16 = Bf16Squares;
#else
using SquaresOfBf16 = FloatSquares;
#endif

void attention_backward_task(const AttentionBackwardCall& call, const AttentionBackwardTask& task) {
  switch (call.type) {
    case AttentionType::f32: AttentionBackward<float, FloatSquares>(call, task).run(); break;
    case AttentionType::f16: AttentionBackward<float16, FloatSquares>(call, task).run(); break;
    default: AttentionBackward<bfloat16, SquaresOfBf16>(call, task).run(); break;
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
