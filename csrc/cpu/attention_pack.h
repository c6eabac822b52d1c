// Packing for the attention tiles: rows of any layout and dtype become 32-bit units (one float, or a pair of bf16), laid out so that
// a tile reads both of its operands in order.
//   queries  [group of 6 rows][unit along D][6]          read one unit at a time and splatted
//   keys     [panel of columns][unit along D][key]       keys across the lanes
//   values   [panel of columns][unit along keys][channel]  channels across the lanes
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/attention_simd.h"
#include "cpu/scratch.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int kRows = 6;                               // query rows of a tile
constexpr int kPanel = kTileVectors * kLanes;          // columns of a tile
constexpr double kLog2e = 1.44269504088896341;
constexpr int64_t kPadded = kAttentionMaxChannels + kLanes;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What the softmax of a query was, where it is asked for: weights 2^((logit - highest) * factor) that sum to `total`.
inline void put_softmax(const AttentionCall& call, const AttentionTask& task, int64_t query, float highest, float factor, double total) {
  if (!call.total) return;
  const int64_t at = (task.batch * call.heads + task.head) * call.softmax_rows + query;
  call.highest[at] = static_cast<double>(highest) * (static_cast<double>(factor) / kLog2e);
  call.total[at] = total;
}

// Scratch memory of one thread: grows to the largest size asked for (a few MiB, whatever the sequence), and stays.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    static thread_local Block block;
    count_scratch(Scratch::attention, bytes);
    if (block.bytes < bytes) {
      std::free(block.data);
      block.bytes = 0;
      block.data = static_cast<char*>(std::aligned_alloc(64, bytes));
      if (!block.data) throw std::bad_alloc();
      block.bytes = bytes;
    }
    next_ = block.data;
  }
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return p;
  }
  template <typename T>
  static size_t bytes_of(int64_t count) { return round_up(count * sizeof(T), 64); }

 private:
  struct Block {
    char* data = nullptr;
    size_t bytes = 0;
    ~Block() { std::free(data); }
  };
  char* next_;
};

// The row of token t in a pair of pieces: its address, its stride, its norm weight, and the cosines and sines of its angles.
template <typename T>
struct Row {
  const T* data = nullptr;
  int64_t stride = 0;
  const double* weight = nullptr;
  const float *cos = nullptr, *sin = nullptr;
  bool as_stored() const { return !weight && !cos; }
};
template <typename T>
inline Row<T> row_of(const AttentionTensor (&pieces)[2], int64_t batch, int64_t head, int64_t t) {
  const bool second = t >= pieces[0].tokens;
  const AttentionTensor& x = pieces[second];
  if (second) t -= pieces[0].tokens;
  const T* data = static_cast<const T*>(x.data) + batch * x.batch + head * x.head + t * x.token;
  return {data, x.channel, x.weight, x.cos + t * x.angles, x.sin + t * x.angles};
}

// Rows of one head lie far apart: the processor does not foresee the next one.
constexpr int64_t kAhead = 12;
template <typename T>
inline void prefetch_row(const Row<T>& row, int64_t channels) {
  const char* p = reinterpret_cast<const char*>(row.data);
  for (int64_t at = 0; at < channels * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(p + at);
}

// A row as floats.
template <typename T>
inline void load_row(const Row<T>& row, int64_t channels, float* out) {
  int64_t i = 0;
  if (row.stride == 1) {
    if constexpr (std::is_same_v<T, float16>) {
      for (; i + kLanes <= channels; i += kLanes) load_f16(row.data + i, out + i);
    }
    for (; i < channels; ++i) out[i] = to_float(row.data[i]);
  } else {
    for (; i < channels; ++i) out[i] = to_float(row.data[i * row.stride]);
  }
}

// x * rsqrt(mean(x^2) + eps) * weight, in place. The order of the sum does not depend on anything but the number of channels.
inline void rms_norm(float* x, int64_t channels, const double* weight, float eps) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < channels; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(channels) + eps);
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) x[i] = x[i] * scale * static_cast<float>(weight[i]);
}

