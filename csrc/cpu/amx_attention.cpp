// Attention on AMX tiles: online softmax over blocks of keys, as attention_kernels.cpp, with both products transposed.
//
// logits^T = K Q^T, so that a vector holds one key's logits of 16 queries: maxima, sums and decays of the softmax are plain vector
// operations, without a reduction across lanes, and two rows of weights interleave into the right-hand operand of the second product,
// out^T = V^T weights^T. Keys go in as they lie; queries and values are transposed while packing.
#include <algorithm>
#include <type_traits>

#include "cpu/amx_attention_operands.h"
#include "cpu/attention_pattern.h"
#include "cpu/attention_tiles.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int64_t kKeyBlock = 128;             // two blocks of logits: 32 KiB
constexpr int64_t kBlockSteps = kKeyBlock / kStep;
constexpr int64_t kBoundedKeyBlock = 256;      // weights: 16 KiB for each part
constexpr int64_t kPackedKeyBytes = 3 << 19;   // keys and values packed at a time, in the second-level cache
constexpr float kWidestBound = 100, kLeastTotal = 0x1p-64f;  // see attend_bounded
static_assert(kAttentionMaxBlocks < 64 && kStep == kPatternBlock && kQueryBlock == kPatternBlock);

// What a block of 32 queries carries from one block of keys to the next: lanes are queries.
struct State {
  float* out;      // [channels, whole blocks][32], not yet divided by total
  float* highest;  // [32], largest logit so far, or what bounds it
  float* total;    // [32], sum of the weights
};

template <typename T>
class AmxTask : AmxOperands<T> {
  using AmxOperands<T>::parts, AmxOperands<T>::call_, AmxOperands<T>::task_, AmxOperands<T>::steps_, AmxOperands<T>::columns_;
  static constexpr int kDegree = parts == 1 ? 3 : 6;  // of the exponential: see attention_simd.h
  static constexpr bool kStreams = parts == 1;         // keys and values, each of which is loaded once for a block of queries

 public:
  AmxTask(const AttentionCall& call, const AttentionTask& task) : AmxOperands<T>(call, task) {
    block_keys_ = std::min(round_up(call.keys, kStep), std::max<int64_t>(kPackedKeyBytes / this->bytes_for(2) / kKeyBlock, 1) * kKeyBlock);
    states_ = block_keys_ >= call.keys ? kQueryBlock : round_up(task.end - task.begin, kQueryBlock);
    transform_ = call.mask.data || call.scale <= 0;
    guard_ = call.mask.data || call.causal || call.pattern.blocks;
    factor_ = static_cast<float>(transform_ ? kLog2e : call.scale * kLog2e);
  }

  void run() {
    const int64_t operand = this->bytes_for(block_keys_), weights = kBoundedKeyBlock / kStep * parts * kPartBytes;
    Workspace space(2 * Workspace::bytes_of<char>(operand) + Workspace::bytes_of<char>(steps_ * parts * kPartBytes) +
                    Workspace::bytes_of<char>(weights) + 3 * Workspace::bytes_of<float>(kKeyBlock * kQueryBlock) +
                    Workspace::bytes_of<float>(states_ * columns_) + 2 * Workspace::bytes_of<float>(states_) +
                    Workspace::bytes_of<int32_t>(block_keys_ / kStep));
    k_ = space.take<char>(operand);
    v_ = space.take<char>(operand);
    q_ = space.take<char>(steps_ * parts * kPartBytes);
    weights_ = space.take<char>(weights);
    logits_ = space.take<float>(2 * kKeyBlock * kQueryBlock);
    bias_ = space.take<float>(kKeyBlock * kQueryBlock);
    seen_ = space.take<int32_t>(block_keys_ / kStep);
    State all;
    all.out = space.take<float>(states_ * columns_);
    all.highest = space.take<float>(states_);
    all.total = space.take<float>(states_);
    const auto [start, keys] = visible_keys(call_, task_, kKeyBlock);
    const TileScope tiles;
    int64_t first_key = start;
    uint64_t left = 0, bounded = 0;  // blocks of queries, one bit each: those left to AVX-512, and those that attend_bounded had a part in
    do {  // at least once, so that rows without any key are written as zeros
      const int64_t count = std::min(block_keys_, keys - first_key);
      if (!this->pack_keys(first_key, count, k_, longest_key_) || !this->pack_values(first_key, count, guard_, v_))
        return fall_back(task_.begin, task_.end);
      const bool last = first_key + count >= keys;
      for (int64_t query = task_.begin; query < task_.end; query += kQueryBlock) {
        const int64_t index = (query - task_.begin) / kQueryBlock, at = states_ == kQueryBlock ? 0 : query - task_.begin;
        const State state{all.out + at * columns_, all.highest + at, all.total + at};
        const int64_t rows = std::min(kQueryBlock, task_.end - query);
        if (last) prepare_to_write(query, rows);
        if (!this->pack_queries(query, rows, q_, lengths_)) {
          left |= uint64_t{1} << index;
          continue;
        }
        if (first_key == start) begin(state);
        if (attend_bounded(state, count)) bounded |= uint64_t{1} << index;
        else attend(state, query, rows, first_key, count);
        if (!last) continue;
        if (bounded >> index & 1 && !weighed(state, rows)) {
          if (first_key > start) {
            left |= uint64_t{1} << index;
            continue;
          }
          begin(state);
          attend(state, query, rows, first_key, count);
        }
        write(state, query, rows);
      }
      first_key += count;
    } while (first_key < keys);
    for (int64_t i = 0; left >> i; ++i) {
      const int64_t query = task_.begin + i * kQueryBlock;
      if (left >> i & 1) fall_back(query, std::min(query + kQueryBlock, task_.end));
    }
  }

