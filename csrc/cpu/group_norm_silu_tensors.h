// What group_norm_silu.cpp and group_norm_silu_backward.cpp share: pictures, their tasks, and the statistics of [spatial, C] ones.
#pragma once
#include <algorithm>
#include <vector>

#include "common/empty.h"
#include "cpu/group_norm_silu.h"

namespace fusewire {

// Calls body(begin, end) over parts of [begin, end), in threads where each has enough of `elements` per step.
template <typename F>
inline void parallel(int64_t begin, int64_t end, int64_t elements, const F& body) {
  const int64_t grain = 1 + 32768 / (elements + 1);
  if (end - begin <= grain) return body(begin, end);
  torch::stable::parallel_for(begin, end, grain, body);
}

// Whether PyTorch takes x [B, C, H, W] or [B, C, D, H, W] for channels-last: its c10::MemoryFormat suggestion, which looks at strides alone.
inline bool suggests_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  if ((dims != 4 && dims != 5) || x.stride(1) == 0) return false;
  int64_t least = 0;
  const auto larger = [&](int64_t d) {
    if (x.size(d) == 0 || x.stride(d) < least) return false;
    if (d == 0 && least == x.stride(1)) return false;  // [B, 1, 1, W] and the like could be either
    least = x.stride(d) * (x.size(d) > 1 ? x.size(d) : 1);
    return true;
  };
  if (!larger(1)) return false;
  for (int64_t d = dims - 1; d >= 2; --d) {
    if (!larger(d)) return false;
  }
  return larger(0);
}

// A picture [B, C, ...] whose samples are dense in its memory format; one that is not so is copied.
struct Picture {
  bool channels_last;
  Tensor x;

  explicit Picture(const Tensor& given) : Picture(given, suggests_channels_last(given)) {}
  Picture(const Tensor& given, bool last) : channels_last(last), x(dense(given, last) ? given : copied(given, last)) {}

  int64_t spatial() const {
    int64_t count = 1;
    for (int64_t d = 2; d < x.dim(); ++d) count *= x.size(d);
    return count;
  }
  int64_t batch_stride() const { return x.size(0) > 1 ? x.stride(0) : 0; }

  // A new tensor of its shape, dtype and memory format.
  Tensor empty() const {
    int64_t sizes[5], strides[5];
    for (int64_t d = 0; d < x.dim(); ++d) sizes[d] = x.size(d);
    fill_strides(x, channels_last, strides);
    return empty_strided(x.dim(), sizes, strides, x);
  }

 private:
  static void fill_strides(const Tensor& x, bool last, int64_t* strides) {
    const int64_t dims = x.dim();
    int64_t total = 1;
    const auto next = [&](int64_t d) { strides[d] = total, total *= x.size(d) > 1 ? x.size(d) : 1; };
    if (last) next(1);
    for (int64_t d = dims - 1; d >= 2; --d) next(d);
    if (!last) next(1);
    next(0);
  }
  static bool dense(const Tensor& x, bool last) {
    int64_t strides[5];
    fill_strides(x, last, strides);
    for (int64_t d = 1; d < x.dim(); ++d) {
      if (x.size(d) > 1 && x.stride(d) != strides[d]) return false;
    }
    return true;
  }
  static Tensor copied(const Tensor& x, bool last) {
    using torch::headeronly::MemoryFormat;
    return torch::stable::contiguous(x, !last ? MemoryFormat::Contiguous : x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
  }
};

// [B, C] or [B, C, 1, ...] as rows over samples and channels; [C] alike for all samples.
inline Rows group_norm_parameter(const std::optional<Tensor>& p) {
  if (!p) return {};
  return p->dim() == 1 ? Rows{p->const_data_ptr(), 0, 0, p->stride(0)} : Rows{p->const_data_ptr(), p->stride(0), 0, p->stride(1)};
}

inline GroupNormTask group_norm_task(const Picture& picture, int64_t groups, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                     double eps, const std::optional<Tensor>& shift, const std::optional<Tensor>& scale,
                                     const std::optional<Tensor>& add, bool silu) {
  GroupNormTask k{};
  k.batch = picture.x.size(0), k.channels = picture.x.size(1), k.spatial = picture.spatial(), k.groups = groups;
  k.channels_last = picture.channels_last;
  k.x = picture.x.const_data_ptr(), k.x_batch = picture.batch_stride();
  k.weight = group_norm_parameter(weight), k.bias = group_norm_parameter(bias);
  k.shift = group_norm_parameter(shift), k.scale = group_norm_parameter(scale), k.add = group_norm_parameter(add);
  k.eps = eps, k.silu = silu;
  return k;
}

// Samples that are worked on together, so that a second reading finds them in the cache.
inline int64_t tile_of(const GroupNormTask& k, int64_t itemsize) {
  return std::min(k.batch, std::max<int64_t>(1, (2 << 20) / (k.sample() * itemsize)));
}

// Calls body(n, begin, end) over the blocks of samples [first, last).
template <typename F>
inline void over_blocks(const GroupNormTask& k, int64_t first, int64_t last, const F& body) {
  const int64_t blocks = k.blocks();
  parallel(first * blocks, last * blocks, kPixelBlock * k.channels, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / blocks, next = std::min(end, (n + 1) * blocks);
      body(n, begin - n * blocks, next - n * blocks);
      begin = next;
    }
  });
}

// close: the coefficients of samples [first, last) of a [spatial, C] picture. `sums` has room for 2 * C for each of their blocks.
template <typename T>
void group_norm_statistics(const GroupNormTask& k, int64_t first, int64_t last, compute_t<T>* sums) {
  const auto guess = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormTask&, int64_t, T), group_norm_guess);
  const auto block_sums = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormTask&, int64_t, int64_t, int64_t, void*, T), group_norm_block_sums);
  const auto finish = FUSEWIRE_PICK_UP_TO_AVX512(bool (*)(const GroupNormTask&, int64_t, const void*, bool, T), group_norm_finish);
  const int64_t sample = k.blocks() * 2 * k.channels;
  const auto sum = [&](int64_t from, int64_t to) {
    over_blocks(k, from, to, [&](int64_t n, int64_t begin, int64_t end) { block_sums(k, n, begin, end, sums + (n - first) * sample, T{}); });
  };
  for (int64_t n = first; n < last; ++n) guess(k, n, T{});
  sum(first, last);
  for (int64_t n = first; n < last; ++n) {
    if (finish(k, n, sums + (n - first) * sample, false, T{})) continue;
    sum(n, n + 1);
    finish(k, n, sums + (n - first) * sample, true, T{});
  }
}

}  // namespace fusewire
