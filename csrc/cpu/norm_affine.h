// A norm's weight or bias as the kernels take it. For *_kernels.cpp.
#pragma once
#include "common/row_access.h"
#include "cpu/norm.h"

namespace fusewire::FUSEWIRE_ISA {

// [n] in the compute type of T: in place where it lies so, otherwise in `room`; null where there is none.
template <typename T>
const compute_t<T>* affine_vector(const Affine& a, int64_t n, compute_t<T>* room) {
  if (!a.data) return nullptr;
  if (!a.wide) return wide_vector(static_cast<const T*>(a.data), a.stride, n, room);
  const float* p = static_cast<const float*>(a.data);
  for (int64_t i = 0; i < n; ++i) room[i] = p[i * a.stride];
  return room;
}

}  // namespace fusewire::FUSEWIRE_ISA