 private:
  // What turns the logits of one block into weights 2^((s - highest) * factor), for two groups of 16 queries.
  struct Softmax { vf base[2], scaled[2], total[2]; bool moderate; };

  // Queries whose operands do not split into bfloat16 parts, or attend around values that are not finite. A head's keys and values decide
  // for all of its queries, a block of queries for itself: not the batch, and not how queries are cut into tasks.
  void fall_back(int64_t begin, int64_t end) const { avx512_bf16::attention_task(call_, {task_.batch, task_.head, begin, end}); }

  void begin(const State& state) const {
    std::fill_n(state.highest, kQueryBlock, -INFINITY);
    std::fill_n(state.total, kQueryBlock, 0.0f);
    std::fill_n(state.out, kQueryBlock * columns_, 0.0f);
  }

  // The rows that this block of queries will be written to, on their way while it is computed.
  void prepare_to_write(int64_t query, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const char* p = reinterpret_cast<const char*>(row_of<T>(call_.out, task_.batch, task_.head, query + r).data);
      for (int64_t at = 0; at < call_.channels * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(p + at, 1);
    }
  }

  // attend(), without the search for the largest logit: |q| times the longest |k| is no less (Cauchy and Schwarz), and a softmax may subtract
  // anything, as long as its weights do not vanish: `weighed` tells afterwards. float32 has no bits to spare for the wider exponents, nor has a
  // softmax that is asked for itself.
  bool attend_bounded(const State& state, int64_t count) {
    if (parts == 3 || guard_ || transform_ || call_.total) return false;
    vf bound[2];
    for (int g = 0; g < 2; ++g) {
      bound[g] = vmul(_mm512_sqrt_ps(vmul(vload(lengths_ + g * kLanes), vset(longest_key_))), vset(parts == 1 ? 1.0f : 1.01f));
      if (!(_mm512_reduce_max_ps(bound[g]) * factor_ <= kWidestBound)) return false;
    }
    Softmax now;
    for (int g = 0; g < 2; ++g) raise(state, g, vmax(bound[g], vload(state.highest + g * kLanes)), now);
    const int64_t key_steps = (count + kStep - 1) / kStep;
    const auto multiply = [&](int64_t key) {
      multiply_block<parts, true, false, kStreams>(k_ + key / kSide * steps_ * parts * kPartBytes, q_, steps_, pair_of_logits(key), kQueryBlock, true);
    };
    if (count > 0) multiply(0);
    for (int64_t block = 0; block < count; block += kBoundedKeyBlock) {
      const int64_t end = std::min(block + kBoundedKeyBlock, count);
      for (int64_t key = block; key < end; key += kStep) {
        float* const s = pair_of_logits(key);
        if (key + kStep > end) std::fill(s + (end - key) * kQueryBlock, s + kStep * kQueryBlock, -INFINITY);
        if (key + kStep < count) multiply(key + kStep);
        weigh<true, true>(now, s, weights_ + (key - block) / kStep * parts * kPartBytes);
      }
      add_values(state, v_ + block / kStep * parts * kPartBytes, key_steps, weights_, (end - block + kStep - 1) / kStep);
    }
    for (int g = 0; g < 2; ++g) vstore(state.total + g * kLanes, now.total[g]);
    return true;
  }

