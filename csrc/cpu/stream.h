// Stores past the caches, for outputs that do not fit the last one: an ordinary store first reads the line that it overwrites, and pushes out what is
// still wanted.
#pragma once
#include <cstdint>

namespace fusewire {

constexpr int64_t kLine = 64;
inline bool on_lines(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }

// Whether outputs of so many bytes together are written past the caches: from three quarters of the last cache on, as glibc's memcpy does. To be asked
// last, of outputs that can be: it counts them.
bool streams(int64_t bytes);

}  // namespace fusewire
