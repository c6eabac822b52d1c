// Attention on the CPU, compiled once per ISA level: online softmax over blocks of keys (Dao et al. 2022, "FlashAttention"; Milakov and
// Gimelshein 2018), with both products as register tiles over packed operands.
//
// A task is some queries of one head. Keys and values are packed a super-block at a time; each block of 48 queries then meets it in blocks
// of 256 keys, so that the logits of a block stay in the first two cache levels. The arithmetic of a query's row is in an order that depends
// only on its place and on the number of keys and channels: neither on the batch, nor on the threads, nor on the rows that share its tile.
#include <algorithm>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/attention_double.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_pattern.h"
#include "cpu/attention_tiles.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int64_t kQueries = kAttentionQueryBlock;
constexpr int64_t kPackedBytes = 2 << 20;  // keys and values packed at a time
static_assert(kQueries % kRows == 0);

// What one block of queries carries from one block of keys to the next.
struct State {
  float* out;      // [queries][columns], not yet divided by total
  float* highest;  // [queries], largest logit so far
  float* total;    // [queries][kLanes], partial sums of the weights
};

template <typename Units, typename T>
class Task {
 public:
  Task(const AttentionCall& call, const AttentionTask& task)
      : call_(call), task_(task), units_((call.channels + Units::pack - 1) / Units::pack), columns_(round_up(call.channels, kLanes)) {
    const int64_t per_key = (units_ + columns_ / Units::pack) * sizeof(uint32_t);
    block_keys_ = std::min(round_up(call.keys, kKeys), std::max<int64_t>(kPackedBytes / per_key / kKeys, 1) * kKeys);
    // With one super-block a block of queries is finished at once, and all blocks share one state.
    states_ = block_keys_ >= call.keys ? kQueries : round_up(task.end - task.begin, kQueries);
    transform_ = call.mask.data || call.scale <= 0;
    guard_ = call.mask.data || call.causal || call.pattern.blocks;
    factor_ = static_cast<float>(transform_ ? kLog2e : call.scale * kLog2e);
    // Among few keys no average hides the rounding of a logit's chain; and few queries PyTorch multiplies as vectors, in many partial sums
    chain_ = Units::pack == 1 && (call.keys <= kFewKeys || call.queries < kAttentionFewQueries) ? kShortChain : kChain;
  }

  void run() {
    Workspace space(Workspace::bytes_of<uint32_t>(block_keys_ * units_) + Workspace::bytes_of<uint32_t>((block_keys_ / Units::pack) * columns_) +
                    Workspace::bytes_of<int32_t>(block_keys_) + Workspace::bytes_of<uint32_t>(kQueries * kPadded) +
                    Workspace::bytes_of<float>(kQueries * kKeys) + Workspace::bytes_of<float>(states_ * columns_) +
                    Workspace::bytes_of<float>(states_) + Workspace::bytes_of<float>(states_ * kLanes));
    k_ = space.take<uint32_t>(block_keys_ * units_);
    v_ = space.take<uint32_t>((block_keys_ / Units::pack) * columns_);
    poisoned_ = space.take<int32_t>(block_keys_);
    q_ = space.take<uint32_t>(kQueries * kPadded);
    logits_ = space.take<float>(kQueries * kKeys);
    State all;
    all.out = space.take<float>(states_ * columns_);
    all.highest = space.take<float>(states_);
    all.total = space.take<float>(states_ * kLanes);
    const auto [begin, keys] = visible_keys(call_, task_, kKeys);
    int64_t first_key = begin;
    do {  // at least once, so that rows without any key are written as zeros
      const int64_t count = std::min(block_keys_, keys - first_key);
      pack_keys<Units, T>(call_, task_, first_key, count, k_);
      bad_ = pack_values<Units, T>(call_, task_, first_key, count, guard_, v_, poisoned_);
      const bool last = first_key + count >= keys;
      for (int64_t query = task_.begin; query < task_.end; query += kQueries) {
        const int64_t at = states_ == kQueries ? 0 : query - task_.begin;
        const State state{all.out + at * columns_, all.highest + at, all.total + at * kLanes};
        const int64_t rows = std::min(kQueries, task_.end - query);
        if (last) prefetch_output(query, rows);
        if (first_key == begin) clear(state, rows);
        attend(state, query, rows, first_key, count);
        if (last) write(state, query, rows);
      }
      first_key += count;
    } while (first_key < keys);
  }

