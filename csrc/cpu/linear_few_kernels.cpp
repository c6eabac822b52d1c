// Linear layers of a few rows of float32 (the modulation that a conditioning vector gives): the weight is read once, as it lies.
//
// An element is a dot product: one vector of partial sums, elements [i, i + kLanes) at a time, added up at the end. Its order does not depend on how
// many rows there are. Tiles of kFewTile rows and kFewOutputs outputs share what they read.
#include "cpu/linear.h"

#include <algorithm>

#include "common/moments.h"
#include "cpu/linear_epilogue.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int kFewLanes = kLanes<float>, kFewTile = kFewLanes == 16 ? 4 : 2, kFewOutputs = 4;  // what the registers hold

// sums[r][o] = x[r] . weight[o], over `count` elements
template <int rows, int outputs>
static void dots(const float* x, int64_t pitch, const float* weight, int64_t stride, int64_t count, float* sums, int64_t width) {
  using V = lanes<float, kFewLanes>;
  V sum[rows][outputs]{};
  for_columns<kFewLanes>(0, count, [&](const auto& at) __attribute__((always_inline)) {
    V w[outputs];
    for (int o = 0; o < outputs; ++o) w[o] = at.load(weight + o * stride);
    for (int r = 0; r < rows; ++r) {
      const V a = at.load(x + r * pitch);
      for (int o = 0; o < outputs; ++o) sum[r][o] = fma<kFewLanes, float>(a, w[o], sum[r][o]);
    }
  });
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outputs; ++o) sums[r * width + o] = sum_of_lanes<kFewLanes, float>(sum[r][o]);
  }
}

template <int rows>
static void row_tile(const LinearCall& c, const LinearBlock& b, const float* x, float* room, float* sums) {
  for (int64_t n = 0, here; n < b.cols; n += here) {
    here = n + kFewOutputs <= b.cols ? kFewOutputs : 1;
    const float* weight = static_cast<const float*>(c.weight) + (b.col + n) * c.weight_row;
    int64_t stride = c.weight_row;
    if (c.weight_col != 1) {
      for (int64_t o = 0; o < here; ++o)
        for (int64_t i = 0; i < c.inputs; ++i) room[o * c.inputs + i] = weight[o * c.weight_row + i * c.weight_col];
      weight = room, stride = c.inputs;
    }
    (here > 1 ? dots<rows, kFewOutputs> : dots<rows, 1>)(x, c.inputs, weight, stride, c.inputs, sums + n, kLinearCols);
  }
}

int64_t linear_few_scratch(int64_t rows, int64_t inputs) { return rows * kLinearCols + (rows + kFewOutputs) * inputs; }

void linear_few_block(const LinearCall& c, const LinearBlock& b, float* scratch) {
  float* const sums = scratch;                      // [rows][kLinearCols]
  float* const rows = sums + b.rows * kLinearCols;  // [rows][inputs]
  float* const room = rows + b.rows * c.inputs;     // [kFewOutputs][inputs]
  const float* const x = static_cast<const float*>(c.x.data);
  Epilogue<float> epilogue(c, b.col, b.cols);
  for (int64_t r = 0; r < b.rows; ++r) {
    const float* from = x + c.x.offset(b.row + r);
    for (int64_t i = 0; i < c.inputs; ++i) rows[r * c.inputs + i] = from[i * c.x.channel];
  }
  int64_t r = 0;
  for (; r + kFewTile <= b.rows; r += kFewTile) row_tile<kFewTile>(c, b, rows + r * c.inputs, room, sums + r * kLinearCols);
  for (; r < b.rows; ++r) row_tile<1>(c, b, rows + r * c.inputs, room, sums + r * kLinearCols);
  epilogue.rows(b.row, b.rows, sums, kLinearCols);
}

}  // namespace fusewire::FUSEWIRE_ISA
