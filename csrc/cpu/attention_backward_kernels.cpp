// Gradients of attention in float32 arithmetic, compiled once per ISA level.
#include "cpu/attention_backward_task.h"
#include "cpu/attention_tiles.h"
#include "common/transpose16.h"

namespace fusewire::FUSEWIRE_ISA {

// A packed square is [k][32] floats, for either operand.
class FloatSquares {
 public:
  static constexpr int64_t kSide = 32, kBytes = kSide * kSide * sizeof(float);

  void cols(const float* x, int64_t stride, char* to) {
    for (int64_t k = 0; k < kSide; ++k) std::memcpy(to + k * kSide * sizeof(float), x + k * stride, kSide * sizeof(float));
  }
  void cols_right(const float* x, int64_t stride, char* to) { cols(x, stride, to); }
  void rows(const float* x, int64_t stride, char* to) {
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
  void rows_right(const float* x, int64_t stride, char* to) { rows(x, stride, to); }
  bool splits() const { return true; }
  static vf exp2(vf x) { return vexp2<FloatUnits::exp_degree>(x); }

  // What starts a square, the logits, is summed as on the way forward, where they were normalised: then what rounds a query's largest logit rounds
  // its total too. What is added to a square is summed a step at a time: rounding errors grow with the length of a chain of sums.
  static void multiply(const char* a, const char* b, int64_t steps, float* c, bool first) {
    const float *left = reinterpret_cast<const float*>(a), *right = reinterpret_cast<const float*>(b);
    const int64_t length = steps * kSide, chain = first ? kChain : kSide;
    for (int64_t k = 0; k < length; k += chain) {
      multiply_chain(left + k * kSide, right + k * kSide, std::min(chain, length - k), c, first && k == 0);
    }
  }

 private:
  static void multiply_chain(const float* a, const float* b, int64_t length, float* c, bool first) {
    constexpr int64_t rows = kLanes == 16 ? 8 : 4, vectors = 2;  // accumulators that fit into the registers
    for (int64_t r = 0; r < kSide; r += rows) {
      for (int64_t n = 0; n < kSide; n += vectors * kLanes) {
        vf sum[rows][vectors];
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t v = 0; v < vectors; ++v) sum[i][v] = vset(0);
        for (int64_t k = 0; k < length; ++k) {
          vf columns[vectors];
          for (int64_t v = 0; v < vectors; ++v) columns[v] = vload(b + k * kSide + n + v * kLanes);
          for (int64_t i = 0; i < rows; ++i) {
            const vf x = vset(a[k * kSide + r + i]);
            for (int64_t v = 0; v < vectors; ++v) sum[i][v] = vfma(x, columns[v], sum[i][v]);
          }
        }
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t v = 0; v < vectors; ++v) {
            float* to = c + (r + i) * kSide + n + v * kLanes;
            vstore(to, first ? sum[i][v] : vadd(vload(to), sum[i][v]));
          }
        }
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