 private:
  void clear(const State& state, int64_t rows) const {
    const int64_t padded_rows = round_up(rows, kRows);
    std::fill_n(state.highest, padded_rows, -INFINITY);
    std::fill_n(state.total, padded_rows * kLanes, 0.0f);
    std::fill_n(state.out, padded_rows * columns_, 0.0f);
  }

  // The next keys for a block of queries, from `at` on: at most kKeys, in whole panels but for the last; without those that a pattern hides from all.
  KeyRange next_keys(int64_t query, int64_t rows, int64_t first_key, int64_t at, int64_t count) const {
    constexpr int64_t step = std::max<int64_t>(kPanel, kPatternBlock);
    if (!call_.pattern.blocks) return {at, std::min(at + kKeys, count)};
    const auto hidden = [&](int64_t key) {
      return !pattern_sees(call_.pattern, task_, query, query + rows, first_key + key, first_key + std::min(key + step, count));
    };
    while (at < count && hidden(at)) at += step;
    int64_t end = at;
    while (end < count && end - at < kKeys && !hidden(end)) end += step;
    return {at, std::min(end, count)};
  }

  // One block of queries meets one super-block of keys.
  void attend(const State& state, int64_t query, int64_t rows, int64_t first_key, int64_t count) {
    const int64_t padded_rows = round_up(rows, kRows), value_units = (count + Units::pack - 1) / Units::pack;
    pack_queries<Units, T>(call_, task_, query, rows, q_);
    alignas(64) float decay[kQueries], lane_highest[kQueries * kLanes], ones[kRows];
    std::fill_n(ones, kRows, 1.0f);
    for (int64_t at = 0; at < count;) {
      const auto [block, end] = next_keys(query, rows, first_key, at, count);
      at = end;
      int64_t keys = end - block;
      if (call_.causal) keys = std::min(keys, query + rows - (first_key + block));
      if (keys <= 0) break;
      const int64_t vectors = (keys + kLanes - 1) / kLanes;
      std::fill_n(lane_highest, padded_rows * kLanes, -INFINITY);
      for (int64_t panel = 0; panel < keys; panel += kPanel) {
        // As packed: the last panel of the super-block is as wide as its keys need.
        const int64_t width = std::min<int64_t>(kPanel, round_up(count - block - panel, kLanes)) / kLanes;
        with_vectors(width, [&](auto n) {
          for (int64_t u = 0; u < units_; u += chain_) {
            const uint32_t* k = k_ + (block + panel) * units_ + u * n * kLanes;
            for (int64_t r = 0; r < padded_rows; r += kRows) {
              logits_tile<Units, n>(q_ + r * kPadded + u, k, std::min(chain_, units_ - u), u > 0, logits_ + r * kKeys + panel,
                                    lane_highest + r * kLanes);
            }
          }
        });
      }
      // What the tiles saw as the highest logits holds only if every column that they computed counts, as it is.
      const bool cut = transform_ || keys % kLanes != 0 || (call_.causal && first_key + block + round_up(keys, kPanel) > query + 1) ||
                       (call_.pattern.blocks && !pattern_is_full(call_.pattern, task_, query, query + rows, first_key + block, first_key + end));
      if (cut) mask_block(query, rows, padded_rows, first_key + block, keys);
      if (cut || units_ > chain_) {
        for (int64_t r = 0; r < padded_rows; ++r) highest_of(logits_ + r * kKeys, vectors, lane_highest + r * kLanes);
      }
      for (int64_t r = 0; r < padded_rows; ++r) {
        softmax_row<Units>(logits_ + r * kKeys, vectors, vmax_of(vload(lane_highest + r * kLanes)), factor_, state.highest[r],
                           state.total + r * kLanes, decay[r]);
      }
      const uint32_t* weights = reinterpret_cast<const uint32_t*>(logits_);
      const int64_t steps = (keys + Units::pack - 1) / Units::pack;
      for (int64_t column = 0; column < columns_; column += kPanel) {
        const int64_t width = std::min<int64_t>(kPanel, columns_ - column) / kLanes;
        with_vectors(width, [&](auto n) {
          for (int64_t u = 0; u < steps; u += chain_) {
            const uint32_t* v = v_ + column * value_units + (block / Units::pack + u) * n * kLanes;
            for (int64_t r = 0; r < padded_rows; r += kRows) {
              output_tile<Units, n>(weights + r * kKeys + u, v, std::min(chain_, steps - u), u ? ones : decay + r,
                                    state.out + r * columns_ + column, columns_);
            }
          }
        });
      }
      if (bad_) add_poisoned(state, rows, first_key, block, keys);
    }
  }

