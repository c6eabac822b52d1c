// adaLN modulation on the CPU: fusewire::adaln_modulate.
#include "cpu/adaln.h"

#include "common/tensor.h"

namespace fusewire {

static Tensor adaln_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, double eps, bool rms, bool exact) {
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  Tensor out = torch::stable::new_empty(x, {batch, tokens, channels});
  const Modulation m_shift = modulation(shift, tokens), m_scale = modulation(scale, tokens);
  FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "adaln_modulate", {
    const auto run = FUSEWIRE_PICK(void (*)(const AdalnRow&, scalar_t), adaln_row);
    torch::stable::parallel_for(0, batch * tokens, 1 + 16384 / (channels + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tokens, t = i % tokens;
        run(AdalnRow{static_cast<const scalar_t*>(x.data_ptr()) + b * x.stride(0) + t * x.stride(1), x.stride(2),
                     static_cast<const scalar_t*>(m_shift.data) + b * m_shift.batch + t * m_shift.token, m_shift.channel,
                     static_cast<const scalar_t*>(m_scale.data) + b * m_scale.batch + t * m_scale.token, m_scale.channel,
                     weight ? weight->data_ptr() : nullptr, bias ? bias->data_ptr() : nullptr,
                     static_cast<scalar_t*>(out.data_ptr()) + i * channels, channels, eps, rms, exact},
            scalar_t{});
      }
    });
  });
  return out;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("adaln_modulate", TORCH_BOX(&fusewire::adaln_modulate)); }
