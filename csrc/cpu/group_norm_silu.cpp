// GroupNorm with SiLU on the CPU: fusewire::group_norm_silu.
#include "cpu/group_norm_silu.h"

#include <atomic>

#include "cpu/group_norm_silu_tensors.h"

namespace fusewire {

// How the installed PyTorch's group norm and silu compute, by dtype; found out by comparison (kernels/group_norm_silu/native.py).
struct Stock {
  std::atomic<StockOrder> order{StockOrder::unknown};
  std::atomic<bool> fused_offset{true};
  std::atomic<int64_t> silu_step{0};
};
static Stock& stock_of(ScalarType type) {
  static Stock stocks[4];
  return stocks[type == ScalarType::Float ? 0 : type == ScalarType::Double ? 1 : type == ScalarType::BFloat16 ? 2 : 3];
}

// A kernel over a range, at the active ISA level.
template <typename T>
using Range = void (*)(const GroupNormTask&, int64_t, int64_t, T);
template <typename T>
static void run(Range<T> kernel, const GroupNormTask& k, int64_t begin, int64_t end, int64_t elements) {
  parallel(begin, end, elements, [&](int64_t from, int64_t to) { kernel(k, from, to, T{}); });
}

// Statistics and result of [spatial, C] pictures, a few samples at a time.
template <typename T>
static void close_pictures(const GroupNormTask& k) {
  const int64_t tile = tile_of(k, sizeof(T));
  std::vector<compute_t<T>> sums(tile * k.blocks() * 2 * k.channels);
  for (int64_t first = 0; first < k.batch; first += tile) {
    const int64_t last = std::min(k.batch, first + tile);
    group_norm_statistics<T>(k, first, last, sums.data());
    run<T>(FUSEWIRE_PICK_UP_TO_AVX512(Range<T>, group_norm_pixels), k, first * k.spatial, last * k.spatial, k.channels);
  }
}

// The same in PyTorch's order of summation, which for large pictures follows its threads.
template <typename T>
static void exact_pictures(const GroupNormTask& k) {
  const int64_t pixels = k.batch * k.spatial;
  if (k.add.data) {
    const auto guess = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormTask&, int64_t, T), group_norm_guess);
    for (int64_t n = 0; n < k.batch; ++n) guess(k, n, T{});
    run<T>(FUSEWIRE_PICK_UP_TO_AVX512(Range<T>, group_norm_add), k, 0, pixels, k.channels);
  }
  if (k.spatial < 1024) {
    run<T>(FUSEWIRE_PICK_UP_TO_AVX512(Range<T>, group_norm_small), k, 0, k.batch * k.groups, k.group_channels() * k.spatial);
  } else {
    const auto thread_sums = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormTask&, int64_t, int64_t, void*, T), group_norm_thread_sums);
    const auto finish = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const GroupNormTask&, const void*, int64_t, T), group_norm_large);
    const int64_t threads = torch::stable::get_num_threads(), each = k.batch * 2 * k.channels;
    std::vector<compute_t<T>> sums(threads * each);
    torch::stable::parallel_for(0, pixels, 1, [&](int64_t begin, int64_t end) {
      uint32_t thread;
      TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
      thread_sums(k, begin, end, sums.data() + thread * each, T{});
    });
    finish(k, sums.data(), threads, T{});
  }
  run<T>(FUSEWIRE_PICK_UP_TO_AVX512(Range<T>, group_norm_exact_pixels), k, 0, pixels, k.channels);
}

static Tensor group_norm_silu(const Tensor& given, int64_t groups, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                              const std::optional<Tensor>& shift, const std::optional<Tensor>& scale, const std::optional<Tensor>& add, bool silu,
                              bool exact) {
  const Picture picture(given);
  Tensor out = picture.empty();
  GroupNormTask k = group_norm_task(picture, groups, weight, bias, eps, shift, scale, add, silu);
  if (k.batch * k.sample() == 0) return out;
  k.out = out.mutable_data_ptr();
  k.exact = exact;
  if (exact) {
    Stock& stock = stock_of(given.scalar_type());
    k.order = stock.order, k.fused_offset = stock.fused_offset, k.silu_step = stock.silu_step;
    STD_TORCH_CHECK(k.order != StockOrder::unknown, "fusewire: exact group_norm_silu was called before PyTorch's order of summation was known");
    // As at::parallel_for splits an elementwise kernel over the output
    const int64_t total = k.batch * k.sample(), grain = 32768;
    const int64_t threads = total > grain ? std::min<int64_t>(torch::stable::get_num_threads(), (total + grain - 1) / grain) : 1;
    k.silu_chunk = (total + threads - 1) / threads;
  }
  FUSEWIRE_SWITCH_FLOATS(given.scalar_type(), "group_norm_silu", {
    if (!k.channels_last) {
      const auto planes = exact ? FUSEWIRE_PICK_UP_TO_AVX512(Range<scalar_t>, group_norm_exact_planes) : FUSEWIRE_PICK_UP_TO_AVX512(Range<scalar_t>, group_norm_planes);
      run<scalar_t>(planes, k, 0, k.batch * k.groups, k.group_channels() * k.spatial);
    } else {
      std::vector<compute_t<scalar_t>> stats(k.batch * kGroupNormRows * k.channels);
      k.stats = stats.data();
      exact ? exact_pictures<scalar_t>(k) : close_pictures<scalar_t>(k);
    }
  });
  return out;
}

// What exact calls on x's dtype follow from now on.
static void cpu_group_norm_order(const Tensor& x, int64_t order, bool fused_offset, int64_t silu_step) {
  Stock& stock = stock_of(x.scalar_type());
  stock.order = static_cast<StockOrder>(order), stock.fused_offset = fused_offset, stock.silu_step = silu_step;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&fusewire::group_norm_silu));
  m.impl("cpu_group_norm_order", TORCH_BOX(&fusewire::cpu_group_norm_order));
}
