// Convolutions by strides of 1 on AMX tiles, without patches: a picture is packed once, with its border of zeros. Pixels that follow one another are then
// rows of a tile whatever the tap, which only shifts where the tile begins, so that a convolution is a product over (channels, taps) of one operand that
// is not copied for each tap (Georganas et al. 2018, "Anatomy of high-performance deep learning convolutions on SIMD architectures"). What falls on the
// border at the end of a row is computed and not written.
#include "cpu/amx_convolution.h"

#include <algorithm>

#include "cpu/amx.h"
#include "cpu/linear_epilogue.h"

namespace fusewire::FUSEWIRE_ISA {

static_assert(kConvolutionBlock == kSide);
constexpr int64_t kUnits = 64;      // bytes: 32 channels of a pixel
constexpr int64_t kNine = 9;        // taps of nearly every convolution
// Steps of channels of a slice: the packed weights of a panel, of all taps, share the second-level cache with the pixels that stream past them.
template <int parts>
constexpr int64_t kSlice = parts == 1 ? 16 : parts == 2 ? 5 : 2;
constexpr int64_t kSumBytes = 768 << 10;

// Where things lie. Packed pixels: [step of 32 channels][part][sample][padded row][padded column][units].
struct Layout {
  explicit Layout(const LinearCall& c) : p(*c.picture), taps(p.taps()), steps((p.channels + kStep - 1) / kStep), width(p.width + 2 * p.pad_w) {}
  int64_t seen(int64_t rows) const { return rows + p.kernel_h - 1; }
  template <int parts>
  int64_t slice() const { return std::min(steps, kSlice<parts>); }
  int64_t blocks(int64_t rows) const { return (rows * width + kSide - 1) / kSide; }
  // Up to what the last block's last tap reads; an odd number, so that steps do not fall on the same lines of the cache.
  int64_t pixels(int64_t rows) const { return (blocks(rows) * kSide + (p.kernel_h - 1) * width + p.kernel_w - 1) | 1; }

