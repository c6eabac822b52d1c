// A pattern as the attention kernels ask for it.
#pragma once
#include <algorithm>

#include "cpu/attention.h"

namespace fusewire::FUSEWIRE_ISA {

// The blocks that the block of a query makes with all blocks of keys.
inline const int32_t* pattern_row(const AttentionPattern& pattern, int64_t batch, int64_t head, int64_t query) {
  return pattern.blocks + batch * pattern.batch + head * pattern.head + query / kPatternBlock * pattern.query;
}

// The bits of a query's 32 keys in a block that is not full.
inline uint32_t pattern_word(const AttentionPattern& pattern, int32_t block, int64_t query) {
  return block == kEmptyBlock ? 0 : static_cast<uint32_t>(pattern.words[block * kPatternBlock + query % kPatternBlock]);
}

// Whether some of the queries [query, end) may see some of the keys [key, key_end); whether all see all of them.
inline bool pattern_sees(const AttentionPattern& pattern, const AttentionTask& task, int64_t query, int64_t end, int64_t key, int64_t key_end) {
  for (int64_t q = query / kPatternBlock * kPatternBlock; q < end; q += kPatternBlock) {
    const int32_t* row = pattern_row(pattern, task.batch, task.head, q);
    for (int64_t k = key / kPatternBlock; k * kPatternBlock < key_end; ++k) {
      if (row[k] != kEmptyBlock) return true;
    }
  }
  return false;
}
inline bool pattern_is_full(const AttentionPattern& pattern, const AttentionTask& task, int64_t query, int64_t end, int64_t key, int64_t key_end) {
  for (int64_t q = query / kPatternBlock * kPatternBlock; q < end; q += kPatternBlock) {
    const int32_t* row = pattern_row(pattern, task.batch, task.head, q);
    for (int64_t k = key / kPatternBlock; k * kPatternBlock < key_end; ++k) {
      if (row[k] != kFullBlock) return false;
    }
  }
  return true;
}

// logits [keys] of one query: -inf where the pattern hides the key. `key` begins a block.
inline void hide_by_pattern(const AttentionPattern& pattern, const AttentionTask& task, int64_t query, int64_t key, int64_t keys, float* logits) {
  const int32_t* row = pattern_row(pattern, task.batch, task.head, query) + key / kPatternBlock;
  for (int64_t j = 0; j < keys; j += kPatternBlock, ++row) {
    if (*row == kFullBlock) continue;
    const uint32_t word = pattern_word(pattern, *row, query);
    const int64_t count = std::min(kPatternBlock, keys - j);
    for (int64_t i = 0; i < count; ++i) logits[j + i] = word >> i & 1 ? logits[j + i] : -INFINITY;
  }
}

// The keys that a task's queries see any of: [begin, end), begin a multiple of `multiple`.
struct KeyRange { int64_t begin, end; };
inline KeyRange visible_keys(const AttentionCall& call, const AttentionTask& task, int64_t multiple) {
  KeyRange range{0, call.causal ? std::min(call.keys, task.end) : call.keys};
  if (!call.pattern.blocks) return range;
  while (range.end > 0) {
    const int64_t last = (range.end - 1) / kPatternBlock * kPatternBlock;
    if (pattern_sees(call.pattern, task, task.begin, task.end, last, range.end)) break;
    range.end = last;
  }
  const auto end = [&] { return std::min(range.begin + multiple, range.end); };
  while (end() < range.end && !pattern_sees(call.pattern, task, task.begin, task.end, range.begin, end())) range.begin += multiple;
  return range;
}

}  // namespace fusewire::FUSEWIRE_ISA
