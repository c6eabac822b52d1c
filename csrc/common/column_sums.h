// Sums over the rows of a tensor (the gradients of weights and biases): the same bits for any number of threads, with the error of short sums.
//
// Rows are cut into blocks by their number alone. A block adds up groups of kGroup rows, then the groups' sums; the blocks' sums are added in
// order at the end. No addend passes through more than kGroup + rows / (kBlocks * kGroup) + kBlocks additions.
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace fusewire {

struct ColumnBlocks {
  static constexpr int64_t kGroup = 16, kBlocks = 64;
  int64_t rows, height, count;

  explicit ColumnBlocks(int64_t n) : rows(n), height((n + kBlocks - 1) / kBlocks) {
    height = height < kGroup ? kGroup : (height + kGroup - 1) / kGroup * kGroup;
    count = (n + height - 1) / height;
  }
  int64_t begin(int64_t block) const { return block * height; }
  int64_t end(int64_t block) const { return rows < (block + 1) * height ? rows : (block + 1) * height; }
};

// Columns [begin, end) of the sum of `count` rows that lie `stride` apart.
FUSEWIRE_DECLARE(void, column_totals, (const float* blocks, int64_t count, int64_t stride, int64_t begin, int64_t end, float* out))
FUSEWIRE_DECLARE(void, column_totals, (const double* blocks, int64_t count, int64_t stride, int64_t begin, int64_t end, double* out))
FUSEWIRE_DECLARE(void, column_totals, (const float* blocks, int64_t count, int64_t stride, int64_t begin, int64_t end, bfloat16* out))
FUSEWIRE_DECLARE(void, column_totals, (const float* blocks, int64_t count, int64_t stride, int64_t begin, int64_t end, float16* out))

}  // namespace fusewire
