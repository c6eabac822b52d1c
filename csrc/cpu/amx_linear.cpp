// Linear layers on AMX tiles. Rows of x and of the weight become parts in bfloat16 (amx.h); blocks of 32 x 32 results are accumulated in
// tiles over a slice of the inner dimension and kept as float32 sums, which stay in the second-level cache until the epilogue.
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/linear.h"
#include "cpu/linear_epilogue.h"

namespace fusewire::FUSEWIRE_ISA {

// The inner dimension is cut into chunks: a thread's weights of a chunk, packed, share the second-level cache with what streams past them.
// In bfloat16 a chunk is cut again, into slices, so that a block of the weights stays in the first level for a whole group of rows. With
// more parts there are more products for each load, and fewer trips of the sums count for more.
template <int parts>
constexpr int64_t kChunk = parts == 1 ? 48 : 16;  // steps
template <int parts>
constexpr int64_t kSteps = parts == 1 ? 8 : 16;   // of a slice
constexpr int64_t kGroup = 8;                     // blocks of rows
// Few rows, in bfloat16: as long a piece of all of them as stays in the second-level cache, and no longer than a panel of weights may be.
constexpr int64_t kFewBlocks = 16, kFewBytes = 1280 << 10, kFewSteps = 96;

static_assert(kLinearBlock == kSide);

inline int64_t steps_of(int64_t inputs) { return (inputs + kStep - 1) / kStep; }

int64_t linear_packed_bytes(int64_t inputs, ScalarKind type) {
  return with_type(type, [&](auto t) {
    constexpr int parts = parts_of<decltype(t)>;
    return (steps_of(inputs) + kSteps<parts> - 1) / kSteps<parts> * kSteps<parts> * parts * kPartBytes;
  });
}

int64_t linear_scratch_bytes(int64_t rows, int64_t cols, ScalarKind type) {
  const int64_t blocks = (rows + kSide - 1) / kSide, panels = (cols + kSide - 1) / kSide;
  const int64_t panel = with_type(type, [](auto t) { return kChunk<parts_of<decltype(t)>> * parts_of<decltype(t)> * kPartBytes; });
  return std::max(panels * panel, kFewSteps * kPartBytes) + blocks * panels * kSide * kSide * sizeof(float);
}

// Rows that lie side by side in memory, as they do in a transposed operand: 32 elements of each, from `x` on, as contiguous rows. Every cache line is read
// once: element by element, lines that lie a power of two apart would drive each other out of the cache. What is not there is zero.
template <typename T>
static void turn(const T* x, int64_t stride, int64_t rows, int64_t count, T (&square)[kSide][kStep]) {
  if (rows < kSide || count < kStep) std::memset(square, 0, sizeof square);
  rows = std::min(rows, kSide), count = std::min(count, kStep);
  for (int64_t k = 0; k < count; k += 16) {
    if constexpr (std::is_same_v<T, float>) {
      if (rows == kSide && k + 16 <= count) {
        for (int64_t r = 0; r < kSide; r += 16) {
          __m512 block[16];
          for (int64_t i = 0; i < 16; ++i) {
            const float* line = x + (k + i) * stride + r;
            _mm_prefetch(reinterpret_cast<const char*>(line + kStep * stride), _MM_HINT_T0);
            block[i] = _mm512_loadu_ps(line);
          }
          transpose16(block);
          for (int64_t i = 0; i < 16; ++i) _mm512_storeu_ps(&square[r + i][k], block[i]);
        }
        continue;
      }
    }
    for (int64_t i = k; i < std::min<int64_t>(k + 16, count); ++i) {
      const T* line = x + i * stride;
      _mm_prefetch(reinterpret_cast<const char*>(line + kStep * stride), _MM_HINT_T0);
      for (int64_t r = 0; r < rows; ++r) square[r][i] = line[r];
    }
  }
}

template <typename T>
static uint32_t pack_rows(const LinearCall& c, int64_t row, int64_t blocks, char* packed) {
  constexpr int parts = parts_of<T>;
  Range range[kSide];
  const T* rows[kSide];
  const int64_t count = std::min(kSide, c.rows - row);
  bool side_by_side = c.x.channel != 1;
  for (int64_t r = 0; r < count; ++r) {
    rows[r] = static_cast<const T*>(c.x.data) + c.x.offset(row + r);
    side_by_side &= rows[r] == rows[0] + r;
  }
  alignas(64) T square[kSide][kStep];
  for (int64_t s = 0, k = 0; k < c.inputs; ++s, k += kStep) {
    if (side_by_side) turn(rows[0] + k * c.x.channel, c.x.channel, count, c.inputs - k, square);
    char* to = packed + (s / kSteps<parts> * blocks * kSteps<parts> + s % kSteps<parts>) * parts * kPartBytes;
    for (int64_t r = 0; r < kSide; ++r, to += 64) {
      __m512i units[parts];
      if (r < count && side_by_side) {
        units_of<parts>(static_cast<const T*>(square[r]), units, range[r]);
      } else if (r < count) {
        units_of<parts>(rows[r] + k * c.x.channel, c.x.channel, c.inputs - k, units, range[r]);
      } else {
        std::fill_n(units, parts, _mm512_setzero_si512());
      }
      for (int p = 0; p < parts; ++p) _mm512_store_si512(to + p * kPartBytes, units[p]);
    }
  }
  uint32_t bad = 0;
  if constexpr (parts > 1) {
    for (int64_t r = 0; r < count; ++r) bad |= static_cast<uint32_t>(!range[r].splits(kLeastExponent)) << r;
  }
  return bad;
}

// Elements [k, k + steps * 32) of the 32 weight rows from `weight` on, as the right-hand operand: units across the rows of a tile. `ahead`: the next 32
// rows are fetched meanwhile, which lie too far apart for the processor to foresee it.
template <typename T, bool ahead = true>
static void pack_weight(const LinearCall& c, const T* weight, int64_t rows, int64_t k, int64_t steps, char* packed, Range& range) {
  constexpr int parts = parts_of<T>;
  const bool side_by_side = c.weight_row == 1 && c.weight_col != 1;
  alignas(64) T square[kSide][kStep];
  for (int64_t s = 0; s < steps; ++s, k += kStep) {
    if (side_by_side) turn(weight + k * c.weight_col, c.weight_col, rows, c.inputs - k, square);
    for (int64_t tile = 0; tile < 2; ++tile) {
      __m512 columns[parts][16];
      for (int64_t r = 0; r < 16; ++r) {
        __m512i units[parts];
        const int64_t n = tile * 16 + r;
        if (n < rows && side_by_side) {
          units_of<parts>(static_cast<const T*>(square[n]), units, range);
        } else if (n < rows) {
          const char* next = reinterpret_cast<const char*>(weight + (n + kSide) * c.weight_row + k * c.weight_col);
          for (int64_t line = 0; ahead && line < kStep * static_cast<int64_t>(sizeof(T)); line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
          units_of<parts>(weight + n * c.weight_row + k * c.weight_col, c.weight_col, c.inputs - k, units, range);
        } else {
          std::fill_n(units, parts, _mm512_setzero_si512());
        }
        for (int p = 0; p < parts; ++p) columns[p][r] = _mm512_castsi512_ps(units[p]);
      }
      for (int p = 0; p < parts; ++p) {
        transpose16(columns[p]);
        char* to = packed + (s * parts + p) * kPartBytes + tile * kTileBytes;
        for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(to + i * 64, columns[p][i]);
      }
    }
  }
}

// Rows of a weight that will be packed next, a few lines at a time.
struct RowsAhead {
  const char* row;
  int64_t stride, lines, at = 0;  // lines: of a row
  void fetch(int64_t count) {
    for (; count > 0; --count) {
      _mm_prefetch(row + at * 64, _MM_HINT_T1);
      if (++at == lines) at = 0, row += stride;
    }
  }
};

// Few rows: all of them stay in the second-level cache while one panel of weights after another is packed and multiplied, and the next one fetched. The
// weight's way through memory is what takes the time.
static void columns_of_few_rows(const LinearCall& c, const LinearBlock& b, const char* packed, char* scratch) {
  constexpr int64_t part = kSteps<1>, a_part = kPartBytes, square = kSide * kSide;
  const int64_t steps = steps_of(c.inputs), blocks = (b.rows + kSide - 1) / kSide, panels = (b.cols + kSide - 1) / kSide;
  const int64_t fit = std::clamp(kFewBytes / (blocks * kPartBytes), part, kFewSteps), slices = (steps + fit - 1) / fit;
  const int64_t slice = ((steps + slices - 1) / slices + part - 1) / part * part;  // as equal as can be
  char* const panel = scratch;
  float* const sums = reinterpret_cast<float*>(scratch + kFewSteps * kPartBytes);  // [panels][blocks][32][32], of one panel where all steps are one slice
  const bfloat16* const weight = static_cast<const bfloat16*>(c.weight) + b.col * c.weight_row;
  Range unused;
  const TileScope tiles;
  for (int64_t first = 0; first < steps; first += slice) {
    const int64_t end = std::min(first + slice, steps);
    for (int64_t n = 0; n < panels; ++n) {
      const int64_t rows = std::min(kSide, b.cols - n * kSide);
      float* const of_panel = sums + (slices > 1 ? n * blocks * square : 0);
      pack_weight<bfloat16, false>(c, weight + n * kSide * c.weight_row, rows, first * kStep, end - first, panel, unused);
      // What is packed next: the next panel's rows, or the first one's next slice
      const bool last = n + 1 == panels;
      const bfloat16* const coming = weight + (last ? 0 : (n + 1) * kSide) * c.weight_row + (last ? end : first) * kStep;
      RowsAhead ahead{reinterpret_cast<const char*>(coming), c.weight_row * static_cast<int64_t>(sizeof(bfloat16)), end - first};
      const int64_t lines = c.weight_col != 1 || (last && end == steps) ? 0 : (kSide + blocks - 1) / blocks;
      for (int64_t i = 0; i < blocks; ++i) {
        float* const sum = of_panel + i * square;
        const char* b_at = panel;
        take_sums(sum, kSide, first == 0);
        for (int64_t s = first; s < end; ++s, b_at += kPartBytes) {
          const char* const a = packed + ((s / part * blocks + i) * part + s % part) * kPartBytes;
          const char* const b = b_at;
          ahead.fetch(lines);
          FUSEWIRE_AMX_STEP(1);
        }
        leave_sums(sum, kSide);
      }
      if (end < steps) continue;
      Epilogue<bfloat16> epilogue(c, b.col + n * kSide, rows);
      epilogue.rows(b.row, b.rows, of_panel, kSide);
    }
  }
}

template <typename T>
static uint32_t columns(const LinearCall& c, const LinearBlock& b, const char* packed, char* scratch) {
  constexpr int parts = parts_of<T>;
  constexpr int64_t step_bytes = parts * kPartBytes, panel_bytes = kChunk<parts> * step_bytes, slice_bytes = kSteps<parts> * step_bytes;
  const int64_t steps = steps_of(c.inputs), blocks = (b.rows + kSide - 1) / kSide, panels = (b.cols + kSide - 1) / kSide;
  if (parts == 1 && blocks <= kFewBlocks) {
    columns_of_few_rows(c, b, packed, scratch);
    return 0;
  }
  char* const panel = scratch;                                                    // [panels][steps of a chunk]
  float* const sums = reinterpret_cast<float*>(scratch + panels * panel_bytes);   // [blocks][panels][32][32]
  alignas(64) float fresh[kSide * kSide];
  const T* weight = static_cast<const T*>(c.weight) + b.col * c.weight_row;
  Epilogue<T> epilogue(c, b.col, b.cols);
  Range range[kLinearCols / kSide];
  const TileScope tiles;
  for (int64_t chunk = 0; chunk < steps; chunk += kChunk<parts>) {
    const int64_t end = std::min(chunk + kChunk<parts>, steps);
    for (int64_t n = 0; n < panels; ++n)
      pack_weight(c, weight + n * kSide * c.weight_row, b.cols - n * kSide, chunk * kStep, end - chunk, panel + n * panel_bytes, range[n]);
    for (int64_t group = 0; group < blocks; group += kGroup) {
      const int64_t group_end = std::min(group + kGroup, blocks);
      for (int64_t first = chunk; first < end; first += kSteps<parts>) {
        const int64_t here = std::min(kSteps<parts>, end - first);
        // x is packed as [slices][blocks][steps of a slice]. The group's next slice, or the next group's first, is fetched meanwhile.
        const bool more = first + here < end;
        const char* x = packed + first * blocks * step_bytes;
        const char* next = more ? x + blocks * slice_bytes : packed + chunk * blocks * step_bytes + kGroup * slice_bytes;
        const int64_t ahead_lines = more || group_end < blocks ? slice_bytes / 64 / (panels * here) : 0;
        const auto multiply = [&](int64_t i, int64_t n) {
          const Ahead ahead{next + i * slice_bytes + n * ahead_lines * here * 64, ahead_lines};
          float* block = sums + (i * panels + n) * kSide * kSide;
          // float32: a slice is summed on its own before it is added, because rounding errors grow with the length of a chain of sums.
          const bool apart = parts == 3 && first > 0;
          multiply_block<parts>(x + i * slice_bytes, panel + n * panel_bytes + (first - chunk) * step_bytes, here, apart ? fresh : block, kSide,
                                apart || first == 0, ahead);
          if (apart) {
#pragma omp simd
            for (int64_t j = 0; j < kSide * kSide; ++j) block[j] += fresh[j];
          }
        };
        if constexpr (parts == 1) {
          for (int64_t n = 0; n < panels; ++n)
            for (int64_t i = group; i < group_end; ++i) multiply(i, n);
        } else {
          for (int64_t i = group; i < group_end; ++i)
            for (int64_t n = 0; n < panels; ++n) multiply(i, n);
        }
      }
      if (end < steps) continue;
      for (int64_t r = group * kSide; r < std::min(group_end * kSide, b.rows); ++r) {
        alignas(64) float y[kLinearCols];
        const float* row = sums + (r / kSide * panels * kSide + r % kSide) * kSide;
        for (int64_t n = 0; n < panels; ++n) std::memcpy(y + n * kSide, row + n * kSide * kSide, kSide * sizeof(float));
        epilogue.rows(b.row + r, 1, y, 0);
      }
    }
  }
  uint32_t bad = 0;
  if constexpr (parts > 1) {
    for (int64_t n = 0; n < panels; ++n) bad |= static_cast<uint32_t>(!range[n].splits(kLeastExponent)) << n;
  }
  return bad;
}

uint32_t linear_pack(const LinearCall& c, int64_t row, int64_t block, int64_t blocks, char* packed, ScalarKind type) {
  return with_type(type, [&](auto t) {
    constexpr int parts = parts_of<decltype(t)>;
    return pack_rows<decltype(t)>(c, row, blocks, packed + block * kSteps<parts> * parts * kPartBytes);
  });
}
uint32_t linear_columns(const LinearCall& c, const LinearBlock& b, const char* packed, char* scratch, ScalarKind type) {
  return with_type(type, [&](auto t) { return columns<decltype(t)>(c, b, packed, scratch); });
}

}  // namespace fusewire::FUSEWIRE_ISA
