// QK norm with rotary embedding on the CPU: fusewire::qk_norm_rope and fusewire::qk_norm_into.
#include "cpu/qk_norm_rope.h"

#include "common/empty.h"
#include "common/overlap.h"
#include "cpu/stream.h"

namespace fusewire {

static QkTensor describe(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& out) {
  QkTensor t{x.const_data_ptr(), {}, out.mutable_data_ptr(), {}, nullptr, 0, x.size(1), x.size(2), false};
  for (int i = 0; i < 4; ++i) {
    t.x_stride[i] = x.stride(i);
    t.out_stride[i] = out.stride(i);
  }
  // In place, what is written was read
  t.streams = t.x != t.out && on_lines(t.out) && t.out_stride[3] == 1;
  for (int i = 0; i < 3; ++i) t.streams = t.streams && t.out_stride[i] * element_size(out) % kLine == 0;
  if (weight) {
    t.weight = weight->const_data_ptr();
    t.weight_stride = weight->stride(0);
  }
  return t;
}

// What is written must be read by nobody else: tokens are taken in any order.
static void refuse_overlaps(const QkNorm& n, const QkTensor (&parts)[2], int64_t batch, int64_t bytes) {
  Footprint in[2], out[2];
  int64_t sizes[2][4];
  for (int i = 0; i < 2; ++i) {
    const int64_t size[4] = {batch, parts[i].tokens, parts[i].heads, n.dim};
    for (int d = 0; d < 4; ++d) {
      if (size[d] == 0) return;
      sizes[i][d] = size[d];
    }
    in[i] = {parts[i].x, parts[i].x_stride, sizes[i]};
    out[i] = {parts[i].out, parts[i].out_stride, sizes[i]};
  }
  STD_TORCH_CHECK(!overlap<4>(out[0], out[1], bytes), "qk_norm_into: q_out and k_out overlap");
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      bool in_place = i == j && parts[i].x == parts[i].out;
      for (int d = 0; d < 4; ++d) in_place = in_place && (sizes[i][d] == 1 || parts[i].x_stride[d] == parts[i].out_stride[d]);
      STD_TORCH_CHECK(in_place || !overlap<4>(out[i], in[j], bytes), "qk_norm_into: ", i ? "k_out" : "q_out", " overlaps ", j ? "k" : "q");
    }
  }
}

static void qk_norm_into(const Tensor& q, const Tensor& k, const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                         const Tensor& q_out, const Tensor& k_out, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                         double eps, int64_t norm, bool exact) {
  STD_TORCH_CHECK(cos || norm < kRotation, "qk_norm_rope: a rotation alone needs its tables");
  QkNorm n{q.size(3), nullptr, nullptr, {}, {}, eps, norm, exact};
  if (cos) {
    n.cos = static_cast<const float*>(cos->const_data_ptr());
    n.sin = static_cast<const float*>(sin->const_data_ptr());
    for (int i = 0; i < 2; ++i) {
      n.cos_stride[i] = cos->stride(i);
      n.sin_stride[i] = sin->stride(i);
    }
  }
  QkTensor parts[2] = {describe(q, q_weight, q_out), describe(k, k_weight, k_out)};
  for (QkTensor& part : parts) part.streams = part.streams && streams((q.numel() + k.numel()) * element_size(q));
  refuse_overlaps(n, parts, q.size(0), element_size(q));
  const int64_t batch = q.size(0), q_tokens = batch * parts[0].tokens, k_tokens = batch * parts[1].tokens;
  const int64_t grain = 1 + 32768 / (1 + n.dim * parts[0].heads);
  FUSEWIRE_SWITCH_FLOATS(q.scalar_type(), "qk_norm_rope", {
    const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const QkNorm&, const QkTensor&, int64_t, int64_t, scalar_t), qk_norm_tokens);
    // One range over q's tokens, then k's
    torch::stable::parallel_for(0, q_tokens + k_tokens, grain, [&](int64_t begin, int64_t end) {
      if (begin < q_tokens) run(n, parts[0], begin, end < q_tokens ? end : q_tokens, scalar_t{});
      if (end > q_tokens) run(n, parts[1], begin > q_tokens ? begin - q_tokens : 0, end - q_tokens, scalar_t{});
    });
  });
}

static std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const std::optional<Tensor>& q_weight,
                                               const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
                                               const std::optional<Tensor>& sin, double eps, int64_t norm, bool exact) {
  const Tensor q_out = empty_contiguous(q), k_out = empty_contiguous(k);
  qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact);
  return {q_out, k_out};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&fusewire::qk_norm_rope));
  m.impl("qk_norm_into", TORCH_BOX(&fusewire::qk_norm_into));
}