  const Picture& p;
  const int64_t taps, steps, width;
};

// c[32][32] (+)= pixels . weights over `steps` steps of channels and all taps. `a`: the block's first pixel for the first tap; `ahead`: how many bytes
// further on the pixels lie that are fetched meanwhile.
template <int parts>
[[gnu::always_inline]] inline void multiply_shifted(const char* a, int64_t a_part, int64_t ahead, const Layout& layout, const char* b, int64_t steps, float* c,
                                                    bool first) {
  constexpr bool a_streams = false, b_streams = false;  // most pixels are another tap's too
  const Picture& p = layout.p;
  const int64_t lines = (kSide + layout.taps - 1) / layout.taps;
  take_sums(c, kSide, first);
  for (const char* of_step = a; steps > 0; --steps, of_step += parts * a_part) {
    const char* next = of_step + ahead;
    for (int64_t h = 0; h < p.kernel_h; ++h) {
      a = of_step + h * layout.width * kUnits;
      for (int64_t w = 0; w < p.kernel_w; ++w, a += kUnits, b += parts * kPartBytes) {
        for (int64_t i = 0; i < lines; ++i, next += kUnits) {
          for (int part = 0; part < parts; ++part) _mm_prefetch(next + part * a_part, _MM_HINT_T1);
        }
        FUSEWIRE_AMX_STEP_OF_ALL(parts);
      }
    }
  }
  leave_sums(c, kSide);
}

bool convolution_serves(const LinearCall& c) { return c.picture->stride_h == 1 && c.picture->stride_w == 1 && c.picture->channels >= kStep; }
int64_t convolution_pixel_bytes(const LinearCall& c, int64_t rows, ScalarKind type) {
  const Layout layout(c);
  return with_type(type, [&](auto t) { return layout.steps * parts_of<decltype(t)> * layout.pixels(rows) * kUnits; });
}
int64_t convolution_blocks(const LinearCall& c, int64_t rows) { return Layout(c).blocks(rows); }
int64_t convolution_packed_rows(const LinearCall& c, int64_t rows) { return Layout(c).seen(rows); }

// Where one slice is all, sums are written at once.
template <int parts>
static int64_t kept_blocks(const Layout& layout, int64_t blocks) { return layout.slice<parts>() < layout.steps ? blocks : 1; }

int64_t convolution_most_blocks(const LinearCall& c, int64_t panels, ScalarKind type) {
  return with_type(type, [&](auto t) -> int64_t {
    const int64_t most = kSumBytes / (panels * kSide * kSide * static_cast<int64_t>(sizeof(float)));
    return kept_blocks<parts_of<decltype(t)>>(Layout(c), most) == 1 ? INT64_MAX : most;
  });
}
int64_t convolution_scratch_bytes(const LinearCall& c, int64_t blocks, int64_t panels, ScalarKind type) {
  return with_type(type, [&](auto t) -> int64_t {
    constexpr int parts = parts_of<decltype(t)>;
    const Layout layout(c);
    return panels * (layout.slice<parts>() * layout.taps * parts * kPartBytes + kept_blocks<parts>(layout, blocks) * kSide * kSide * sizeof(float));
  });
}

template <typename T>
static bool pack_row(const LinearCall& c, const ConvolutionBand& band, int64_t sample, int64_t row, char* packed) {
  constexpr int parts = parts_of<T>;
  const Layout layout(c);
  const Picture& p = layout.p;
  const int64_t pixels = layout.pixels(band.rows), part_bytes = band.samples * pixels * kUnits, y = band.row + row - p.pad_h;
  const T* const from = static_cast<const T*>(c.x.data) + (band.sample + sample) * p.x_b + y * p.x_h;
  char* to = packed + (sample * pixels + row * layout.width) * kUnits;
  bool splits = true;
  for (int64_t column = 0; column < layout.width; ++column, to += kUnits) {
    const int64_t x = column - p.pad_w;
    const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
    Range range;
    for (int64_t s = 0; s < layout.steps; ++s) {
      __m512i units[parts];
      if (inside) {
        units_of<parts>(from + x * p.x_w + s * kStep, 1, p.channels - s * kStep, units, range);
      } else {
        std::fill_n(units, parts, _mm512_setzero_si512());
      }
      for (int part = 0; part < parts; ++part) _mm512_store_si512(to + (s * parts + part) * part_bytes, units[part]);
    }
    if (parts > 1 && inside) splits &= range.splits(kLeastExponent);
  }
  return splits;
}

// A vector's worth of channels of one output, [channels][9] in memory, tap by tap: which lanes of which of nine vectors hold a tap.
template <typename T>
struct NineTaps {
  static constexpr int64_t kVector = kUnits / sizeof(T);
  using Lane = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  alignas(64) Lane lane[kNine][kVector] = {};
  uint32_t mask[kNine][kNine] = {};  // [tap][vector]
  constexpr NineTaps() {
    for (int64_t tap = 0; tap < kNine; ++tap) {
      for (int64_t i = 0; i < kVector; ++i) {
        const int64_t at = i * kNine + tap;
        lane[tap][i] = static_cast<Lane>(at % kVector);
        mask[tap][at / kVector] |= 1u << i;
      }
    }
  }
};
template <typename T>
static constexpr NineTaps<T> kNineTaps{};

template <typename T>
static void separate_taps(const T* weight, T (&square)[kNine][kSide][kStep], int64_t r) {
  constexpr int64_t kVector = NineTaps<T>::kVector;
  for (int64_t k = 0; k < kStep; k += kVector, weight += kNine * kVector) {
    __m512i from[kNine];
    for (int64_t i = 0; i < kNine; ++i) from[i] = _mm512_loadu_si512(weight + i * kVector);
    for (int64_t tap = 0; tap < kNine; ++tap) {
      const __m512i lanes = _mm512_load_si512(kNineTaps<T>.lane[tap]);
      __m512i found = _mm512_setzero_si512();
      for (int64_t i = 0; i < kNine; ++i) {
        const uint32_t mask = kNineTaps<T>.mask[tap][i];
        if constexpr (sizeof(T) == 2) {
          found = _mm512_mask_permutexvar_epi16(found, mask, lanes, from[i]);
        } else {
          found = _mm512_mask_permutexvar_epi32(found, static_cast<__mmask16>(mask), lanes, from[i]);
        }
      }
      _mm512_store_si512(&square[tap][r][k], found);
    }
  }
}

// Steps [step, step + steps) of a panel, as [step][tap][part][2 tiles][units of 16 outputs].
template <typename T>
static void pack_panel(const LinearCall& c, const Layout& layout, int64_t panel, int64_t step, int64_t steps, char* packed, Range& range) {
  constexpr int parts = parts_of<T>;
  const T* const weight = static_cast<const T*>(c.weight) + panel * kSide * c.weight_row;
  const int64_t outputs = std::min(kSide, c.outputs - panel * kSide);
  alignas(64) T square[kNine][kSide][kStep];
  for (int64_t s = step; s < step + steps; ++s) {
    const int64_t channels = layout.p.channels - s * kStep;
    const bool nine = layout.taps == kNine && channels >= kStep;
    for (int64_t r = 0; nine && r < outputs; ++r) separate_taps(weight + r * c.weight_row + s * kStep * kNine, square, r);
    for (int64_t tap = 0; tap < layout.taps; ++tap) {
      for (int64_t tile = 0; tile < 2; ++tile, packed += kTileBytes) {
        __m512 columns[parts][16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t r = tile * 16 + i;
          __m512i units[parts];
          if (r >= outputs) {
            std::fill_n(units, parts, _mm512_setzero_si512());
          } else if (nine) {
            units_of<parts>(static_cast<const T*>(square[tap][r]), units, range);
          } else {
            units_of<parts>(weight + r * c.weight_row + s * kStep * layout.taps + tap, layout.taps, channels, units, range);
          }
          for (int part = 0; part < parts; ++part) columns[part][i] = _mm512_castsi512_ps(units[part]);
        }
        for (int part = 0; part < parts; ++part) {
          transpose16(columns[part]);
          for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(packed + part * kPartBytes + i * 64, columns[part][i]);
        }
      }
      packed += (parts - 1) * kPartBytes;
    }
  }
}

template <typename T>
static uint32_t multiply(const LinearCall& c, const ConvolutionBand& band, const ConvolutionTask& task, const char* pixels, char* scratch) {
  constexpr int parts = parts_of<T>;
  constexpr int64_t square = kSide * kSide;
  const Layout layout(c);
  const Picture& p = layout.p;
  const int64_t sample_blocks = layout.blocks(band.rows), blocks = task.end - task.block, panels = task.panel_end - task.panel, slice = layout.slice<parts>();
  const int64_t of_sample = layout.pixels(band.rows), part_bytes = band.samples * of_sample * kUnits, panel_bytes = slice * layout.taps * parts * kPartBytes;
  const int64_t ahead = (kSide + (p.kernel_h - 1) * layout.width) * kUnits;  // the next block's pixels that no tap has seen yet
  float* const sums = reinterpret_cast<float*>(scratch + panels * panel_bytes);  // [blocks][panels][32][32]
  const bool one_slice = slice == layout.steps;
  Range range[kConvolutionPanels];
  const TileScope tiles;
  for (int64_t s = 0; s < layout.steps; s += slice) {
    const int64_t here = std::min(slice, layout.steps - s);
    for (int64_t n = 0; n < panels; ++n) pack_panel<T>(c, layout, task.panel + n, s, here, scratch + n * panel_bytes, range[n]);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t sample = (task.block + block) / sample_blocks, first = (task.block + block) % sample_blocks * kSide;
      for (int64_t n = 0; n < panels; ++n) {
        float* const to = sums + ((one_slice ? 0 : block) * panels + n) * square;
        // float32: a slice is summed on its own before it is added, because rounding errors grow with the length of a chain of sums.
        const bool apart = parts == 3 && s > 0;
        alignas(64) float fresh[square];
        multiply_shifted<parts>(pixels + (sample * of_sample + first) * kUnits + s * parts * part_bytes, part_bytes, ahead, layout, scratch + n * panel_bytes, here,
                                apart ? fresh : to, apart || s == 0);
        if (apart) {
#pragma omp simd
          for (int64_t i = 0; i < square; ++i) to[i] += fresh[i];
        }
        if (s + here < layout.steps) continue;
        const int64_t col = (task.panel + n) * kSide;
        Epilogue<T> epilogue(c, col, std::min(kSide, c.outputs - col));
        for (int64_t i = 0, run; i < kSide; i += run) {  // a row's pixels, then its border
          const int64_t row = (first + i) / layout.width, column = (first + i) % layout.width;
          if (row >= band.rows) break;
          run = std::min(kSide - i, column < p.out_width ? p.out_width - column : layout.width - column);
          if (column >= p.out_width) continue;
          epilogue.rows((band.sample + sample) * p.pixels() + (band.row + row) * p.out_width + column, run, to + i * kSide, kSide);
        }
      }
    }
  }
  uint32_t bad = 0;
  for (int64_t n = 0; parts > 1 && n < panels; ++n) bad |= static_cast<uint32_t>(!range[n].splits(kLeastExponent)) << n;
  return bad;
}

bool convolution_pack_row(const LinearCall& c, const ConvolutionBand& band, int64_t sample, int64_t row, char* packed, ScalarKind type) {
  return with_type(type, [&](auto t) { return pack_row<decltype(t)>(c, band, sample, row, packed); });
}
uint32_t convolution_multiply(const LinearCall& c, const ConvolutionBand& band, const ConvolutionTask& task, const char* pixels, char* scratch, ScalarKind type) {
  return with_type(type, [&](auto t) { return multiply<decltype(t)>(c, band, task, pixels, scratch); });
}

}  // namespace fusewire::FUSEWIRE_ISA
