// How the installed PyTorch sums a row on this processor: it decides the last bits of every reduction, so `exact` follows it.
#pragma once

namespace fusewire {

// portable: PyTorch's kernels without vector instructions. fused: its AVX2 kernels (which also serve on AVX-512 machines), with fused
// multiply-adds. fused_plain_tail: the same, but the compiler that built PyTorch left the row's tail unfused. Vectors are 32 bytes wide in all.
enum class StockOrder : int { unknown = -1, portable = 0, fused = 1, fused_plain_tail = 2 };

}  // namespace fusewire
