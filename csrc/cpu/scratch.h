// How much working memory the kernels need. Each thread keeps its own until it ends; it is the C library's, which PyTorch's allocator does not see.
#pragma once
#include <cstdint>

namespace fusewire {

enum class Scratch : int { linear, attention, packed_rows };  // the last: of the thread that calls, not of each

// To be told of what is asked for. Not inline: the kernels are compiled at several ISA levels, and the linker keeps one definition for all.
void count_scratch(Scratch piece, int64_t bytes);

}  // namespace fusewire