// (a, b) -> (a cos - b sin, b cos + a sin) for each pair, in place.
template <typename C>
inline void turn_pairs(C* x, int64_t channels, const float* cos, const float* sin) {
#pragma omp simd
  for (int64_t i = 0; i < channels / 2; ++i) {
    const C a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

// What is done to a row of floats on the way in.
template <typename T>
inline void prepare(const Row<T>& row, int64_t channels, float eps, float* x) {
  if (row.weight) rms_norm(x, channels, row.weight, eps);
  if (row.cos) turn_pairs(x, channels, row.cos, row.sin);
}

// A row as units, `padded` elements long with zeros at the end; normalised and turned where the row asks for it, rounded once if the unit is bf16.
template <typename Units, typename T>
inline void stage_row(const Row<T>& row, int64_t channels, int64_t padded, float eps, uint32_t* units) {
  if constexpr (Units::pack == 1) {
    float* out = reinterpret_cast<float*>(units);
    load_row(row, channels, out);
    prepare(row, channels, eps, out);
    for (int64_t i = channels; i < padded; ++i) out[i] = 0;
  } else {
    bfloat16* out = reinterpret_cast<bfloat16*>(units);
    if (!row.as_stored()) {
      alignas(64) float wide[kPadded];
      load_row(row, channels, wide);
      prepare(row, channels, eps, wide);
      for (int64_t i = 0; i < channels; ++i) out[i] = from_float<bfloat16>(wide[i]);
    } else if (row.stride == 1) {
      std::memcpy(out, row.data, channels * sizeof(bfloat16));
    } else {
      for (int64_t i = 0; i < channels; ++i) out[i] = row.data[i * row.stride];
    }
    for (int64_t i = channels; i < padded; ++i) out[i] = {0};
  }
}

// Query rows [begin, begin + rows), kPadded units apart; rows beyond are zeros up to a whole group.
template <typename Units, typename T>
inline void pack_queries(const AttentionCall& call, const AttentionTask& task, int64_t begin, int64_t rows, uint32_t* packed) {
  const int64_t units = (call.channels + Units::pack - 1) / Units::pack;
  for (int64_t r = 0; r < rows; ++r) {
    prefetch_row(row_of<T>(call.q, task.batch, task.head, std::min(begin + r + kAhead, call.queries - 1)), call.channels);
    const Row<T> row = row_of<T>(call.q, task.batch, task.head, begin + r);
    stage_row<Units>(row, call.channels, units * Units::pack, call.eps, packed + r * kPadded);
  }
  for (int64_t r = rows; r < round_up(rows, kRows); ++r) std::memset(packed + r * kPadded, 0, units * sizeof(uint32_t));
}

// Keys [begin, begin + count). A panel starts at packed + first * units and is as wide as its keys, rounded up to whole vectors.
template <typename Units, typename T>
inline void pack_keys(const AttentionCall& call, const AttentionTask& task, int64_t begin, int64_t count, uint32_t* packed) {
  const int64_t units = (call.channels + Units::pack - 1) / Units::pack;
  alignas(64) uint32_t staged[kLanes][kPadded];
  for (int64_t first = 0; first < count; first += kPanel) {
    const int64_t width = round_up(std::min<int64_t>(kPanel, count - first), kLanes);
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      uint32_t* out = packed + first * units + lane;
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t key = first + lane + i;
        if (key < count) {
          prefetch_row(row_of<T>(call.k, task.batch, task.head / call.group, std::min(begin + key + kAhead, call.keys - 1)), call.channels);
          const Row<T> row = row_of<T>(call.k, task.batch, task.head / call.group, begin + key);
          stage_row<Units>(row, call.channels, units * Units::pack, call.eps, staged[i]);
        } else {
          std::memset(staged[i], 0, units * sizeof(uint32_t));
        }
      }
      for (int64_t u = 0; u < units; ++u) {
        for (int64_t i = 0; i < kLanes; ++i) out[u * width + i] = staged[i][u];
      }
    }
  }
}

// Values [begin, begin + count), key pairs interleaved where a unit is a pair. A panel of columns starts at packed + column * units.
// Returns how many keys have an infinity or NaN among their values when `guard` is set: those are packed as zeros and listed in
// `poisoned`, because 0 * NaN would leak out of a masked key; the caller adds them where they are attended.
template <typename Units, typename T>
inline int64_t pack_values(const AttentionCall& call, const AttentionTask& task, int64_t begin, int64_t count, bool guard, uint32_t* packed,
                           int32_t* poisoned) {
  constexpr int pack = Units::pack;
  const int64_t units = (count + pack - 1) / pack, columns = round_up(call.channels, kLanes);
  alignas(64) uint32_t staged[pack][kPadded];
  int64_t bad = 0;
  for (int64_t u = 0; u < units; ++u) {
    for (int i = 0; i < pack; ++i) {
      const int64_t key = u * pack + i;
      if (key < count) {
        Row<T> row = row_of<T>(call.v, task.batch, task.head / call.group, begin + key);
        row.weight = nullptr;
        prefetch_row(row_of<T>(call.v, task.batch, task.head / call.group, std::min(begin + key + kAhead, call.keys - 1)), call.channels);
        stage_row<Units>(row, call.channels, columns, 0, staged[i]);
      }
      bool zero = key >= count;
      if (guard && !zero) {
        alignas(64) float wide[kPadded];
        load_row(row_of<T>(call.v, task.batch, task.head / call.group, begin + key), call.channels, wide);
        int finite = 1;
        for (int64_t c = 0; c < call.channels; ++c) finite &= std::fabs(wide[c]) <= 3.4028235e38f;
        if (!finite) {
          zero = true;
          poisoned[bad++] = static_cast<int32_t>(key);
        }
      }
      if (zero) std::memset(staged[i], 0, columns * sizeof(uint32_t) / pack);
    }
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, columns - column);
      uint32_t* out = packed + column * units + u * width;
      if constexpr (pack == 1) {
        std::memcpy(out, staged[0] + column, width * sizeof(uint32_t));
      } else {
        const uint16_t* low = reinterpret_cast<const uint16_t*>(staged[0]) + column;
        const uint16_t* high = reinterpret_cast<const uint16_t*>(staged[1]) + column;
        for (int64_t c = 0; c < width; ++c) out[c] = low[c] | static_cast<uint32_t>(high[c]) << 16;
      }
    }
  }
  return bad;
}

}  // namespace fusewire::FUSEWIRE_ISA
