// Rows and vectors of any strides as contiguous memory. For *_kernels.cpp.
#pragma once
#include "common/rows.h"
#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

// A vector of n elements as the compute type: in place where it already is contiguous and of that type, otherwise in `room`.
template <typename T>
FUSEWIRE_INLINE const compute_t<T>* wide_vector(const T* p, int64_t stride, int64_t n, compute_t<T>* room) {
  using C = compute_t<T>;
  if constexpr (std::is_same_v<T, C>) {
    if (stride == 1) return p;
  }
  if (stride == 1) {
    for_columns<kLanes<C>>(0, n, [&](const auto& at) __attribute__((always_inline)) { at.store(room, at.load(p)); });
  } else {
    for (int64_t i = 0; i < n; ++i) room[i] = to_float(p[i * stride]);
  }
  return room;
}

// Elements from one copied row to the next: an odd number of cache lines, so that rows that are filled side by side do not meet in the same few sets.
template <typename T>
FUSEWIRE_INLINE int64_t row_pitch(int64_t n) { return ((n * sizeof(T) + 63) / 64 | 1) * 64 / sizeof(T); }

// The rows [row, row + count) of a tensor: pointers into it where its channels are contiguous, otherwise to copies in `room` [count, pitch].
// Rows that lie side by side (pictures [B, C, H, W]) are turned channel by channel, so that every cache line is read once.
template <typename T>
FUSEWIRE_INLINE void gather_rows(const LeadingRows& x, int64_t row, int count, int64_t n, T* room, const T** rows) {
  const T* data = static_cast<const T*>(x.data);
  bool side_by_side = x.channel != 1;
  for (int r = 0; r < count; ++r) {
    rows[r] = data + x.offset(row + r);
    side_by_side &= rows[r] == rows[0] + r;
  }
  if (x.channel == 1) return;
  const int64_t pitch = row_pitch<T>(n);
  const auto copy = [&](int r, int64_t i) { room[r * pitch + i] = rows[r][i * x.channel]; };
  if (side_by_side) {
    for (int64_t i = 0; i < n; ++i)
      for (int r = 0; r < count; ++r) copy(r, i);
  } else {
    for (int r = 0; r < count; ++r)
      for (int64_t i = 0; i < n; ++i) copy(r, i);
  }
  for (int r = 0; r < count; ++r) rows[r] = room + r * pitch;
}

// The way back: rows [count, pitch] of `room` into a tensor whose channels are not contiguous.
template <typename T>
FUSEWIRE_INLINE void scatter_rows(const LeadingRows& out, int64_t row, int count, int64_t n, const T* room) {
  T* data = static_cast<T*>(const_cast<void*>(out.data));
  T* rows[64];
  for (int r = 0; r < count; ++r) rows[r] = data + out.offset(row + r);
  const int64_t pitch = row_pitch<T>(n);
  for (int64_t i = 0; i < n; ++i)
    for (int r = 0; r < count; ++r) rows[r][i * out.channel] = room[r * pitch + i];
}

}  // namespace fusewire::FUSEWIRE_ISA
