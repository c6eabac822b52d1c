// Linear layers: one block of the output, compiled once per ISA level.
//
// The weight is packed into slices of kDepth units, panels [unit][2 vectors of outputs]; the rows of x are copied beside each other (and
// widened to float); tiles of kTileRows x 2 vectors are accumulated in registers over kDepth units, then added to the float block.
// So a sum of many terms is a sum of partial sums, and every element is summed in one order, whatever the shapes, strides and threads.
#include "cpu/linear.h"

#include <algorithm>
#include <type_traits>

#include "cpu/linear_epilogue.h"
#include "cpu/linear_simd.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int kPanel = 2 * kLanes;
constexpr int64_t kDepth = 256;
constexpr int64_t kGroup = 252;  // rows whose sums stay in the second-level cache, beside a slice of the packed weight; 18 or 42 tiles
constexpr int64_t kAhead = 8;     // units of a panel that are fetched before they are multiplied
constexpr int64_t kStride = kDepth + 16;  // of the copied rows; an odd number of cache lines, so that they spread over the cache's sets

template <typename T>
constexpr bool paired =
#if defined(__AVX512BF16__)
    std::is_same_v<T, bfloat16>;
#else
    false;
#endif

template <bool pairs>
inline Units step(Units a, Units b, Units sum) {
#if defined(__AVX512BF16__)
  if constexpr (pairs) return multiply_add_pairs(a, b, sum);
#endif
  return multiply_add(a, b, sum);
}

// block[rows][kPanel] (+)= a[rows][depth] * b[depth][kPanel]
template <int rows, bool pairs>
static void tile(const float* a, const float* b, int64_t depth, float* block, int64_t stride, bool first) {
  Units sum[rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    sum[r][0] = sum[r][1] = zero();
    __builtin_prefetch(block + r * stride, 1);
    __builtin_prefetch(block + r * stride + kLanes, 1);
  }
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    __builtin_prefetch(b + kAhead * kPanel);
    __builtin_prefetch(b + kAhead * kPanel + kLanes);
    const Units b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Units x = broadcast(a + r * kStride + k);
      sum[r][0] = step<pairs>(x, b0, sum[r][0]);
      sum[r][1] = step<pairs>(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r, block += stride) {
    store(block, first ? sum[r][0] : add(load(block), sum[r][0]));
    store(block + kLanes, first ? sum[r][1] : add(load(block + kLanes), sum[r][1]));
  }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, bool);
template <bool pairs, int rows = kTileRows>
static Tile tile_of(int64_t wanted) {
  if constexpr (rows > 1) {
    if (wanted < rows) return tile_of<pairs, rows - 1>(wanted);
  }
  return &tile<rows, pairs>;
}

// Elements [0, count) of a row as units; a lone last element of a pair is paired with 0.
template <typename T>
static void copy_row(const T* x, int64_t stride, int64_t count, float* out) {
  if constexpr (paired<T>) {
    T* to = reinterpret_cast<T*>(out);
    if (stride == 1)
      std::memcpy(to, x, count * sizeof(T));
    else
      for (int64_t i = 0; i < count; ++i) to[i] = x[i * stride];
    if (count % 2) to[count].bits = 0;
  } else if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i * stride]);
  }
}

// Rows [0, rows) of the weight, elements [0, count) of each, to panel[unit][kPanel]; rows beyond are 0.
template <typename T>
static void pack(const T* weight, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t count, float* panel) {
  constexpr int64_t unit = paired<T> ? 2 : 1;
  const int64_t units = (count + unit - 1) / unit;
  for (int64_t n = 0; n < kPanel; n += kLanes) {
    for (int64_t k = 0; k < units; k += kLanes) {
      const int64_t here = std::min<int64_t>(kLanes, units - k);
      Units block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        alignas(64) float row[kLanes] = {};
        const T* from = weight + (n + r) * row_stride + k * unit * col_stride;
        if (n + r < rows) {
          if (col_stride == 1) __builtin_prefetch(from + 2 * kLanes * unit);  // many rows at a time: no prefetcher follows
          if ((std::is_same_v<T, float> || paired<T>) && col_stride == 1 && (k + kLanes) * unit <= count) {
            block[r] = load(reinterpret_cast<const float*>(from));
            continue;
          }
          copy_row(from, col_stride, std::min(kLanes * unit, count - k * unit), row);
        }
        block[r] = load(row);
      }
      transpose(block);
      for (int64_t i = 0; i < here; ++i) store(panel + (k + i) * kPanel + n, block[i]);
    }
  }
}

