// Linear layers on AMX tiles. Rows of the weight are the left-hand operand, in which a row stays a row, and rows of x the right-hand one, which is
// transposed: x is packed once for all threads, and a weight, of which there is more, only copied. Blocks of 32 x 32 results, transposed, are accumulated in
// tiles over a slice of the inner dimension and kept as float32 sums, which stay in the second-level cache until the epilogue turns them.
#include <algorithm>

#include "cpu/amx.h"
#include "cpu/linear.h"
#include "cpu/linear_epilogue.h"

namespace fusewire::FUSEWIRE_ISA {

// The inner dimension is cut into equal slices of at most so many steps. In bfloat16 a panel of 32 weights of one stays in the first-level cache while
// blocks of x stream past it. With more parts there are more products for each load: all panels stay in the second level, and each block of x meets all of
// them, while trips of the sums count for more.
constexpr int64_t kSteps = 16;
template <int parts>
constexpr bool kOnePanel = parts == 1;
constexpr int64_t kRowBytes = 1280 << 10;  // of packed x that stays in the second-level cache with all else

static_assert(kLinearBlock == kSide);

struct Slices {
  explicit Slices(int64_t inputs) : steps((inputs + kStep - 1) / kStep), count((steps + kSteps - 1) / kSteps), length((steps + count - 1) / count) {}
  int64_t here(int64_t slice) const { return std::min(length, steps - slice * length); }
  const int64_t steps, count, length;
};

int64_t linear_packed_bytes(int64_t inputs, ScalarKind type) {
  const Slices slices(inputs);
  return with_type(type, [&](auto t) { return slices.count * slices.length * parts_of<decltype(t)> * kPartBytes; });
}

int64_t linear_scratch_bytes(int64_t rows, int64_t cols, ScalarKind type) {
  const int64_t blocks = (rows + kSide - 1) / kSide, panels = (cols + kSide - 1) / kSide;
  return with_type(type, [&](auto t) -> int64_t {
    constexpr int parts = parts_of<decltype(t)>;
    return (kOnePanel<parts> ? 1 : panels) * kSteps * parts * kPartBytes + blocks * panels * kSide * kSide * sizeof(float);
  });
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

// Units of 32 rows of an operand, a step at a time. Rows from `count` on are not there.
template <typename T>
class UnitRows {
 public:
  static constexpr int parts = parts_of<T>;
  UnitRows(const T* const* rows, int64_t count, int64_t stride, int64_t inputs) : rows_(rows), count_(count), stride_(stride), inputs_(inputs) {
    side_by_side_ = stride != 1;
    for (int64_t r = 0; r < count; ++r) side_by_side_ &= rows[r] == rows[0] + r;
  }
  void step(int64_t s) {
    k_ = s * kStep;
    if (side_by_side_) turn(rows_[0] + k_ * stride_, stride_, count_, inputs_ - k_, square_);
  }
  [[gnu::always_inline]] void read(int64_t r, __m512i (&units)[parts], Range& range) const {
    if (r >= count_) {
      std::fill_n(units, parts, _mm512_setzero_si512());
    } else if (side_by_side_) {
      units_of<parts>(static_cast<const T*>(square_[r]), units, range);
    } else {
      units_of<parts>(rows_[r] + k_ * stride_, stride_, inputs_ - k_, units, range);
    }
  }

 private:
  const T* const* const rows_;
  const int64_t count_, stride_, inputs_;
  bool side_by_side_;
  int64_t k_ = 0;
  alignas(64) T square_[kSide][kStep];
};

// Rows of x as the right-hand operand, units across the rows of a tile: [slices][blocks][steps of a slice].
template <typename T>
static uint32_t pack_rows(const LinearCall& c, int64_t row, int64_t block, int64_t blocks, char* packed) {
  constexpr int parts = parts_of<T>;
  const Slices slices(c.inputs);
  const int64_t count = std::min(kSide, c.rows - row);
  const T* rows[kSide];
  for (int64_t r = 0; r < count; ++r) rows[r] = static_cast<const T*>(c.x.data) + c.x.offset(row + r);
  UnitRows<T> from(rows, count, c.x.channel, c.inputs);
  Range range[kSide];
  for (int64_t s = 0; s < slices.steps; ++s) {
    from.step(s);
    char* const to = packed + ((s / slices.length * blocks + block) * slices.length + s % slices.length) * parts * kPartBytes;
    for (int64_t tile = 0; tile < 2; ++tile) {
      __m512 columns[parts][16];
      for (int64_t r = 0; r < 16; ++r) {
        __m512i units[parts];
        from.read(tile * 16 + r, units, range[tile * 16 + r]);
        for (int p = 0; p < parts; ++p) columns[p][r] = _mm512_castsi512_ps(units[p]);
      }
      for (int p = 0; p < parts; ++p) {
        transpose16(columns[p]);
        for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(to + p * kPartBytes + tile * kTileBytes + i * 64, columns[p][i]);
      }
    }
  }
  uint32_t bad = 0;
  if constexpr (parts > 1) {
    for (int64_t r = 0; r < count; ++r) bad |= static_cast<uint32_t>(!range[r].splits(kLeastExponent)) << r;
  }
  return bad;
}

// Rows of memory that will be needed soon, brought into the second-level cache a few lines at a time: many at once would hold up the tiles' own loads.
struct RowsAhead {
  const char* row = nullptr;
  int64_t stride = 0, lines = 0, count = 0, at = 0;  // lines: of a row; count: at a time
  void fetch() {
    for (int64_t i = 0; i < count; ++i) {
      _mm_prefetch(row + at * 64, _MM_HINT_T1);
      if (++at == lines) at = 0, row += stride;
    }
  }
};

// A block of columns: one group of panels, and of it one slice, after another, each times all rows.
template <typename T>
class Columns {
 public:
  Columns(const LinearCall& call, const LinearBlock& part, const LinearBlock& later, const char* packed, char* scratch)
      : c_(call), b_(part), later_(later), slices_(call.inputs), blocks_((part.rows + kSide - 1) / kSide), panels_((part.cols + kSide - 1) / kSide),
        group_(kOnePanel<parts> ? 1 : panels_), tasks_(panels_ / group_ * slices_.count),
        rows_stay_(kOnePanel<parts> && blocks_ * slices_.steps * kStepBytes <= kRowBytes), packed_(packed), weights_(scratch),
        sums_(reinterpret_cast<float*>(scratch + group_ * kSteps * kStepBytes)) {}

  // Bit n of what it returns: the weights of the n-th panel do not split.
  uint32_t run() {
    const TileScope tiles;
    for (int64_t t = 0; t < tasks_; ++t) {
      const Task now = task(t);
      const int64_t steps = slices_.here(now.slice);
      for (int64_t n = 0; n < group_; ++n) pack(now.first + n, now.slice, weights_ + n * steps * kStepBytes);
      fetch_after(t);
      for (int64_t i = 0; i < blocks_; ++i) {
        for (int64_t n = 0; n < group_; ++n) multiply(weights_ + n * steps * kStepBytes, x(now.slice, i), steps, sums(now.first + n, i), now.slice == 0);
      }
      if (now.slice + 1 < slices_.count) continue;
      if (rows_stay_) finish(now.first, now.first + group_);
      else if (t + 1 == tasks_) finish(0, panels_);
    }
    uint32_t bad = 0;
    if constexpr (parts > 1) {
      for (int64_t n = 0; n < panels_; ++n) bad |= static_cast<uint32_t>(!range_[n].splits(kLeastExponent)) << n;
    }
    return bad;
  }

 private:
  static constexpr int parts = parts_of<T>;
  static constexpr int64_t kStepBytes = parts * kPartBytes, kSquare = kSide * kSide, kSquareLines = kSquare * sizeof(float) / 64;
  struct Task { int64_t first, slice; };  // panels [first, first + group)

  // Where all of x stays in the second-level cache, a panel is done at once; else a slice of x, which has to come there, serves all panels.
  Task task(int64_t t) const {
    const int64_t groups = panels_ / group_;
    return rows_stay_ ? Task{t / slices_.count * group_, t % slices_.count} : Task{t % groups * group_, t / groups};
  }
  const T* weight(int64_t panel) const { return weight_row(b_.col + panel * kSide); }
  const T* weight_row(int64_t row) const { return static_cast<const T*>(c_.weight) + row * c_.weight_row; }
  const char* x(int64_t slice, int64_t block) const { return packed_ + (slice * blocks_ + block) * slices_.length * kStepBytes; }
  float* sums(int64_t panel, int64_t block) const {
    return sums_ + (((rows_stay_ ? 0 : panel / group_) * blocks_ + block) * group_ + panel % group_) * kSquare;
  }

  void pack(int64_t panel, int64_t slice, char* to) {
    const int64_t count = std::min(kSide, b_.cols - panel * kSide);
    const T* rows[kSide];
    for (int64_t r = 0; r < count; ++r) rows[r] = weight(panel) + r * c_.weight_row;
    UnitRows<T> from(rows, count, c_.weight_col, c_.inputs);
    for (int64_t s = 0; s < slices_.here(slice); ++s, to += kStepBytes) {
      from.step(slice * slices_.length + s);
      for (int64_t r = 0; r < kSide; ++r) {
        __m512i units[parts];
        from.read(r, units, range_[panel]);
        for (int p = 0; p < parts; ++p) _mm512_store_si512(to + p * kPartBytes + r * 64, units[p]);
      }
    }
  }

  // While task t is done: the next one's weights, or the next block's first; and of x, where not all of it stays, what this panel's share of the next
  // slice is, or the next blocks.
  void fetch_after(int64_t t) {
    const Task now = task(t), next = t + 1 < tasks_ ? task(t + 1) : Task{};
    const int64_t visits = blocks_ * group_ * slices_.here(now.slice);
    const auto at_a_time = [&](int64_t lines) { return (lines + visits - 1) / visits; };
    weights_ahead_ = x_ahead_ = {};
    if ((t + 1 < tasks_ || later_.cols > 0) && c_.weight_col == 1) {
      const T* const row = t + 1 < tasks_ ? weight(next.first) : weight_row(later_.col);
      const int64_t lines = (slices_.here(next.slice) * kStep * static_cast<int64_t>(sizeof(T)) + 63) / 64;
      weights_ahead_ = {reinterpret_cast<const char*>(row + next.slice * slices_.length * kStep), c_.weight_row * static_cast<int64_t>(sizeof(T)), lines,
                        at_a_time(lines * group_ * kSide)};
    }
    if (!rows_stay_ && now.slice + 1 < slices_.count) {
      const int64_t lines = blocks_ * slices_.length * kStepBytes / 64 * group_ / panels_;
      const char* const from = kOnePanel<parts> ? x(now.slice + 1, 0) + now.first * lines * 64 : x(now.slice, 1);
      x_ahead_ = {from, lines * 64, lines, at_a_time(lines)};
    }
  }

  // c (+)= a . b: weights, from the first-level cache, times x, which goes by. The next block's sums come nearer meanwhile.
  void multiply(const char* a, const char* b, int64_t steps, float* c, bool first) {
    constexpr int64_t a_part = kPartBytes;
    constexpr bool a_streams = false, b_streams = kOnePanel<parts>;
    const int64_t lines = (kSquareLines + steps - 1) / steps;
    const char* next = reinterpret_cast<const char*>(c + kSquare);
    alignas(64) float fresh[kSquare];
    // float32: a slice is summed on its own before it is added, because rounding errors grow with the length of a chain of sums.
    const bool apart = parts == 3 && !first;
    take_sums(apart ? fresh : c, kSide, apart || first);
    for (int64_t s = 0; s < steps; ++s, a += kStepBytes, b += kStepBytes) {
      for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T0);
      weights_ahead_.fetch();
      x_ahead_.fetch();
      FUSEWIRE_AMX_STEP_OF_ALL(parts);
    }
    leave_sums(apart ? fresh : c, kSide);
    if (apart) {
#pragma omp simd
      for (int64_t j = 0; j < kSquare; ++j) c[j] += fresh[j];
    }
  }

  void finish(int64_t first, int64_t end) {
    const int64_t width = (end - first) * kSide;
    Epilogue<T> epilogue(c_, b_.col + first * kSide, std::min(width, b_.cols - first * kSide));
    alignas(64) float turned[16 * kLinearCols];
    for (int64_t r = 0; r < b_.rows; r += 16) {
      for (int64_t n = 0; n < width; n += 16) {
        const float* const from = sums(first + n / kSide, r / kSide) + n % kSide * kSide + r % kSide;
        __m512 square[16];
        for (int64_t i = 0; i < 16; ++i) square[i] = _mm512_load_ps(from + i * kSide);
        transpose16(square);
        for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(turned + i * width + n, square[i]);
      }
      epilogue.rows(b_.row + r, std::min<int64_t>(16, b_.rows - r), turned, width);
    }
  }

  const LinearCall& c_;
  const LinearBlock &b_, &later_;
  const Slices slices_;
  const int64_t blocks_, panels_, group_, tasks_;
  const bool rows_stay_;
  const char* const packed_;
  char* const weights_;  // [panels of a group][steps of a slice]
  float* const sums_;    // [groups, or the one at work][blocks][panels of a group][32 weights][32 rows]
  Range range_[kLinearCols / kSide];
  RowsAhead weights_ahead_, x_ahead_;
};

uint32_t linear_pack(const LinearCall& c, int64_t row, int64_t block, int64_t blocks, char* packed, ScalarKind type) {
  return with_type(type, [&](auto t) { return pack_rows<decltype(t)>(c, row, block, blocks, packed); });
}
uint32_t linear_columns(const LinearCall& c, const LinearBlock& b, const LinearBlock& later, const char* packed, char* scratch, ScalarKind type) {
  return with_type(type, [&](auto t) { return Columns<decltype(t)>(c, b, later, packed, scratch).run(); });
}

}  // namespace fusewire::FUSEWIRE_ISA
