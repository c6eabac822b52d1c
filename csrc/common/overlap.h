// Whether two strided tensors share elements.
#pragma once
#include <cstdint>

namespace fusewire {

// Elements of one tensor: its first, and for each dimension the stride (in elements, not negative) and the size (at least 1).
struct Footprint {
  const void* data;
  const int64_t* stride;
  const int64_t* size;
};

// Whether `distance` is a sum of multiples of the strides, each from -below to above times. `left`: what the dimensions from `dim` on can add up to.
inline bool reaches(int64_t distance, int dim, int dims, const int64_t* stride, const int64_t* below, const int64_t* above, int64_t left) {
  if (dim == dims) return distance == 0;
  const int64_t s = stride[dim];
  if (s == 0) return reaches(distance, dim + 1, dims, stride, below, above, left);
  const int64_t span = s * (below[dim] > above[dim] ? below[dim] : above[dim]);
  left -= span;
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  int64_t first = -floor_div(left - distance, s), last = floor_div(distance + left, s);  // what is left over is within reach of the others
  if (first < -below[dim]) first = -below[dim];
  if (last > above[dim]) last = above[dim];
  for (int64_t i = first; i <= last; ++i) {
    if (reaches(distance - i * s, dim + 1, dims, stride, below, above, left)) return true;
  }
  return false;
}

// For tensors of the same strides. Of others with elements between each other's it is not said: false.
template <int kDims>
bool overlap(const Footprint& a, const Footprint& b, int64_t bytes) {
  const char *p = static_cast<const char*>(a.data), *q = static_cast<const char*>(b.data);
  int64_t a_span = 1, b_span = 1, left = 0, stride[kDims], below[kDims], above[kDims];
  bool same = true;
  for (int d = 0; d < kDims; ++d) {
    a_span += (a.size[d] - 1) * a.stride[d];
    b_span += (b.size[d] - 1) * b.stride[d];
    same = same && (a.stride[d] == b.stride[d] || (a.size[d] == 1 && b.size[d] == 1));
  }
  if (p + a_span * bytes <= q || q + b_span * bytes <= p) return false;
  if (!same) return p == q;
  if ((q - p) % bytes != 0) return true;
  for (int d = 0; d < kDims; ++d) {  // widest stride first, so that few multiples are left to try
    int at = d;
    for (; at > 0 && stride[at - 1] < b.stride[d]; --at) stride[at] = stride[at - 1], below[at] = below[at - 1], above[at] = above[at - 1];
    stride[at] = b.stride[d], below[at] = b.size[d] - 1, above[at] = a.size[d] - 1;
  }
  for (int d = 0; d < kDims; ++d) left += stride[d] * (below[d] > above[d] ? below[d] : above[d]);
  return reaches((q - p) / bytes, 0, kDims, stride, below, above, left);
}

}  // namespace fusewire
