// Memory for the sums of blocks of rows, and their totals as new tensors. For op files.
#pragma once
#include <memory>

#include "common/column_sums.h"
#include "common/empty.h"

namespace fusewire {

// `kinds` rows of `columns` sums for each of `blocks` blocks, in the compute type of x.
class ColumnSums {
 public:
  ColumnSums(int64_t blocks, int64_t kinds, int64_t columns, const Tensor& x)
      : blocks_(blocks), kinds_(kinds), columns_(columns), x_(x), memory_(new double[wide() ? elements() : (elements() + 1) / 2]) {}
  void* data() const { return memory_.get(); }

  // The sum over all blocks of one kind, [columns] in x's dtype.
  Tensor total(int64_t kind) const {
    const Tensor out = empty_vector(columns_, x_);
    totals(kind, 1, out.mutable_data_ptr());
    return out;
  }

  // The sums of one kind over the blocks of each of `samples` equal shares of all blocks, into `out` [samples, columns] of x's dtype.
  void totals(int64_t kind, int64_t samples, void* out) const {
    const int64_t share = samples ? blocks_ / samples : 0, stride = kinds_ * columns_;
    FUSEWIRE_SWITCH_FLOATS(x_.scalar_type(), "column sums", {
      using wide_t = compute_t<scalar_t>;
      const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const wide_t*, int64_t, int64_t, int64_t, int64_t, scalar_t*), column_totals);
      const wide_t* from = reinterpret_cast<const wide_t*>(memory_.get()) + kind * columns_;
      scalar_t* to = static_cast<scalar_t*>(out);
      torch::stable::parallel_for(0, samples * columns_, 1 + 65536 / (1 + share), [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t sample = begin / columns_, first = sample * columns_, last = end < first + columns_ ? end : first + columns_;
          run(from + sample * share * stride, share, stride, begin - first, last - first, to + first);
          begin = last;
        }
      });
    });
  }

 private:
  bool wide() const { return x_.scalar_type() == ScalarType::Double; }
  int64_t elements() const { return blocks_ * kinds_ * columns_; }
  int64_t blocks_, kinds_, columns_;
  const Tensor& x_;
  std::unique_ptr<double[]> memory_;
};

}  // namespace fusewire
