// Convolutions on AMX tiles: what convolution.cpp (tensors, threads) hands to amx_convolution.cpp (tiles).
#pragma once
#include <cstdint>

#include "cpu/linear.h"

namespace fusewire::amx {

// Rows [row, row + rows) of the results of samples [sample, sample + samples). Their pixels are packed for all threads.
struct ConvolutionBand { int64_t sample, samples, row, rows; };
// What one thread computes of it: blocks [block, end) of 32 pixels, of one sample after another, panels [panel, panel_end) of 32 outputs, whose weights it packs.
struct ConvolutionTask { int64_t block, end, panel, panel_end; };

constexpr int64_t kConvolutionBlock = 32;
constexpr int64_t kConvolutionBandBytes = 32 << 20;  // of packed pixels: a band is as high as they allow
constexpr int64_t kConvolutionPanels = 4;            // the most of a task: the more, the less often pixels come from the last cache

bool convolution_serves(const LinearCall&);  // strides of 1, as many channels as fill a tile
int64_t convolution_pixel_bytes(const LinearCall&, int64_t rows, ScalarKind type);  // of a sample of a band of so many rows
int64_t convolution_blocks(const LinearCall&, int64_t rows);                        // of its pixels
int64_t convolution_packed_rows(const LinearCall&, int64_t rows);                   // that it sees
int64_t convolution_most_blocks(const LinearCall&, int64_t panels, ScalarKind type);  // of a task of so many panels: its sums stay in the second-level cache
int64_t convolution_scratch_bytes(const LinearCall&, int64_t blocks, int64_t panels, ScalarKind type);  // of a task, 64-byte aligned
// Row `row` of what the band sees of its `sample`-th sample. Whether all of its pixels split into bfloat16 parts.
bool convolution_pack_row(const LinearCall&, const ConvolutionBand&, int64_t sample, int64_t row, char* packed, ScalarKind type);
// Bit n of what it returns: the weights of the task's n-th panel do not split.
uint32_t convolution_multiply(const LinearCall&, const ConvolutionBand&, const ConvolutionTask&, const char* pixels, char* scratch, ScalarKind type);

}  // namespace fusewire::amx