  float* pair_of_logits(int64_t key) const { return logits_ + key / kSide % 2 * kSide * kQueryBlock; }

  // Whether the weights of all queries are of a size to be trusted.
  bool weighed(const State& state, int64_t rows) const {
    return !std::any_of(state.total, state.total + rows, [](float total) { return total < kLeastTotal; });
  }

  // Sums of 16 queries so far, as if `highest` had been subtracted from the beginning.
  void raise(const State& state, int g, vf highest, Softmax& now) const {
    const vf before = vload(state.highest + g * kLanes);
    now.total[g] = vload(state.total + g * kLanes);
    const __mmask16 moved = _mm512_cmp_ps_mask(before, highest, _CMP_LT_OQ);
    if (moved) {
      vstore(state.highest + g * kLanes, highest);
      const vf decay = _mm512_mask_mov_ps(vset(1), moved, vexp2<6>(vmul(vsub(before, highest), vset(factor_))));
      now.total[g] = vmul(now.total[g], decay);
      for (int64_t c = 0; c < columns_; ++c) {
        float* out = state.out + c * kQueryBlock + g * kLanes;
        vstore(out, vmul(vload(out), decay));
      }
    }
    now.base[g] = _mm512_mask_mov_ps(highest, _mm512_cmp_ps_mask(highest, vset(-INFINITY), _CMP_EQ_OQ), vset(0));  // no key attended yet
    now.scaled[g] = vmul(now.base[g], vset(-factor_));
  }

  // out^T += V^T weights^T over `steps` steps of keys; `v`: those of the first channels.
  void add_values(const State& state, const char* v, int64_t key_steps, const char* weights, int64_t steps) const {
    for (int64_t c = 0; c < steps_; ++c, v += key_steps * parts * kPartBytes) {
      float* out = state.out + c * kSide * kQueryBlock;
      if constexpr (parts == 3) {  // sums on their own first: rounding errors grow with the length of a chain, and show in float32
        alignas(64) float fresh[kSide * kQueryBlock];
        multiply_block<parts>(v, weights, steps, fresh, kQueryBlock, true);
#pragma omp simd
        for (int64_t i = 0; i < kSide * kQueryBlock; ++i) out[i] += fresh[i];
      } else {
        multiply_block<parts, false, false, kStreams>(v, weights, steps, out, kQueryBlock, false);
      }
    }
  }

  // One block of queries meets one super-block of keys: the steps of 32 keys that some query may see, one after another, wherever they lie.
  void attend(const State& state, int64_t query, int64_t rows, int64_t first_key, int64_t count) {
    const int64_t key_steps = (count + kStep - 1) / kStep;
    if (call_.causal) count = std::min(count, query + rows - first_key);
    int64_t steps = 0;
    for (int64_t key = 0; key < count; key += kStep) {
      const int64_t end = first_key + std::min(key + kStep, count);
      if (call_.pattern.blocks && !pattern_sees(call_.pattern, task_, query, query + rows, first_key + key, end)) continue;
      seen_[steps++] = static_cast<int32_t>(key / kStep);
    }
    const auto multiply = [&](int64_t step) {  // logits of 32 keys
      multiply_block<parts, true, false, kStreams>(k_ + seen_[step] * steps_ * parts * kPartBytes, q_, steps_, logits(step), kQueryBlock, true);
    };
    for (int64_t step = 0; step < std::min(kBlockSteps, steps); ++step) multiply(step);
    for (int64_t block = 0; block < steps; block += kBlockSteps) {
      const int64_t now_steps = std::min(kBlockSteps, steps - block), next = block + kBlockSteps;
      for_runs(block, block + now_steps, [&](int64_t step, int64_t run) {
        const int64_t key = seen_[step] * kStep;
        hide(logits(step), query, rows, first_key + key, std::min(run * kStep, count - key), run * kStep);
      });
      Softmax now = begin_softmax(state, logits(block), now_steps * kStep);
      // The tiles multiply the next block while the vector units work on this one.
      for (int64_t i = 0; i < kBlockSteps; ++i) {
        if (next + i < steps) multiply(next + i);
        if (i >= now_steps) continue;
        char* to = weights_ + i * parts * kPartBytes;
        if (parts == 1 && now.moderate) weigh<true, false>(now, logits(block + i), to);
        else weigh<false, false>(now, logits(block + i), to);
      }
      for (int g = 0; g < 2; ++g) vstore(state.total + g * kLanes, now.total[g]);
      for_runs(block, block + now_steps, [&](int64_t step, int64_t run) {
        add_values(state, v_ + seen_[step] * parts * kPartBytes, key_steps, weights_ + (step - block) * parts * kPartBytes, run);
      });
    }
  }

