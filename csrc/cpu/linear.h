// Linear layers on the CPU: what linear.cpp (tensors, threads) hands to linear_kernels.cpp (tiles).
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"
#include "cpu/picture.h"

namespace fusewire {

enum class Activation : int { none, gelu_tanh, gelu_erf, silu };

enum class ScalarKind : int { f32, bf16, f16 };

// f of a value of that type
template <typename F>
auto with_type(ScalarKind type, F&& f) {
  switch (type) {
    case ScalarKind::bf16: return f(bfloat16{});
    case ScalarKind::f16: return f(float16{});
    case ScalarKind::f32: break;
  }
  return f(float{});
}

// out = act(x @ weight.T + bias), or residual + gate * (x @ weight.T + bias). All tensors have one dtype; out [rows, n] is contiguous.
struct LinearCall {
  LeadingRows x;
  const Picture* picture;  // null; else x.data is one, channels-last, x.channel is 1, and the weight is contiguous [outputs][channels][taps]: weight_col is taps
  const void* weight;
  int64_t weight_row, weight_col;
  const void* bias;  // may be null
  int64_t bias_stride;
  Activation activation;
  LeadingRows gate, residual;  // data may be null
  void* out;
  int64_t rows, inputs, outputs;
};

// The part of the output that one task computes. Results do not depend on how the output is cut.
struct LinearBlock { int64_t row, rows, col, cols; };

constexpr int64_t kLinearRows = 1302, kLinearCols = 256;  // the largest block: more rows' sums would leave the second-level cache
constexpr int64_t kLinearManyRows = 448;  // against which packing a weight does not count

// The call on vectors, cut into blocks for all threads; and a part of it by this thread alone.
void linear_on_vectors(const LinearCall&, ScalarKind type);
void linear_part_on_vectors(const LinearCall&, LinearBlock, ScalarKind type);

FUSEWIRE_DECLARE(int64_t, linear_panel, ())    // a block's columns should be a multiple of it
FUSEWIRE_DECLARE(int64_t, linear_scratch, (int64_t rows, int64_t cols))  // floats that linear_block needs, 64-byte aligned
FUSEWIRE_DECLARE(void, linear_block, (const LinearCall&, const LinearBlock&, float* scratch, float))
FUSEWIRE_DECLARE(void, linear_block, (const LinearCall&, const LinearBlock&, float* scratch, bfloat16))
FUSEWIRE_DECLARE(void, linear_block, (const LinearCall&, const LinearBlock&, float* scratch, float16))

// The same of few rows, float32: the weight is not packed.
constexpr int64_t kLinearFewRows = 64, kLinearFewAlone = 1 << 17;  // and products below which one thread does them all
FUSEWIRE_DECLARE(int64_t, linear_few_scratch, (int64_t rows, int64_t inputs))  // floats that linear_few_block needs, 64-byte aligned
FUSEWIRE_DECLARE(void, linear_few_block, (const LinearCall&, const LinearBlock&, float* scratch))

// The same product on AMX tiles: the rows of x are packed once, by all threads, then every thread takes blocks of columns.
namespace amx {
constexpr int64_t kLinearBlock = 32;         // rows of a packed block, and what a block's columns should be a multiple of
// Rows packed at a time: their sums stay in the second-level cache, in bfloat16 beside a slice of x, else beside the weights.
constexpr int64_t linear_slab(ScalarKind type) { return type == ScalarKind::bf16 ? 512 : 1536; }
constexpr int64_t kLinearSlabBytes = 96 << 20;
int64_t linear_packed_bytes(int64_t inputs, ScalarKind type);                // of one block of rows
int64_t linear_scratch_bytes(int64_t rows, int64_t cols, ScalarKind type);   // that linear_columns needs, 64-byte aligned
// Packs rows [row, row + 32) as block `block` of `blocks`. Bit r of what it returns: row r does not split into bfloat16 parts.
uint32_t linear_pack(const LinearCall&, int64_t row, int64_t block, int64_t blocks, char* packed, ScalarKind type);
// Columns of the packed rows [row, row + rows). Bit n of what it returns: the weights of the block's n-th 32 columns do not split. `later`: what this thread
// does after it, if it has columns.
uint32_t linear_columns(const LinearCall&, const LinearBlock&, const LinearBlock& later, const char* packed, char* scratch, ScalarKind type);
}  // namespace amx

}  // namespace fusewire
