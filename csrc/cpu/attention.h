// Attention on the CPU: what attention.cpp (tensors, threads) hands to attention_kernels.cpp (tiles).
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace fusewire {

enum class AttentionType : int { f32, bf16, f16, f64, boolean };

// One tensor [B, T, H, D] of any strides (in elements). `weight` [D], where it is not null, asks for RMS norm over D while packing; `cos` and `sin`
// [T, angles = D/2], contiguous, for a turn of each pair (x[2i], x[2i+1]) after it.
struct AttentionTensor {
  const void* data;
  int64_t batch, token, head, channel;
  int64_t tokens;
  const double* weight = nullptr;
  const float *cos = nullptr, *sin = nullptr;
  int64_t angles = 0;
};

// A mask read as [B, H, Tq, Tk]: broadcast dimensions have stride 0. Boolean (true: attend) or added to the scaled logits.
struct AttentionMask {
  const void* data;  // null: no mask
  AttentionType type;
  int64_t batch, head, query, key;
};

// Which keys a query sees, as blocks of 32 x 32: kEmptyBlock, kFullBlock, or the number of 32 words, one for each query, bit j for key j.
constexpr int64_t kPatternBlock = 32;
constexpr int32_t kEmptyBlock = -2, kFullBlock = -1;
struct AttentionPattern {
  const int32_t* blocks;  // null: no pattern. [B, H, blocks of queries, blocks of keys]: broadcast dimensions have stride 0, the last has 1
  const int32_t* words;   // [number][32]
  int64_t batch, head, query;
};

// Queries, keys and values are each one or two pieces along the sequence (the second may have no tokens): joint attention over
// image and text tokens needs no concatenated copy, because every operand is packed into tiles anyway.
struct AttentionCall {
  AttentionTensor q[2], k[2], v[2], out[2];
  AttentionMask mask;
  AttentionPattern pattern;
  AttentionType type;
  int64_t queries, keys, channels;
  int64_t group;  // query heads for each key head
  double scale, eps;
  bool causal;
  double *highest, *total;  // null, or [B, H, softmax_rows] for each query's highest logit, and the sum of exp(logit - highest)
  int64_t heads, softmax_rows;
};

// Queries [begin, end) of one head of one sample.
struct AttentionTask { int64_t batch, head, begin, end; };

// Queries that the kernel handles together: a task should be a multiple of it. Results do not depend on how queries are cut into tasks.
constexpr int64_t kAttentionQueryBlock = 48;
constexpr int64_t kAttentionAmxQueryBlock = 32;
constexpr int64_t kAttentionMaxBlocks = 60;  // of a task
constexpr int64_t kAttentionFewQueries = 16;
constexpr int64_t kAttentionMaxChannels = 512;

FUSEWIRE_DECLARE(void, attention_task, (const AttentionCall&, const AttentionTask&))
namespace amx { void attention_task(const AttentionCall&, const AttentionTask&); }

}  // namespace fusewire
