// Attention in float64: the same blocks of queries and keys as the tiles, in plain loops. For gradcheck and references, not for speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_pattern.h"

namespace fusewire::FUSEWIRE_ISA {

class DoubleTask {
 public:
  static constexpr int64_t kBlock = 32;

  DoubleTask(const AttentionCall& call, const AttentionTask& task) : call_(call), task_(task), channels_(call.channels) {}

  void run() {
    Workspace space(Workspace::bytes_of<double>(4 * kBlock * channels_));
    q_ = space.take<double>(kBlock * channels_);
    k_ = space.take<double>(kBlock * channels_);
    v_ = space.take<double>(kBlock * channels_);
    out_ = space.take<double>(kBlock * channels_);
    for (int64_t query = task_.begin; query < task_.end; query += kBlock) {
      const int64_t rows = std::min(kBlock, task_.end - query);
      for (int64_t r = 0; r < rows; ++r) load(call_.q, task_.head, query + r, true, q_ + r * channels_);
      std::fill_n(highest_, kBlock, -kInfinity);
      std::fill_n(total_, kBlock, 0.0);
      std::fill_n(out_, kBlock * channels_, 0.0);
      for (int64_t key = 0; key < call_.keys; key += kBlock) attend(query, rows, key, std::min(kBlock, call_.keys - key));
      for (int64_t r = 0; r < rows; ++r) {
        double* out = const_cast<double*>(row_of<double>(call_.out, task_.batch, task_.head, query + r).data);
        for (int64_t c = 0; c < channels_; ++c) out[c] = total_[r] == 0 ? 0.0 : out_[r * channels_ + c] / total_[r];
        if (call_.total) {
          const int64_t at = (task_.batch * call_.heads + task_.head) * call_.softmax_rows + query + r;
          call_.highest[at] = highest_[r], call_.total[at] = total_[r];
        }
      }
    }
  }

 private:
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  void load(const AttentionTensor (&pieces)[2], int64_t head, int64_t t, bool norm, double* out) const {
    const Row<double> row = row_of<double>(pieces, task_.batch, head, t);
    double squares = 0;
    for (int64_t c = 0; c < channels_; ++c) {
      out[c] = row.data[c * row.stride];
      squares += out[c] * out[c];
    }
    if (norm && row.weight) {
      const double scale = 1 / std::sqrt(squares / static_cast<double>(channels_) + call_.eps);
      for (int64_t c = 0; c < channels_; ++c) out[c] = out[c] * scale * row.weight[c];
    }
    if (row.cos) turn_pairs(out, channels_, row.cos, row.sin);
  }

  // What the mask adds for one query and key; -inf where it hides the key.
  double bias(int64_t query, int64_t key) const {
    if (call_.causal && key > query) return -kInfinity;
    if (call_.pattern.blocks) {
      const int32_t block = pattern_row(call_.pattern, task_.batch, task_.head, query)[key / kPatternBlock];
      if (block != kFullBlock && !(pattern_word(call_.pattern, block, query) >> key % kPatternBlock & 1)) return -kInfinity;
    }
    const AttentionMask& m = call_.mask;
    if (!m.data) return 0;
    const int64_t at = task_.batch * m.batch + task_.head * m.head + query * m.query + key * m.key;
    switch (m.type) {
      case AttentionType::boolean: return static_cast<const uint8_t*>(m.data)[at] ? 0.0 : -kInfinity;
      case AttentionType::f32: return static_cast<const float*>(m.data)[at];
      case AttentionType::bf16: return to_float(static_cast<const bfloat16*>(m.data)[at]);
      case AttentionType::f16: return to_float(static_cast<const float16*>(m.data)[at]);
      default: return static_cast<const double*>(m.data)[at];
    }
  }

  void attend(int64_t query, int64_t rows, int64_t key, int64_t keys) {
    for (int64_t j = 0; j < keys; ++j) {
      load(call_.k, task_.head / call_.group, key + j, true, k_ + j * channels_);
      load(call_.v, task_.head / call_.group, key + j, false, v_ + j * channels_);
    }
    for (int64_t r = 0; r < rows; ++r) {
      double s[kBlock], now = highest_[r];
      for (int64_t j = 0; j < keys; ++j) {
        const double b = bias(query + r, key + j);
        double dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < channels_; ++c) dot += q_[r * channels_ + c] * k_[j * channels_ + c];
        s[j] = b == -kInfinity ? b : dot * call_.scale + b;
        now = s[j] > now ? s[j] : now;
      }
      const double decay = now == highest_[r] ? 1.0 : std::exp(highest_[r] - now);
      highest_[r] = now;
      total_[r] *= decay;
      double* out = out_ + r * channels_;
      for (int64_t c = 0; c < channels_; ++c) out[c] *= decay;
      for (int64_t j = 0; j < keys; ++j) {
        if (s[j] == -kInfinity) continue;  // hidden: not even a NaN of its value counts
        const double weight = std::exp(s[j] - now);
        total_[r] += weight;
        for (int64_t c = 0; c < channels_; ++c) out[c] += weight * v_[j * channels_ + c];
      }
    }
  }

  const AttentionCall& call_;
  const AttentionTask& task_;
  const int64_t channels_;
  double highest_[kBlock], total_[kBlock];
  double *q_, *k_, *v_, *out_;
};

}  // namespace fusewire::FUSEWIRE_ISA
