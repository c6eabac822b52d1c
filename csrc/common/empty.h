// New CPU tensors without a trip through the dispatcher, which takes twice as long.
#pragma once
#include "common/tensor.h"

namespace fusewire {

// Contiguous, of x's shape and dtype.
inline Tensor empty_contiguous(const Tensor& x) {
  int64_t sizes[64], strides[64], total = 1;  // PyTorch's own limit
  const int64_t dims = x.dim();
  for (int64_t i = dims; i-- > 0;) {
    sizes[i] = x.size(i);
    strides[i] = total;
    total *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace fusewire
