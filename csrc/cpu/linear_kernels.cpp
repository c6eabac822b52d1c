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

constexpr int kPanel = 2 * kUnitLanes;
constexpr int64_t kDepth = 256;
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

// What is read next, while a tile is multiplied: up to three rows, asked for a line at a time, as many lines at once would hold up the panel's own.
struct Ahead {
  const char* rows[3];
};
constexpr int64_t kLine = 16;  // units in a cache line

// block[rows][kPanel] (+)= a[rows][depth] * b[depth][kPanel]
template <int rows, bool pairs>
static void tile(const float* a, const float* b, int64_t depth, float* block, int64_t stride, bool first, const Ahead& ahead) {
  Units sum[rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = zero();
  for (int64_t begin = 0; begin < depth; begin += kLine) {
#pragma GCC unroll 3
    for (const char* row : ahead.rows) __builtin_prefetch(row + begin * 4, 0, 2);
    __builtin_prefetch(block + std::min<int64_t>(begin / kLine, rows - 1) * stride, 1);
    __builtin_prefetch(block + std::min<int64_t>(begin / kLine, rows - 1) * stride + kUnitLanes, 1);
    const int64_t end = std::min(begin + kLine, depth);
    for (int64_t k = begin; k < end; ++k, b += kPanel) {
      __builtin_prefetch(b + kAhead * kPanel);
      __builtin_prefetch(b + kAhead * kPanel + kUnitLanes);
      const Units b0 = load(b), b1 = load(b + kUnitLanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Units x = broadcast(a + r * kStride + k);
        sum[r][0] = step<pairs>(x, b0, sum[r][0]);
        sum[r][1] = step<pairs>(x, b1, sum[r][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r, block += stride) {
    store(block, first ? sum[r][0] : add(load(block), sum[r][0]));
    store(block + kUnitLanes, first ? sum[r][1] : add(load(block + kUnitLanes), sum[r][1]));
  }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, bool, const Ahead&);
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
  for (int64_t n = 0; n < kPanel; n += kUnitLanes) {
    for (int64_t k = 0; k < units; k += kUnitLanes) {
      const int64_t here = std::min<int64_t>(kUnitLanes, units - k);
      Units block[kUnitLanes];
      for (int64_t r = 0; r < kUnitLanes; ++r) {
        alignas(64) float row[kUnitLanes] = {};
        const T* from = weight + (n + r) * row_stride + k * unit * col_stride;
        if (n + r < rows) {
          if (col_stride == 1) __builtin_prefetch(from + 2 * kUnitLanes * unit);  // many rows at a time: no prefetcher follows
          if (col_stride == 1 && (k + kUnitLanes) * unit <= count) {
            if constexpr (std::is_same_v<T, float> || paired<T>)
              block[r] = load(reinterpret_cast<const float*>(from));
            else
              block[r] = (Units)load<kUnitLanes>(from);  // widened
            continue;
          }
          copy_row(from, col_stride, std::min(kUnitLanes * unit, count - k * unit), row);
        }
        block[r] = load(row);
      }
      transpose(block);
      for (int64_t i = 0; i < here; ++i) store(panel + (k + i) * kPanel + n, block[i]);
    }
  }
}

// Slice by slice: what is packed of the weight stays in the second-level cache while it is multiplied by all rows.
template <typename T>
static void block(const LinearCall& c, const LinearBlock& b, float* scratch) {
  constexpr int64_t unit = paired<T> ? 2 : 1, depth = kDepth * unit;
  const int64_t panels = (b.cols + kPanel - 1) / kPanel, width = panels * kPanel, tiles = (b.rows + kTileRows - 1) / kTileRows;
  float* const rows = scratch;                           // [2][kTileRows][kStride]: of this tile and of the next
  float* const packed = rows + 2 * kTileRows * kStride;  // [panels][kDepth][kPanel]
  float* const sums = packed + width * kDepth;           // [rows][width]
  const T* const x = static_cast<const T*>(c.x.data);
  // Of a picture, channels of one tap at a time, in parts as equal as can be
  const int64_t taps = c.picture ? c.picture->taps() : 1, channels = c.inputs / taps, parts = (channels + depth - 1) / depth;
  const int64_t part = c.picture ? ((channels + parts - 1) / parts + 2 * kUnitLanes - 1) / (2 * kUnitLanes) * 2 * kUnitLanes : depth;
  Epilogue<T> epilogue(c, b.col, b.cols);
  for (int64_t slice = 0; slice < taps * parts; ++slice) {
    const int64_t tap = slice / parts, k = slice % parts * part, count = std::min(part, channels - k), units = (count + unit - 1) / unit;
    const T* const weight = static_cast<const T*>(c.weight) + b.col * c.weight_row + k * c.weight_col + tap;
    for (int64_t n = 0; n < panels; ++n)
      pack(weight + n * kPanel * c.weight_row, c.weight_row, c.weight_col, b.cols - n * kPanel, count, packed + n * kPanel * kDepth);
    // Rows of the weight's next slice, asked for from the first to the last while this slice is multiplied
    const bool last_slice = tap + 1 == taps && k + count == channels;
    const int64_t coming = c.weight_col == 1 && !last_slice ? b.cols : 0, calls = tiles * panels;
    const auto source = [&](int64_t r) -> const T* {
      if (!c.picture) return x + c.x.offset(b.row + r) + k * c.x.channel;
      const int64_t sample = (b.row + r) / c.picture->pixels(), at = c.picture->offset((b.row + r) % c.picture->pixels(), tap);
      return at < 0 ? nullptr : x + sample * c.picture->x_b + at + k;
    };
    const auto copy = [&](int64_t r, float* to) {
      if (const T* from = source(r))
        copy_row(from, c.x.channel, count, to);
      else
        std::fill_n(to, units, 0.0f);
    };
    for (int64_t r = 0; r < b.rows / tiles; ++r) copy(r, rows + r * kStride);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = t * b.rows / tiles, end = (t + 1) * b.rows / tiles;  // tiles as equal as can be
      const int64_t later = t + 1 < tiles ? (t + 2) * b.rows / tiles - end : 0, last = t + 2 < tiles ? (t + 3) * b.rows / tiles - end - later : 0;
      const float* const these = rows + t % 2 * kTileRows * kStride;
      float* const next = rows + (t + 1) % 2 * kTileRows * kStride;
      const Tile multiply = tile_of<paired<T>>(end - begin);
      for (int64_t n = 0; n < panels; ++n) {
        for (int64_t r = later * n / panels; r < later * (n + 1) / panels; ++r) copy(end + r, next + r * kStride);
        const int64_t far = end + later + last * n / panels, call = t * panels + n, w = call * coming / calls;
        const auto row = [&](int64_t r) {
          const T* from = r < b.rows && c.x.channel == 1 ? source(r) : nullptr;
          return from ? reinterpret_cast<const char*>(from) : reinterpret_cast<const char*>(packed);
        };
        const Ahead ahead{row(far), row(far + 1), w < (call + 1) * coming / calls ? reinterpret_cast<const char*>(weight + w * c.weight_row + count) : row(b.rows)};
        multiply(these, packed + n * kPanel * kDepth, units, sums + begin * width + n * kPanel, width, slice == 0, ahead);
      }
      if (!last_slice) continue;
      epilogue.rows(b.row + begin, end - begin, sums + begin * width, width);
    }
  }
}

int64_t linear_panel() { return kPanel; }
int64_t linear_scratch(int64_t rows, int64_t cols) {
  const int64_t width = (cols + kPanel - 1) / kPanel * kPanel;
  return 2 * kTileRows * kStride + width * kDepth + rows * width;
}
void linear_block(const LinearCall& c, const LinearBlock& b, float* scratch, float) { block<float>(c, b, scratch); }
void linear_block(const LinearCall& c, const LinearBlock& b, float* scratch, bfloat16) { block<bfloat16>(c, b, scratch); }
void linear_block(const LinearCall& c, const LinearBlock& b, float* scratch, float16) { block<float16>(c, b, scratch); }

}  // namespace fusewire::FUSEWIRE_ISA
