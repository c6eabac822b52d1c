// Linear layers on AMX tiles. Rows of x and of the weight become parts in bfloat16 (amx.h); blocks of 32 x 32 results are accumulated in
// tiles over a slice of the inner dimension and kept as float32 sums, which stay in the second-level cache until the epilogue.
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/linear.h"
#include "cpu/linear_epilogue.h"

namespace fusewire::FUSEWIRE_ISA {

// Steps of a slice, as measured: in bfloat16 both blocks share the first-level cache; more parts mean more products for each load, and longer
template <int parts>
constexpr int64_t kSteps = parts == 1 ? 8 : 16;

static_assert(kLinearBlock == kSide);

inline int64_t steps_of(int64_t inputs) { return (inputs + kStep - 1) / kStep; }

template <typename F>
static auto with_type(ScalarKind type, F&& f) {
  if (type == ScalarKind::bf16) return f(bfloat16{});
  if (type == ScalarKind::f16) return f(float16{});
  return f(float{});
}

int64_t linear_packed_bytes(int64_t inputs, ScalarKind type) {
  return with_type(type, [&](auto t) {
    constexpr int parts = parts_of<decltype(t)>;
    return (steps_of(inputs) + kSteps<parts> - 1) / kSteps<parts> * kSteps<parts> * parts * kPartBytes;
  });
}

int64_t linear_scratch_bytes(int64_t rows, int64_t cols, ScalarKind type) {
  const int64_t blocks = (rows + kSide - 1) / kSide, panels = (cols + kSide - 1) / kSide;
  return with_type(type, [](auto t) { return kSteps<parts_of<decltype(t)>> * parts_of<decltype(t)> * kPartBytes; }) * panels + blocks * panels * kSide * kSide * sizeof(float);
}

template <typename T>
static uint32_t pack_rows(const LinearCall& c, int64_t row, int64_t blocks, char* packed) {
  constexpr int parts = parts_of<T>;
  Range range[kSide];
  const T* rows[kSide];
  const int64_t count = std::min(kSide, c.rows - row);
  for (int64_t r = 0; r < count; ++r) rows[r] = static_cast<const T*>(c.x.data) + c.x.offset(row + r);
  for (int64_t s = 0, k = 0; k < c.inputs; ++s, k += kStep) {
    char* to = packed + (s / kSteps<parts> * blocks * kSteps<parts> + s % kSteps<parts>) * parts * kPartBytes;
    for (int64_t r = 0; r < kSide; ++r, to += 64) {
      __m512i units[parts];
      if (r < count) {
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

// Elements [k, k + steps * 32) of the 32 weight rows from `weight` on, as the right-hand operand: units across the rows of a tile.
template <typename T>
static void pack_weight(const LinearCall& c, const T* weight, int64_t rows, int64_t k, int64_t steps, char* packed, Range& range) {
  constexpr int parts = parts_of<T>;
  for (int64_t s = 0; s < steps; ++s, k += kStep) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      __m512 columns[parts][16];
      for (int64_t r = 0; r < 16; ++r) {
        __m512i units[parts];
        const int64_t n = tile * 16 + r;
        if (n < rows) {
          // The same row's part of the next slice: rows lie too far apart for the processor to foresee it.
          const char* next = reinterpret_cast<const char*>(weight + n * c.weight_row + (k + kSteps<parts> * kStep) * c.weight_col);
          for (int64_t line = 0; line < kStep * static_cast<int64_t>(sizeof(T)); line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
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

template <typename T>
static uint32_t columns(const LinearCall& c, const LinearBlock& b, const char* packed, char* scratch) {
  constexpr int parts = parts_of<T>;
  const int64_t steps = steps_of(c.inputs), blocks = (b.rows + kSide - 1) / kSide, panels = (b.cols + kSide - 1) / kSide;
  const int64_t panel_bytes = kSteps<parts> * parts * kPartBytes;
  char* const panel = scratch;
  float* const sums = reinterpret_cast<float*>(scratch + panels * panel_bytes);  // [panels][blocks][32][32]
  const T* weight = static_cast<const T*>(c.weight) + b.col * c.weight_row;
  Range range[kLinearCols / kSide];
  const TileScope tiles;
  for (int64_t first = 0; first < steps; first += kSteps<parts>) {
    const int64_t here = std::min(kSteps<parts>, steps - first);
    for (int64_t n = 0; n < panels; ++n)
      pack_weight(c, weight + n * kSide * c.weight_row, b.cols - n * kSide, first * kStep, here, panel + n * panel_bytes, range[n]);
    // [slices][blocks][steps of a slice]: a slice lies together, and the next one is fetched while this one is multiplied.
    const char* x = packed + first * blocks * parts * kPartBytes;
    const int64_t ahead_lines = first + here < steps ? panel_bytes / 64 / (panels * here) : 0;
    alignas(64) float fresh[kSide * kSide];
    const auto multiply = [&](int64_t i, int64_t n) {
      const Ahead ahead{x + blocks * panel_bytes + i * panel_bytes + n * ahead_lines * here * 64, ahead_lines};
      float* block = sums + (n * blocks + i) * kSide * kSide;
      // float32: a slice is summed on its own before it is added, because rounding errors grow with the length of a chain of sums.
      const bool apart = parts == 3 && first > 0;
      multiply_block<parts>(x + i * panel_bytes, panel + n * panel_bytes, here, apart ? fresh : block, kSide, apart || first == 0, ahead);
      if (apart) {
#pragma omp simd
        for (int64_t j = 0; j < kSide * kSide; ++j) block[j] += fresh[j];
      }
    };
    if constexpr (parts == 1) {
      for (int64_t n = 0; n < panels; ++n)
        for (int64_t i = 0; i < blocks; ++i) multiply(i, n);
    } else {
      for (int64_t i = 0; i < blocks; ++i)
        for (int64_t n = 0; n < panels; ++n) multiply(i, n);
    }
  }
  Epilogue<T> epilogue(c, b.col, b.cols);
  for (int64_t r = 0; r < b.rows; ++r) {
    alignas(64) float y[kLinearCols];
    for (int64_t n = 0; n < panels; ++n)
      std::memcpy(y + n * kSide, sums + (n * blocks * kSide + r) * kSide, kSide * sizeof(float));
    epilogue.row(b.row + r, y);
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
