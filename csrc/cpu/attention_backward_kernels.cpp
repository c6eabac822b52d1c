// Gradients of attention in float32 arithmetic, compiled once per ISA level.
#include "cpu/attention_backward_task.h"
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

  // A step is summed on its own before it is added: rounding errors grow with the length of a chain of sums.
  static void multiply(const char* a, const char* b, int64_t steps, float* c, bool first) {
    for (int64_t s = 0; s < steps; ++s) {
      multiply_step(reinterpret_cast<const float*>(a + s * kBytes), reinterpret_cast<const float*>(b + s * kBytes), c, first && s == 0);
    }
  }

 private:
  static void multiply_step(const float* a, const float* b, float* c, bool first) {
    constexpr int64_t rows = kLanes == 16 ? 8 : 4, vectors = 2;  // accumulators that fit into the registers
    for (int64_t r = 0; r < kSide; r += rows) {
      for (int64_t n = 0; n < kSide; n += vectors * kLanes) {
        vf sum[rows][vectors];
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t v = 0; v < vectors; ++v) sum[i][v] = vset(0);
        for (int64_t k = 0; k < kSide; ++k) {
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
