// Adding rows up block by block, as column_sums.h describes. For *_kernels.cpp.
#pragma once
#include <type_traits>

#include "common/column_sums.h"
#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

// Calls rows(i, K) for the rows of a block, K = Side rows at a time and then one by one. `rows` adds to `group`, n sums that begin at zero; each group's
// sums are added to `sums`, which may be null where none are wanted.
template <int Side, typename C, typename Rows>
FUSEWIRE_INLINE void for_block(const ColumnBlocks& blocks, int64_t block, int64_t n, C* group, C* sums, const Rows& rows) {
  constexpr int N = kLanes<C>;
  if (sums) std::memset(sums, 0, n * sizeof(C));
  for (int64_t i = blocks.begin(block), end = blocks.end(block); i < end;) {
    const int64_t last = i + ColumnBlocks::kGroup < end ? i + ColumnBlocks::kGroup : end;
    for (; i + Side <= last; i += Side) rows(i, std::integral_constant<int, Side>{});
    for (; i < last; ++i) rows(i, std::integral_constant<int, 1>{});
    if (!sums) continue;
    for_columns<N>(0, n, [&](const auto& at) __attribute__((always_inline)) {
      at.store(sums, at.load(sums) + at.load(group));
      at.store(group, lanes<C, N>{});
    });
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
