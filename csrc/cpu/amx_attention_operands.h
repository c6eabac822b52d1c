// Packing for attention on AMX tiles: keys and values of one head, and 32 queries of it, as parts in bfloat16 (amx.h) in the order in which
// the two products read them.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/attention.h"
#include "cpu/attention_pack.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int64_t kQueryBlock = kSide;
static_assert(kQueryBlock == kAttentionAmxQueryBlock && kLanes == 16);

// The sum of the squares of a row's elements, from its units; of their highest parts alone where there are several.
inline __m512 squares_of(__m512 sum, __m512i unit) { return _mm512_dpbf16_ps(sum, (__m512bh)unit, (__m512bh)unit); }

template <typename T>
class AmxOperands {
 public:
  static constexpr int parts = parts_of<T>;

  AmxOperands(const AttentionCall& call, const AttentionTask& task)
      : call_(call), task_(task), steps_((call.channels + kStep - 1) / kStep), columns_(steps_ * kStep) {}

  int64_t bytes_for(int64_t keys) const { return keys * columns_ * parts * static_cast<int64_t>(sizeof(bfloat16)); }

  // Keys [first, first + count), as the left operand: [block of 32 keys][step][part][2 tiles][key][units]. Those beyond the last are zeros.
  // False where a row does not split. `longest` becomes the largest sum of squares.
  bool pack_keys(int64_t first, int64_t count, char* packed, float& longest) const {
    __m512 most = _mm512_setzero_ps();
    for (int64_t key = 0; key < round_up(count, kSide); ++key) {
      __m512i units[kMaxSteps * parts];
      if (key < count) {
        prefetch_row(row_of<T>(call_.k, task_.batch, key_head(), std::min(first + key + kFar, call_.keys - 1)), call_.channels);
        if (!stage(call_.k, key_head(), first + key, units)) return false;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t s = 0; s < steps_; ++s) squares = squares_of(squares, units[s * parts]);
        most = _mm512_max_ps(_mm512_set1_ps(_mm512_reduce_add_ps(squares)), most);
      } else {
        std::fill_n(units, steps_ * parts, _mm512_setzero_si512());
      }
      char* to = packed + key / kSide * steps_ * parts * kPartBytes + key % kSide * 64;
      for (int64_t i = 0; i < steps_ * parts; ++i) _mm512_store_si512(to + i * kPartBytes, units[i]);
    }
    longest = _mm512_cvtss_f32(most);
    return true;
  }

  // Queries, as the right operand: [step][part][2 tiles of 16 queries][unit][query]. `squares` becomes the sum of squares of each.
  bool pack_queries(int64_t query, int64_t rows, char* packed, float* squares) const {
    for (int64_t r = 0; r < kQueryBlock; ++r) {  // those of the next block, which will be wanted after a while
      prefetch_row(row_of<T>(call_.q, task_.batch, task_.head, std::min(query + kQueryBlock + r, call_.queries - 1)), call_.channels);
    }
    for (int64_t tile = 0; tile < 2; ++tile) {
      __m512i units[16][kMaxSteps * parts];
      for (int64_t r = 0; r < 16; ++r) {
        if (tile * 16 + r < rows) {
          if (!stage(call_.q, task_.head, query + tile * 16 + r, units[r])) return false;
        } else {
          std::fill_n(units[r], steps_ * parts, _mm512_setzero_si512());
        }
      }
      __m512 sums = _mm512_setzero_ps();
      for (int64_t i = 0; i < steps_ * parts; ++i) {
        __m512 square[16];
        for (int64_t r = 0; r < 16; ++r) square[r] = _mm512_castsi512_ps(units[r][i]);
        transpose16(square);
        for (int64_t r = 0; r < 16; ++r) {
          _mm512_store_ps(packed + i * kPartBytes + tile * kTileBytes + r * 64, square[r]);
          if (i % parts == 0) sums = squares_of(sums, _mm512_castps_si512(square[r]));
        }
      }
      _mm512_store_ps(squares + tile * 16, sums);
    }
    return true;
  }

  // Values, transposed, as the left operand: [block of 32 channels][step of 32 keys][part][2 tiles][channel][pairs of keys]. `guard`: whether
  // a mask may hide some of them: 0 * NaN would leak from under it.
  bool pack_values(int64_t first, int64_t count, bool guard, char* packed) const {
    const int64_t key_steps = (count + kStep - 1) / kStep;
    Range range;
    for (int64_t s = 0; s < key_steps; ++s) {
      Row<T> rows[kStep];
      for (int64_t i = 0; i < kStep; ++i) {
        const int64_t key = first + s * kStep + i;
        prefetch_row(row_of<T>(call_.v, task_.batch, key_head(), std::min(key + kFar, call_.keys - 1)), call_.channels);
        rows[i] = s * kStep + i < count ? row_of<T>(call_.v, task_.batch, key_head(), key) : Row<T>{};
      }
      for (int64_t channel = 0; channel < columns_; channel += 16) {
        __m512 squares[parts][16];
        for (int64_t i = 0; i < 16; ++i) {
          const __m512 low = values(rows[2 * i], channel), high = values(rows[2 * i + 1], channel);
          range.add(low), range.add(high);
          __m512i units[parts];
          if constexpr (parts == 1) units[0] = pair(_mm512_castps_si512(low), _mm512_castps_si512(high));
          else split_pair<parts>(low, high, units);
          for (int p = 0; p < parts; ++p) squares[p][i] = _mm512_castsi512_ps(units[p]);
        }
        char* to = packed + (channel / kSide * key_steps + s) * parts * kPartBytes + channel / 16 % 2 * kTileBytes;
        for (int p = 0; p < parts; ++p) {
          transpose16(squares[p]);
          for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(to + p * kPartBytes + i * 64, squares[p][i]);
        }
      }
    }
    return parts == 1 ? !guard || range.splits(kAnyExponent) : range.splits(kLeastExponent);
  }

 protected:
  using Staged = std::conditional_t<parts == 1, bfloat16, float>;
  static constexpr int64_t kFar = 24;  // rows: one head's lie far apart, and come from beyond the second-level cache
  static constexpr int64_t kMaxSteps = kAttentionMaxChannels / kStep;
  static constexpr int kAnyExponent = -200;
  int64_t key_head() const { return task_.head / call_.group; }

  // A row of keys or queries as units of every step. False where it does not split.
  bool stage(const AttentionTensor (&pieces)[2], int64_t head, int64_t token, __m512i* units) const {
    const Row<T> row = row_of<T>(pieces, task_.batch, head, token);
    if constexpr (parts == 1) {
      if (row.stride == 1 && row.as_stored()) {
        for (int64_t s = 0; s < steps_; ++s) units[s] = _mm512_maskz_loadu_epi16(first_lanes(call_.channels - s * kStep), row.data + s * kStep);
        return true;
      }
    }
    alignas(64) Staged staged[kPadded];
    stage_row<std::conditional_t<parts == 1, Bf16Units, FloatUnits>>(row, call_.channels, columns_, call_.eps, reinterpret_cast<uint32_t*>(staged));
    Range range;
    for (int64_t s = 0; s < steps_; ++s) {
      __m512i step[parts];
      units_of<parts>(static_cast<const Staged*>(staged + s * kStep), step, range);
      for (int p = 0; p < parts; ++p) units[s * parts + p] = step[p];
    }
    return parts == 1 || range.splits(kLeastExponent);
  }

  // 16 channels of one value as floats; zeros beyond the last channel, and where there is no row.
  __m512 values(const Row<T>& row, int64_t channel) const {
    const int64_t left = row.data ? call_.channels - channel : 0;
    if (left <= 0) return _mm512_setzero_ps();
    const __mmask16 mask = static_cast<__mmask16>(first_lanes(left));
    if (row.stride != 1) {
      alignas(64) float wide[16] = {};
      for (int64_t i = 0; i < std::min<int64_t>(left, 16); ++i) wide[i] = to_float(row.data[(channel + i) * row.stride]);
      return _mm512_load_ps(wide);
    }
    if constexpr (std::is_same_v<T, float>) return _mm512_maskz_loadu_ps(mask, row.data + channel);
    const __m256i raw = _mm256_maskz_loadu_epi16(mask, row.data + channel);
    if constexpr (std::is_same_v<T, float16>) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }

  static __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

  const AttentionCall& call_;
  const AttentionTask& task_;
  const int64_t steps_, columns_;  // of 32 channels; channels rounded up to them
};

}  // namespace fusewire::FUSEWIRE_ISA
