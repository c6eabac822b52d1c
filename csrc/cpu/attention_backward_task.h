// The gradients of attention, block by block (Dao et al. 2022, "FlashAttention", algorithm 4), over a policy that multiplies blocks of 32 x 32.
//
//   S = scale Q K^T + mask    P = exp(S - highest) / total    dP = dO V^T    dS = P (dP - delta)    delta = sum(dO * O) - dlse
//   dV = P^T dO               dK = scale dS^T Q                  dQ = scale dS K
//
// P and dS exist only as one square of 32 queries x 32 keys at a time, and packed as operands for a few squares more. dV and dK are summed
// transposed, [channel][key], so that P and dS enter every product as they lie. One thread owns a key head: every sum has one order. Where one block
// has all keys, queries come a block at a time too: everything stays in the cache.
//
// A policy has kBytes, of a packed square of the floats x[32][32], whose rows are `stride` apart, and
//   rows(x, stride, to)       a[r][k] = x[r][k], the left operand
//   rows_right(x, stride, to) b[k][c] = x[c][k], the right operand
//   cols(x, stride, to)       a[r][k] = x[k][r]
//   cols_right(x, stride, to) b[k][c] = x[k][c]
//   multiply<Cols>(a, b, extent, c, first)   c[32][32] (+)= the sum over packed squares, of which `a` was packed by cols or by rows; what lies beyond
//                             the extent is zeros, and need not be multiplied
//   exp2(x)                   of as many digits as the policy's products keep
//   splits()                  whether everything packed so far can be multiplied
//   kPlain                    all but rows_right are copies: a square of P or dS is packed as it lies, and one of q or dO for both of its products
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/transpose16.h"
#include "cpu/attention_backward.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_pattern.h"
#include "cpu/attention_tiles.h"

namespace fusewire::FUSEWIRE_ISA {

// How much of a product of packed squares there is: rows and columns of the one square that it makes, and the length of its sums.
struct Extent { int64_t rows, columns, depth; };

// Packed squares of which a product sums over some, `step` bytes from one to the next.
struct Operand { const char* data; int64_t step; };

// to[k][r] = x[r][k], 32 x 32 floats.
inline void transpose_square(const float* x, int64_t stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  for (int64_t r = 0; r < 32; r += 16) {
    for (int64_t k = 0; k < 32; k += 16) {
      __m512 square[16];
      for (int64_t i = 0; i < 16; ++i) square[i] = _mm512_loadu_ps(x + (r + i) * stride + k);
      transpose16(square);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_ps(to + (k + i) * to_stride + r, square[i]);
    }
  }
#else
  for (int64_t r = 0; r < 32; ++r) {
    for (int64_t k = 0; k < 32; ++k) to[k * to_stride + r] = x[r * stride + k];
  }
#endif
}

template <typename T, typename Policy>
class AttentionBackward {
  static constexpr int64_t kSquare = kPatternBlock, kBlock = 128, kSquares = kBlock / kSquare;  // of a block of queries, or of keys
  static constexpr int64_t kBytes = Policy::kBytes, kCopies = Policy::kPlain ? 1 : 2;

 public:
  AttentionBackward(const AttentionBackwardCall& call, const AttentionBackwardTask& task)
      : call_(call), task_(task), channel_squares_((call.channels + kSquare - 1) / kSquare), columns_(channel_squares_ * kSquare),
        query_squares_((call.queries + kSquare - 1) / kSquare), key_squares_((call.keys + kSquare - 1) / kSquare),
        span_(key_squares_ <= kSquares ? std::min(kSquares, query_squares_) : query_squares_),
        masked_(call.mask.data || call.causal || call.pattern.blocks), whole_(std::is_same_v<T, float> && key_squares_ <= kSquares) {}

