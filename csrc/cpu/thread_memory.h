// Working memory of the linears and convolutions, which a thread keeps for its next task: allocated per task it would cost a page fault for every 4 KiB.
// For files that are compiled once.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensor.h"
#include "cpu/scratch.h"

namespace fusewire {

class ThreadMemory {
 public:
  char* take(int64_t bytes) {
    if (size_ < bytes) {
      data_.reset();
      size_ = 0;
      const int64_t page = bytes < kHugePage ? 64 : kHugePage, whole = (bytes + page - 1) / page * page;
      data_.reset(static_cast<char*>(std::aligned_alloc(page, whole)));
      STD_TORCH_CHECK(data_, "linear: out of memory");
#if defined(__linux__)
      if (page == kHugePage) madvise(data_.get(), whole, MADV_HUGEPAGE);  // thousands of small pages would not fit the page tables' cache
#endif
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  static constexpr int64_t kHugePage = 2 << 20;
  struct Free { void operator()(char* p) const { std::free(p); } };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

// Of one task.
inline char* linear_memory(int64_t bytes) {
  thread_local ThreadMemory memory;
  count_scratch(Scratch::linear, bytes);
  return memory.take(bytes);
}

// Of one call, by the thread that makes it: operands that are packed for all threads.
inline char* packed_memory(int64_t bytes) {
  thread_local ThreadMemory memory;
  count_scratch(Scratch::packed_rows, bytes);
  return memory.take(bytes);
}

}  // namespace fusewire
