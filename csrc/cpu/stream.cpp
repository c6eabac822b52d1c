// From how many bytes on outputs are written past the caches: fusewire::cpu_stream_from, fusewire::cpu_streamed.
#include "cpu/stream.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>

#include "common/tensor.h"

namespace fusewire {

// The last cache that this process's cores share, in bytes; 0 where nobody says. Linux first: of some processors, the C library counts the last caches of
// all their parts together.
static int64_t last_cache() {
  for (const char* path : {"/sys/devices/system/cpu/cpu0/cache/index3/size", "/sys/devices/system/cpu/cpu0/cache/index2/size"}) {
    long long kib = 0;
    if (std::FILE* file = std::fopen(path, "r")) {
      const int read = std::fscanf(file, "%lldK", &kib);
      std::fclose(file);
      if (read == 1 && kib > 0) return kib * 1024;
    }
  }
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const int64_t size = sysconf(_SC_LEVEL3_CACHE_SIZE); size > 0) return size;
#endif
  return 0;
}

static std::atomic<int64_t>& stream_from() {
  static std::atomic<int64_t> bytes{last_cache() ? last_cache() / 4 * 3 : INT64_MAX};
  return bytes;
}

static std::atomic<int64_t> streamed{0};

bool streams(int64_t bytes) {
  const bool large = bytes >= stream_from().load(std::memory_order_relaxed);
  if (large) streamed.fetch_add(1, std::memory_order_relaxed);
  return large;
}

// Sets the bound, in bytes, and returns the one before; less than 0 only asks.
static int64_t cpu_stream_from(int64_t bytes) { return bytes < 0 ? stream_from().load() : stream_from().exchange(bytes); }

// How often outputs were streamed since the library was loaded.
static int64_t cpu_streamed() { return streamed.load(); }

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CompositeExplicitAutograd, m) {
  m.impl("cpu_stream_from", TORCH_BOX(&fusewire::cpu_stream_from));
  m.impl("cpu_streamed", TORCH_BOX(&fusewire::cpu_streamed));
}