template <typename T>
static void block(const LinearCall& c, const LinearBlock& b, float* scratch) {
  constexpr int64_t unit = paired<T> ? 2 : 1, depth = kDepth * unit;
  const int64_t slices = (c.inputs + depth - 1) / depth, slice = (b.cols + kPanel - 1) / kPanel * kPanel * kDepth;
  float* const sums = scratch;                           // [kGroup][kLinearCols]
  float* const rows = sums + kGroup * kLinearCols;       // [kTileRows][kStride]
  float* const panels = rows + kTileRows * kStride;      // [slices][cols / kPanel][kDepth][kPanel]
  const T* weight = static_cast<const T*>(c.weight) + b.col * c.weight_row;
  const T* x = static_cast<const T*>(c.x.data);
  Epilogue<T> epilogue(c, b.col, b.cols);
  for (int64_t n = 0; n < b.cols; n += kPanel)
    for (int64_t s = 0; s < slices; ++s)
      pack(weight + n * c.weight_row + s * depth * c.weight_col, c.weight_row, c.weight_col, b.cols - n, std::min(depth, c.inputs - s * depth),
           panels + s * slice + n * kDepth);
  const int64_t groups = (b.rows + kGroup - 1) / kGroup, tiles = (b.rows + groups * kTileRows - 1) / (groups * kTileRows) * groups;
  for (int64_t i = 0; i < groups * slices; ++i) {
    const int64_t group = i / slices, s = i % slices, k = s * depth, count = std::min(depth, c.inputs - k), units = (count + unit - 1) / unit;
    const int64_t top = group * (tiles / groups) * b.rows / tiles;  // the group's first row
    for (int64_t t = group * (tiles / groups); t < (group + 1) * (tiles / groups); ++t) {
      const int64_t begin = t * b.rows / tiles, end = (t + 1) * b.rows / tiles;  // tiles as equal as can be
      if (begin == end) continue;
      for (int64_t r = begin; r < end; ++r)
        copy_row(x + c.x.offset(b.row + r) + k * c.x.channel, c.x.channel, count, rows + (r - begin) * kStride);
      const Tile multiply = tile_of<paired<T>>(end - begin);
      const int64_t next = t + 1 < (group + 1) * (tiles / groups) ? std::min(end + kTileRows, b.rows) : end;
      for (int64_t n = 0; n < b.cols; n += kPanel) {
        // A share of the rows that are copied next, while these are multiplied
        const int64_t from = end + (next - end) * n / b.cols, to = end + (next - end) * std::min(n + kPanel, b.cols) / b.cols;
        for (int64_t r = from; r < to && c.x.channel == 1; ++r) {
          const char* line = reinterpret_cast<const char*>(x + c.x.offset(b.row + r) + k);
          for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(line + at);
        }
        multiply(rows, panels + s * slice + n * kDepth, units, sums + (begin - top) * kLinearCols + n, kLinearCols, s == 0);
      }
      if (s + 1 < slices) continue;
      for (int64_t r = begin; r < end; ++r) epilogue.row(b.row + r, sums + (r - top) * kLinearCols);
    }
  }
}

int64_t linear_panel() { return kPanel; }
int64_t linear_scratch(int64_t inputs, int64_t cols) {
  return kGroup * kLinearCols + kTileRows * kStride + (inputs + kDepth - 1) / kDepth * kDepth * ((cols + kPanel - 1) / kPanel * kPanel);
}
void linear_block(const LinearCall& c, const LinearBlock& b, float* scratch, float) { block<float>(c, b, scratch); }
void linear_block(const LinearCall& c, const LinearBlock& b, float* scratch, bfloat16) { block<bfloat16>(c, b, scratch); }
void linear_block(const LinearCall& c, const LinearBlock& b, float* scratch, float16) { block<float16>(c, b, scratch); }

}  // namespace fusewire::FUSEWIRE_ISA
