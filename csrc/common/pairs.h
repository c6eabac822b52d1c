// Vectors of pairs, as a rotary embedding turns them. For *_kernels.cpp.
#pragma once
#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

// (v[1], v[0], v[3], v[2], ...)
template <int N, typename C>
FUSEWIRE_INLINE lanes<C, N> swap_pairs(lanes<C, N> v) {
  if constexpr (sizeof(C) == 4) {
    const auto pairs = bits_as<lanes<uint64_t, N / 2>>(v);
    return bits_as<lanes<C, N>>((pairs << 32) | (pairs >> 32));
  } else {
    lanes<C, N> y;
    for (int i = 0; i < N; ++i) y[i] = v[i ^ 1];
    return y;
  }
}

}  // namespace fusewire::FUSEWIRE_ISA
