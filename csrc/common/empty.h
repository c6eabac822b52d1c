// New CPU tensors without a trip through the dispatcher, which takes twice as long.
#pragma once
#include "common/tensor.h"

namespace fusewire {

inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, const Tensor& like) {
  int32_t dtype;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Contiguous, of x's shape and dtype, but for the size of the last dimension where it is given.
inline Tensor empty_contiguous(const Tensor& x, int64_t last = -1) {
  int64_t sizes[64], strides[64], total = 1;  // PyTorch's own limit
  const int64_t dims = x.dim();
  for (int64_t i = dims; i-- > 0;) {
    sizes[i] = last >= 0 && i + 1 == dims ? last : x.size(i);
    strides[i] = total;
    total *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(dims, sizes, strides, x);
}

// [n], of the dtype of `like`.
inline Tensor empty_vector(int64_t n, const Tensor& like) {
  const int64_t stride = 1;
  return empty_strided(1, &n, &stride, like);
}

}  // namespace fusewire
