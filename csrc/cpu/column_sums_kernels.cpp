// Sums over rows: the last step, compiled once per ISA level.
#include "common/column_sums.h"

#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

template <typename T>
static void totals(const compute_t<T>* blocks, int64_t count, int64_t stride, int64_t begin, int64_t end, T* out) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  for_columns<N>(begin, end, [&](const auto& at) __attribute__((always_inline)) {
    lanes<C, N> sum{};
    for (int64_t i = 0; i < count; ++i) sum += at.load(blocks + i * stride);
    at.store(out, sum);
  });
}

#define FUSEWIRE_COLUMN_TOTALS(T)                                                                                                          \
  void column_totals(const compute_t<T>* blocks, int64_t count, int64_t stride, int64_t begin, int64_t end, T* out) {                      \
    totals<T>(blocks, count, stride, begin, end, out);                                                                                     \
  }
FUSEWIRE_COLUMN_TOTALS(float)
FUSEWIRE_COLUMN_TOTALS(double)
FUSEWIRE_COLUMN_TOTALS(bfloat16)
FUSEWIRE_COLUMN_TOTALS(float16)

}  // namespace fusewire::FUSEWIRE_ISA