  bool run() {
    const int64_t queries = span_ * kSquare, keys = key_squares_ * kSquare, operand = channel_squares_ * kBytes;
    const auto floats = [](int64_t n) { return Workspace::bytes_of<float>(n); };
    const int64_t block = kSquares * kSquares * kBytes;  // of P or dS
    Workspace space(3 * key_squares_ * operand + 2 * kCopies * span_ * operand + (1 + kCopies) * block + Workspace::bytes_of<Pair>(queries) +
                    3 * floats(queries) + floats(queries * columns_) + 2 * floats(keys * columns_) + floats(kSquare * columns_));
    const auto take = [&](int64_t squares) { return space.template take<char>(squares * operand); };
    k_rows_ = take(key_squares_), k_cols_ = take(key_squares_), v_rows_ = take(key_squares_);
    q_rows_ = take(span_), grad_rows_ = take(span_);
    q_cols_ = Policy::kPlain ? q_rows_ : take(span_), grad_cols_ = Policy::kPlain ? grad_rows_ : take(span_);
    weights_ = space.template take<char>(block), slopes_ = space.template take<char>(block);
    slopes_rows_ = Policy::kPlain ? slopes_ : space.template take<char>(block);
    base_ = space.template take<Pair>(queries);
    inverse_ = space.template take<float>(queries), delta_ = space.template take<float>(queries), lse_ = space.template take<float>(queries);
    q_grad_ = space.template take<float>(queries * columns_);
    k_grad_ = space.template take<float>(keys * columns_), v_grad_ = space.template take<float>(keys * columns_);
    staged_ = space.template take<float>(kSquare * columns_);

    pack(call_.k, task_.head, 0, call_.keys, key_squares_, 1, k_rows_, k_cols_, &Policy::rows_right, &Policy::cols_right);
    pack(call_.v, task_.head, 0, call_.keys, key_squares_, 1, v_rows_, nullptr, &Policy::rows_right, nullptr);
    if (!policy_.splits()) return false;
    // dO as numbers near one, by a power of two that is divided out again: a small loss scale must not push parts of it into denormals.
    // Floats that are multiplied as they are have no parts.
    if (!Policy::kPlain) power_ = power_of_gradients();
    std::fill_n(k_grad_, keys * columns_, 0.0f);
    std::fill_n(v_grad_, keys * columns_, 0.0f);
    for (int64_t h = 0; h < call_.group; ++h) {
      head_ = task_.head * call_.group + h;
      for (first_ = 0; first_ < query_squares_; first_ += span_) {
        pack(call_.q, head_, first_, call_.queries, span_, 1, q_rows_, Policy::kPlain ? nullptr : q_cols_, &Policy::rows, &Policy::cols);
        pack(call_.grad, head_, first_, call_.queries, span_, power_, grad_rows_, Policy::kPlain ? nullptr : grad_cols_, &Policy::rows, &Policy::cols);
        if (!policy_.splits()) return false;
        prepare_rows();
        std::fill_n(q_grad_, queries * columns_, 0.0f);
        const int64_t last = std::min(first_ + span_, query_squares_);
        for (int64_t key = 0; key < key_squares_; key += kSquares) {
          for (int64_t query = first_; query < last; query += kSquares) {
            if (sees(query, std::min(query + kSquares, last), key, std::min(key + kSquares, key_squares_))) meet(query, key);
          }
        }
        write(q_grad_, false, head_, call_.heads, first_ * kSquare, std::min(last * kSquare, call_.queries), call_.queries,
              static_cast<float>(call_.scale) / power_, static_cast<T*>(call_.q_grad));
      }
    }
    const int64_t key_heads = call_.heads / call_.group;
    write(k_grad_, true, task_.head, key_heads, 0, call_.keys, call_.keys, static_cast<float>(call_.scale) / power_, static_cast<T*>(call_.k_grad));
    write(v_grad_, true, task_.head, key_heads, 0, call_.keys, call_.keys, 1 / power_, static_cast<T*>(call_.v_grad));
    return true;
  }

 private:
  using Pack = void (Policy::*)(const float*, int64_t, char*);

  Row<T> row(const AttentionTensor& x, int64_t head, int64_t t) const {
    return {static_cast<const T*>(x.data) + task_.batch * x.batch + head * x.head + t * x.token, x.channel, nullptr};
  }