  // Two blocks of logits take turns.
  float* logits(int64_t step) const { return logits_ + step % (2 * kBlockSteps) * kStep * kQueryBlock; }

  // Calls f(first, number) for the steps [begin, end), those that are neighbours in memory together.
  template <typename F>
  void for_runs(int64_t begin, int64_t end, F&& f) const {
    for (int64_t run; begin < end; begin += run) {
      run = 1;
      while (begin + run < end && seen_[begin + run] == seen_[begin] + run) ++run;
      f(begin, run);
    }
  }

  // The logits of some neighbouring keys as the softmax takes them: scaled and -inf for those that a query does not see, or that are not there.
  void hide(float* s, int64_t query, int64_t rows, int64_t key, int64_t keys, int64_t padded) {
    if (transform_) apply_mask(s, query, rows, key, keys);
    if (call_.causal) apply_causal(s, query, key, keys);
    if (call_.pattern.blocks) apply_pattern(s, query, rows, key, keys);
    std::fill(s + keys * kQueryBlock, s + padded * kQueryBlock, -INFINITY);
  }

  // Scales the logits and adds the mask to them; -inf where the mask is, whatever the logit.
  void apply_mask(float* logits, int64_t query, int64_t rows, int64_t key, int64_t keys) {
    const vf scale = vset(static_cast<float>(call_.scale));
    if (call_.mask.data) {
      alignas(64) float row[kKeyBlock];
      for (int64_t r = 0; r < rows; ++r) {
        if (r == 0 || call_.mask.query != 0) read_bias(call_.mask, task_, query + r, key, keys, row);
        for (int64_t j = 0; j < keys; ++j) bias_[j * kQueryBlock + r] = row[j];
      }
      for (int64_t j = 0; j < keys; ++j) std::fill(bias_ + j * kQueryBlock + rows, bias_ + (j + 1) * kQueryBlock, 0.0f);
    } else {
      std::fill_n(bias_, keys * kQueryBlock, 0.0f);
    }
    for (int64_t i = 0; i < keys * kQueryBlock; i += kLanes) {
      const vf b = vload(bias_ + i);
      vstore(logits + i, vkeep(vfma(vload(logits + i), scale, b), b));
    }
  }

