// The count of working memory: fusewire::cpu_scratch.
#include "cpu/scratch.h"

#include <atomic>

#include "common/tensor.h"

namespace fusewire {

static std::atomic<int64_t> most[3];

void count_scratch(Scratch piece, int64_t bytes) {
  std::atomic<int64_t>& of = most[static_cast<int>(piece)];
  int64_t before = of.load(std::memory_order_relaxed);
  while (before < bytes && !of.compare_exchange_weak(before, bytes, std::memory_order_relaxed)) {
  }
}

// Bytes that were needed since the count last began anew, which `reset` makes it do: the most that one thread asked for, on every thread, since which of
// them take part in a call is chance.
static int64_t cpu_scratch(bool reset) {
  int64_t found[3];
  for (int i = 0; i < 3; ++i) found[i] = reset ? most[i].exchange(0, std::memory_order_relaxed) : most[i].load(std::memory_order_relaxed);
  return (found[0] + found[1]) * torch::stable::get_num_threads() + found[2];
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CompositeExplicitAutograd, m) { m.impl("cpu_scratch", TORCH_BOX(&fusewire::cpu_scratch)); }