  // Scales and masks the logits where that cannot be left to softmax_row: a mask, a scale that is not positive, columns beyond the last key.
  void mask_block(int64_t query, int64_t rows, int64_t padded_rows, int64_t key, int64_t keys) {
    const int64_t vectors = (keys + kLanes - 1) / kLanes;
    alignas(64) float bias[kKeys] = {};
    for (int64_t r = 0; r < padded_rows; ++r) {
      float* s = logits_ + r * kKeys;
      if (transform_) {
        if (call_.mask.data && r < rows && (r == 0 || call_.mask.query != 0)) read_bias(call_.mask, task_, query + r, key, keys, bias);
        const vf scale = vset(static_cast<float>(call_.scale));
        for (int64_t i = 0; i < vectors * kLanes; i += kLanes) {
          const vf b = vload(bias + i);
          vstore(s + i, vkeep(vfma(vload(s + i), scale, b), b));
        }
      }
      const int64_t visible = call_.causal ? std::clamp<int64_t>(query + r - key + 1, 0, keys) : keys;
      for (int64_t j = visible; j < vectors * kLanes; ++j) s[j] = -INFINITY;
      if (call_.pattern.blocks && r < rows) hide_by_pattern(call_.pattern, task_, query + r, key, keys, s);
    }
  }

  // Keys whose values are not finite were packed as zeros: add them to the rows that do attend to them.
  void add_poisoned(const State& state, int64_t rows, int64_t first_key, int64_t block, int64_t keys) {
    alignas(64) float value[kPadded];
    for (int64_t i = 0; i < bad_; ++i) {
      const int64_t key = poisoned_[i] - block;
      if (key < 0 || key >= keys) continue;
      load_row(row_of<T>(call_.v, task_.batch, task_.head / call_.group, first_key + poisoned_[i]), call_.channels, value);
      for (int64_t r = 0; r < rows; ++r) {
        float weight;
        if constexpr (Units::pack == 1) {
          weight = logits_[r * kKeys + key];
        } else {
          weight = to_float(reinterpret_cast<const bfloat16*>(logits_ + r * kKeys)[key]);
        }
        if (weight == 0) continue;
        for (int64_t c = 0; c < call_.channels; ++c) state.out[r * columns_ + c] += weight * value[c];
      }
    }
  }

  // The output is cold memory: asked for early, it is there when the block is done.
  void prefetch_output(int64_t query, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const char* p = reinterpret_cast<const char*>(row_of<T>(call_.out, task_.batch, task_.head, query + r).data);
      for (int64_t at = 0; at < call_.channels * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(p + at, 1);
    }
  }

  void write(const State& state, int64_t query, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const double total = sum_of(vload(state.total + r * kLanes));
      const float inverse = total == 0 ? 0.0f : static_cast<float>(1 / total);  // no key attended: 0
      put_softmax(call_, task_, query + r, state.highest[r], factor_, total);
      float* x = state.out + r * columns_;
      for (int64_t c = 0; c < columns_; ++c) x[c] *= inverse;
      T* out = const_cast<T*>(row_of<T>(call_.out, task_.batch, task_.head, query + r).data);
      int64_t c = 0;
      if constexpr (std::is_same_v<T, float16>) {
        for (; c + kLanes <= call_.channels; c += kLanes) store_f16(out + c, x + c);
      }
      for (; c < call_.channels; ++c) out[c] = from_float<T>(x[c]);
    }
  }

  const AttentionCall& call_;
  const AttentionTask& task_;
  const int64_t units_, columns_;
  int64_t block_keys_, states_, chain_, bad_ = 0;
  bool transform_, guard_;
  float factor_;
  uint32_t *k_, *v_, *q_;
  int32_t* poisoned_;
  float* logits_;
};

void attention_task(const AttentionCall& call, const AttentionTask& task) {
  switch (call.type) {
    case AttentionType::f32: return Task<FloatUnits, float>(call, task).run();
    case AttentionType::f16: return Task<FloatUnits, float16>(call, task).run();
    case AttentionType::f64: return DoubleTask(call, task).run();
    default: break;
  }
#if defined(__AVX512BF16__)
  Task<Bf16Units, bfloat16>(call, task).run();
#else
  Task<FloatUnits, bfloat16>(call, task).run();
#endif
}

}  // namespace fusewire::FUSEWIRE_ISA