  void apply_causal(float* logits, int64_t query, int64_t key, int64_t keys) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t j = std::max<int64_t>(query - key + 1, 0); j < keys; ++j) {
      for (int64_t lane = 0; lane < kQueryBlock; lane += kLanes) {
        const int behind = static_cast<int>(key + j - query - lane);  // lanes before it lie before the key
        float* s = logits + j * kQueryBlock + lane;
        vstore(s, _mm512_mask_mov_ps(vload(s), _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32(behind)), vset(-INFINITY)));
      }
    }
  }

  void apply_pattern(float* logits, int64_t query, int64_t rows, int64_t key, int64_t keys) {
    const int32_t* row = pattern_row(call_.pattern, task_.batch, task_.head, query) + key / kPatternBlock;  // blocks of queries are the pattern's
    for (int64_t first = 0; first < keys; first += kPatternBlock, ++row) {
      if (*row == kFullBlock) continue;
      alignas(64) uint32_t words[kQueryBlock] = {};
      for (int64_t r = 0; r < rows; ++r) words[r] = pattern_word(call_.pattern, *row, query + r);
      for (int64_t j = first; j < std::min(first + kPatternBlock, keys); ++j) {
        for (int64_t lane = 0; lane < kQueryBlock; lane += kLanes) {
          float* s = logits + j * kQueryBlock + lane;
          const __m512i bit = _mm512_set1_epi32(static_cast<int>(1u << (j - first)));
          vstore(s, _mm512_mask_mov_ps(vset(-INFINITY), _mm512_test_epi32_mask(_mm512_load_si512(words + lane), bit), vload(s)));
        }
      }
    }
  }

  Softmax begin_softmax(const State& state, const float* logits, int64_t keys) const {
    Softmax now;
    now.moderate = true;
    for (int g = 0; g < 2; ++g) {
      vf top[2] = {vset(-INFINITY), vset(-INFINITY)};
      for (int64_t j = 0; j < keys; j += 2) {
        top[0] = vmax(vload(logits + j * kQueryBlock + g * kLanes), top[0]);
        top[1] = vmax(vload(logits + (j + 1) * kQueryBlock + g * kLanes), top[1]);
      }
      raise(state, g, vmax(vmax(top[0], top[1]), vload(state.highest + g * kLanes)), now);
      now.moderate &= _mm512_reduce_max_ps(_mm512_abs_ps(now.scaled[g])) < 1e30f;
    }
    return now;
  }

  // Weights of 32 keys, as one step of the right operand: [part][2 tiles][pair of keys][query]. `fused`: s * factor - highest * factor, which
  // is enough for bfloat16, unless the product overflows as it may under a mask of the lowest finite number.
  // `as_stored`: the sum is that of the weights as they are multiplied with the values, so that a single key weighs 1 whatever was subtracted.
  template <bool fused, bool as_stored>
  void weigh(Softmax& now, const float* s, char* to) const {
    const vf factor = vset(factor_);
    const auto weight = [&](const float* s, int g) {
      if constexpr (fused) return vexp2<kDegree>(vfma(vload(s), factor, now.scaled[g]));
      return vexp2<kDegree>(vmul(vsub(vload(s), now.base[g]), factor));
    };
    vf sum[2] = {vset(0), vset(0)};  // on its own first: rounding errors grow with the length of a chain of sums
    for (int64_t j = 0; j < kStep; j += 2, s += 2 * kQueryBlock, to += 64) {
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        const vf low = weight(s + g * kLanes, g), high = weight(s + kQueryBlock + g * kLanes, g);
        __m512i units[parts];
        split_pair<parts>(low, high, units);
        if constexpr (as_stored && parts == 1) sum[g] = _mm512_dpbf16_ps(sum[g], (__m512bh)units[0], (__m512bh)_mm512_set1_epi32(0x3f803f80));
        else sum[g] = vadd(sum[g], vadd(low, high));
        for (int p = 0; p < parts; ++p) _mm512_store_si512(to + p * kPartBytes + g * kTileBytes, units[p]);
      }
    }
    for (int g = 0; g < 2; ++g) now.total[g] = vadd(now.total[g], sum[g]);
  }

  void write(const State& state, int64_t query, int64_t rows) {
    alignas(64) float wide[16][kPadded];
    for (int64_t g = 0; g < rows; g += kLanes) {
      const vf total = vload(state.total + g);
      const __mmask16 none = _mm512_cmp_ps_mask(total, vset(0), _CMP_EQ_OQ);  // no key attended: 0
      const vf inverse = _mm512_mask_mov_ps(_mm512_div_ps(vset(1), total), none, vset(0));
      for (int64_t channel = 0; channel < columns_; channel += 16) {
        __m512 square[16];
        for (int64_t i = 0; i < 16; ++i) square[i] = vmul(vload(state.out + (channel + i) * kQueryBlock + g), inverse);
        transpose16(square);
        for (int64_t i = 0; i < 16; ++i) vstore(wide[i] + channel, square[i]);
      }
      for (int64_t r = 0; r < std::min<int64_t>(kLanes, rows - g); ++r) {
        put_softmax(call_, task_, query + g + r, state.highest[g + r], factor_, static_cast<double>(state.total[g + r]));
        T* out = const_cast<T*>(row_of<T>(call_.out, task_.batch, task_.head, query + g + r).data);
        const float* x = wide[r];
#pragma omp simd
        for (int64_t c = 0; c < call_.channels; ++c) out[c] = from_float<T>(x[c]);
      }
    }
  }

  int64_t block_keys_, states_;
  bool transform_, guard_;
  float factor_, longest_key_ = 0;       // the largest sum of squares of a key
  alignas(64) float lengths_[kQueryBlock];  // the sums of squares of the queries
  char *k_, *v_, *q_, *weights_;
  float *logits_, *bias_;
  int32_t* seen_;  // the steps of 32 keys of a super-block that a block of queries attends to
};

void attention_task(const AttentionCall& call, const AttentionTask& task) {
  switch (call.type) {
    case AttentionType::f32: return AmxTask<float>(call, task).run();
    case AttentionType::f16: return AmxTask<float16>(call, task).run();
    case AttentionType::bf16: return AmxTask<bfloat16>(call, task).run();
    default: return avx512_bf16::attention_task(call, task);
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
