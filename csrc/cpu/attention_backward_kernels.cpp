// Gradients of attention in float32 arithmetic, compiled once per ISA level.
#include "cpu/attention_backward_task.h"
#include "cpu/attention_tiles.h"
#include "common/transpose16.h"

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
  void rows_right(const float* x, int64_t stride, char* to) {
    float* out = reinterpret_cast<float*>(to);
#if defined(__AVX512F__)
    for (int64_t r = 0; r < kSide; r += 16) {
      for (int64_t k = 0; k < kSide; k += 16) {
        __m512 square[16];
        for (int64_t i = 0; i < 16; ++i) square[i] = _mm512_loadu_ps(x + (r + i) * stride + k);
        transpose16(square);
        for (int64_t i = 0; i < 16; ++i) _mm512_storeu_ps(out + (k + i) * kSide + r, square[i]);
      }
    }
#else
    for (int64_t r = 0; r < kSide; ++r) {
      for (int64_t k = 0; k < kSide; ++k) out[k * kSide + r] = x[r * stride + k];
    }
#endif
  }
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

void attention_backward_task(const AttentionBackwardCall& call, const AttentionBackwardTask& task) {
  switch (call.type) {
    case AttentionType::f32: AttentionBackward<float, FloatSquares>(call, task).run(); break;
    case AttentionType::f16: AttentionBackward<float16, FloatSquares>(call, task).run(); break;
    default: AttentionBackward<bfloat16, FloatSquares>(call, task).run(); break;
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