  // `squares` squares of the `tokens` of a head, from `first` on: `along` as [square of tokens][square of channels], summed over channels; `across` as
  // [channels][tokens], summed over tokens.
  void pack(const AttentionTensor& x, int64_t head, int64_t first, int64_t tokens, int64_t squares, float factor, char* along, char* across,
            Pack pack_along, Pack pack_across) {
    for (int64_t s = 0; s < squares; ++s) {
      for (int64_t r = 0; r < kSquare; ++r) {
        float* to = staged_ + r * columns_;
        const int64_t t = (first + s) * kSquare + r;
        if (t < tokens) {
          prefetch_row(row(x, head, std::min(t + kAhead, tokens - 1)), call_.channels);
          load_row(row(x, head, t), call_.channels, to);
          if (factor != 1) {
            for (int64_t c = 0; c < call_.channels; ++c) to[c] *= factor;
          }
          std::fill(to + call_.channels, to + columns_, 0.0f);
        } else {
          std::fill_n(to, columns_, 0.0f);
        }
      }
      for (int64_t c = 0; c < channel_squares_; ++c) {
        (policy_.*pack_along)(staged_ + c * kSquare, columns_, along + (s * channel_squares_ + c) * kBytes);
        if (across) (policy_.*pack_across)(staged_ + c * kSquare, columns_, across + (c * squares + s) * kBytes);
      }
    }
  }

  float power_of_gradients() {
    vf lanes = vset(0);
    std::fill_n(staged_, columns_, 0.0f);
    for (int64_t h = 0; h < call_.group; ++h) {
      const int64_t head = task_.head * call_.group + h;
      for (int64_t t = 0; t < call_.queries; ++t) {
        prefetch_row(row(call_.grad, head, std::min(t + kAhead, call_.queries - 1)), call_.channels);
        load_row(row(call_.grad, head, t), call_.channels, staged_);
        for (int64_t c = 0; c < columns_; c += kLanes) {  // NaN is passed over
          const vf x = vload(staged_ + c);
          lanes = vmax(x, vmax(vsub(vset(0), x), lanes));
        }
      }
    }
    const float highest = vmax_of(lanes);
    if (!(highest > 0) || !(highest <= 3.4028235e38f)) return 1;
    return std::ldexp(1.0f, std::clamp(-std::ilogb(highest), -126, 126));
  }

  // A number as the sum of two floats.
  struct Pair { float high, low; };
  static Pair split(double x) {
    const float high = static_cast<float>(x);
    return {high, std::isfinite(high) ? static_cast<float>(x - static_cast<double>(high)) : 0.0f};
  }

  // base: the highest logit; inverse: of the total, 0 where a query attends to nothing; delta. Exponents are in base 2, but natural where there
  // is a mask: its lowest number would overflow.
  void prepare_rows() {
    float *grad = staged_, *out = staged_ + columns_;
    const int64_t at = (task_.batch * call_.heads + head_) * call_.softmax_rows;
    std::fill_n(staged_, 2 * columns_, 0.0f);
    for (int64_t i = 0; i < span_ * kSquare; ++i) {
      const int64_t t = first_ * kSquare + i;
      base_[i] = {0, 0};
      inverse_[i] = delta_[i] = lse_[i] = 0;
      if (t >= call_.queries || call_.total[at + t] == 0) continue;
      prefetch_row(row(call_.out, head_, std::min(t + kAhead, call_.queries - 1)), call_.channels);
      load_row(row(call_.grad, head_, t), call_.channels, grad);
      load_row(row(call_.out, head_, t), call_.channels, out);
      double sum = dot(grad, out);
      if (call_.lse_grad) {
        sum -= call_.lse_grad[at + t];
        lse_[i] = static_cast<float>(call_.lse_grad[at + t] * static_cast<double>(power_));
      }
      delta_[i] = static_cast<float>(sum * static_cast<double>(power_));
      inverse_[i] = static_cast<float>(1 / call_.total[at + t]);
      base_[i] = split(call_.highest[at + t] * (masked_ ? 1.0 : kLog2e));
    }
  }

  // Of two rows of floats with zeros at their end, in float64.
  double dot(const float* a, const float* b) const {
    constexpr int64_t kSums = 8;
    double sums[kSums]{};
    for (int64_t c = 0; c < columns_; c += kSums) {
      for (int64_t l = 0; l < kSums; ++l) sums[l] += static_cast<double>(a[c + l]) * static_cast<double>(b[c + l]);
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }

  // Whether some of these squares of queries may see some of these squares of keys.
  bool sees(int64_t query, int64_t query_end, int64_t key, int64_t key_end) const {
    if (call_.causal && query_end <= key) return false;
    if (!call_.pattern.blocks) return true;
    return pattern_sees(call_.pattern, {task_.batch, head_, 0, 0}, query * kSquare, query_end * kSquare, key * kSquare, key_end * kSquare);
  }

  // Up to 4 x 4 squares of queries and keys.
  void meet(int64_t query, int64_t key) {
    const int64_t q_count = std::min(kSquares, query_squares_ - query), k_count = std::min(kSquares, key_squares_ - key);
    const int64_t at_once = whole_ ? k_count : 1, own = query - first_;  // own: of the queries that are packed
    for (int64_t i = 0; i < q_count; ++i) {
      for (int64_t first = 0; first < k_count; first += at_once) {
        for (int64_t j = first; j < first + at_once; ++j) {
          float *logits = scores(weights_, logits_, i, j), *slopes = scores(slopes_, slopes_wide_, i, j);
          if (!sees(query + i, query + i + 1, key + j, key + j + 1)) {
            std::fill_n(logits, kSquare * kSquare, 0.0f);
            std::fill_n(slopes, kSquare * kSquare, 0.0f);
            continue;
          }
          const int64_t q_at = (own + i) * channel_squares_ * kBytes, k_at = (key + j) * channel_squares_ * kBytes;
          const Extent extent{kSquare, within(key + j, call_.keys), call_.channels};
          Policy::template multiply<false>({q_rows_ + q_at, kBytes}, {k_rows_ + k_at, kBytes}, extent, logits, true);
          Policy::template multiply<false>({grad_rows_ + q_at, kBytes}, {v_rows_ + k_at, kBytes}, extent, slopes, true);
          weigh(query + i, key + j, logits, slopes);
        }
        if (whole_) normalise((own + i) * kSquare, i, k_count);
        for (int64_t j = first; j < first + at_once; ++j) {
          const float* weights = scores(weights_, logits_, i, j);
          float* slopes = scores(slopes_, slopes_wide_, i, j);
          slope((own + i) * kSquare, weights, slopes);
          if constexpr (!Policy::kPlain) {
            policy_.cols_right(weights, kSquare, weights_ + (j * kSquares + i) * kBytes);
            policy_.cols_right(slopes, kSquare, slopes_ + (j * kSquares + i) * kBytes);
            policy_.rows(slopes, kSquare, slopes_rows_ + (i * kSquares + j) * kBytes);
          }
        }
      }
    }
    // From here on squares of a block are summed over: those of queries, or of keys.
    const int64_t queries = std::min(q_count * kSquare, call_.queries - query * kSquare), keys = std::min(k_count * kSquare, call_.keys - key * kSquare);
    const int64_t next_query = Policy::kPlain ? channel_squares_ * kBytes : kBytes, next_key = Policy::kPlain ? kSquares * kBytes : kBytes;
    for (int64_t c = 0; c < channel_squares_; ++c) {
      const int64_t across = Policy::kPlain ? (own * channel_squares_ + c) * kBytes : (c * span_ + own) * kBytes, channels = within(c, call_.channels);
      for (int64_t j = 0; j < k_count; ++j) {
        const int64_t to = ((key + j) * channel_squares_ + c) * kSquare * kSquare, block = j * kSquares * kBytes;
        const Extent extent{channels, within(key + j, call_.keys), queries};
        Policy::template multiply<true>({grad_cols_ + across, next_query}, {weights_ + block, kBytes}, extent, v_grad_ + to, false);
        Policy::template multiply<true>({q_cols_ + across, next_query}, {slopes_ + block, kBytes}, extent, k_grad_ + to, false);
      }
      for (int64_t i = 0; i < q_count; ++i) {
        const char* slopes = slopes_rows_ + (Policy::kPlain ? i : i * kSquares) * kBytes;
        Policy::template multiply<false>({slopes, next_key}, {k_cols_ + (c * key_squares_ + key) * kBytes, kBytes}, {kSquare, channels, keys},
                                         q_grad_ + ((own + i) * channel_squares_ + c) * kSquare * kSquare, false);
      }
    }
  }

  // How many of `count` tokens or channels lie in the square `at`.
  static int64_t within(int64_t at, int64_t count) { return std::min(kSquare, count - at * kSquare); }

  // Where the floats of a square of P or dS are: in its place of the block where that is plain, otherwise in scratch memory, of which `whole_` keeps that
  // of all keys, the others that of the one square in hand.
  float* scores(char* block, float* scratch, int64_t i, int64_t j) const {
    if constexpr (Policy::kPlain) return reinterpret_cast<float*>(block + (j * kSquares + i) * kBytes);
    return scratch + (whole_ ? j : 0) * kSquare * kSquare;
  }

  // From S of a square (of queries, of keys) to P, in place; dP is 0 where a key is hidden or is not there.
  void weigh(int64_t query_square, int64_t key_square, float* logits, float* slopes) {
    const int64_t query = query_square * kSquare, key = key_square * kSquare, own = query - first_ * kSquare;
    const int32_t pattern = call_.pattern.blocks ? pattern_row(call_.pattern, task_.batch, head_, query)[key_square] : kFullBlock;
    const bool plain = !masked_ || (!call_.mask.data && pattern == kFullBlock && (!call_.causal || key + kSquare - 1 <= query));
    const int64_t keys = within(key_square, call_.keys);
    const Pair factor = split(masked_ ? call_.scale : call_.scale * kLog2e);
    alignas(64) float bias[kSquare];
    for (int64_t r = 0; r < kSquare; ++r) {
      float *s = logits + r * kSquare, *d = slopes + r * kSquare;
      const vf high = vset(base_[own + r].high), low = vset(base_[own + r].low);
      const vf inverse = vset(inverse_[own + r]), log2e = vset(static_cast<float>(kLog2e));
      if (plain) {
        for (int64_t i = 0; i < keys; i += kLanes) {  // s * factor - base, rounded once where it is near zero, that is where it counts
          const vf logit = vload(s + i), x = vadd(vfma(logit, vset(factor.high), vsub(vset(0), high)), vsub(vmul(logit, vset(factor.low)), low));
          vstore(s + i, vmul(Policy::exp2(masked_ ? vmul(x, log2e) : x), inverse));
        }
      } else {
        std::fill_n(bias, kSquare, 0.0f);
        if (call_.mask.data && query + r < call_.queries) read_bias(call_.mask, {task_.batch, head_, 0, 0}, query + r, key, keys, bias);
        const int64_t visible = call_.causal ? std::clamp<int64_t>(query + r - key + 1, 0, keys) : keys;
        std::fill(bias + visible, bias + kSquare, -INFINITY);
        if (pattern != kFullBlock && query + r < call_.queries) {
          const uint32_t word = pattern_word(call_.pattern, pattern, query + r);
          for (int64_t j = 0; j < keys; ++j) bias[j] = word >> j & 1 ? bias[j] : -INFINITY;
        }
        for (int64_t i = 0; i < keys; i += kLanes) {  // the masked logit rounds as it did on the way forward
          const vf b = vload(bias + i), x = vmul(vsub(vfma(vload(s + i), vset(factor.high), b), high), log2e);
          vstore(s + i, vmul(Policy::exp2(vkeep(x, b)), inverse));
        }
        for (int64_t j = 0; j < keys; ++j) d[j] = bias[j] == -INFINITY ? 0.0f : d[j];  // hidden: even NaN does not matter
      }
      std::fill(s + keys, s + kSquare, 0.0f);  // no key there
      std::fill(d + keys, d + kSquare, 0.0f);
    }
  }

  // With all keys of a query in hand: its weights sum to 1, and delta = sum(P dP), from the numbers that they meet here. The sums of the way
  // forward are of other roundings, which do not cancel where one key has nearly all the weight.
  void normalise(int64_t query, int64_t square, int64_t squares) {
    for (int64_t r = 0; r < kSquare; ++r) {
      if (inverse_[query + r] == 0) continue;
      vf weights = vset(0), products = vset(0);
      for (int64_t j = 0; j < squares; ++j) {
        for (int64_t i = 0; i < kSquare; i += kLanes) {
          const vf p = vload(scores(weights_, logits_, square, j) + r * kSquare + i);
          weights = vadd(weights, p);
          products = vfma(p, vload(scores(slopes_, slopes_wide_, square, j) + r * kSquare + i), products);
        }
      }
      const double total = sum_of(weights);
      delta_[query + r] = static_cast<float>(sum_of(products) / total - lse_[query + r]);
      const vf inverse = vset(static_cast<float>(1 / total));
      for (int64_t j = 0; j < squares; ++j) {
        for (int64_t i = 0; i < kSquare; i += kLanes) {
          float* p = scores(weights_, logits_, square, j) + r * kSquare + i;
          vstore(p, vmul(vload(p), inverse));
        }
      }
    }
  }

  // From dP of a square to dS, in place.
  void slope(int64_t query, const float* weights, float* slopes) const {
    for (int64_t r = 0; r < kSquare; ++r) {
      const vf delta = vset(delta_[query + r]);
      for (int64_t i = r * kSquare; i < (r + 1) * kSquare; i += kLanes) vstore(slopes + i, vmul(vload(weights + i), vsub(vload(slopes + i), delta)));
    }
  }

  // [square of tokens][square of channels] of [32][32], each square transposed or not, into the rows [begin, end) of a contiguous [B, T, H, D].
  void write(const float* x, bool transposed, int64_t head, int64_t heads, int64_t begin, int64_t end, int64_t tokens, float factor, T* out) const {
    for (int64_t first = begin; first < end; first += kSquare, x += channel_squares_ * kSquare * kSquare) {
      for (int64_t c = 0; transposed && c < channel_squares_; ++c) transpose_square(x + c * kSquare * kSquare, kSquare, staged_ + c * kSquare, columns_);
      for (int64_t t = first; t < std::min(first + kSquare, end); ++t) {
        T* to = out + ((task_.batch * tokens + t) * heads + head) * call_.channels;
        prefetch_row(Row<T>{to + std::min(kAhead, end - 1 - t) * heads * call_.channels, 1}, call_.channels);
        for (int64_t c = 0; c < channel_squares_; ++c, to += kSquare) {
          const float* from = transposed ? staged_ + (t - first) * columns_ + c * kSquare : x + (c * kSquare + t - first) * kSquare;
          for (int64_t i = 0; i < within(c, call_.channels); ++i) to[i] = from_float<T>(from[i] * factor);
        }
      }
    }
  }

  const AttentionBackwardCall& call_;
  const AttentionBackwardTask& task_;
  const int64_t channel_squares_, columns_, query_squares_, key_squares_;
  const int64_t span_;          // squares of queries that are packed at once, from first_ on
  const bool masked_, whole_;  // whole: a block has all keys
  int64_t head_ = 0, first_ = 0;
  float power_ = 1;
  Policy policy_;
  char *k_rows_, *k_cols_, *v_rows_, *q_rows_, *q_cols_, *grad_rows_, *grad_cols_;
  char *weights_, *slopes_, *slopes_rows_;  // of a block: P and dS as right operands, dS as a left one
  Pair* base_;
  float *inverse_, *delta_, *lse_, *q_grad_, *k_grad_, *v_grad_, *staged_;
  static constexpr int64_t kScratch = Policy::kPlain ? 1 : kSquares * kSquare * kSquare;
  alignas(64) float logits_[kScratch], slopes_wide_[kScratch];
};

}  // namespace fusewire::FUSEWIRE_ISA
