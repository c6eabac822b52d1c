// The CPU library: the ISA level it runs at.
#include <cstdlib>
#include <string_view>

#include "common/isa.h"
#include "common/tensor.h"

namespace fusewire {

static Isa highest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (v3) return Isa::avx2;
#endif
  return Isa::base;
}

Isa active_isa() {
  static const Isa isa = [] {
    const Isa highest = highest_isa();
    const char* wanted = std::getenv("FUSEWIRE_CPU_ISA");
    const std::string_view name = wanted ? wanted : "";
    Isa asked = highest;
    if (name == "base") asked = Isa::base;
    if (name == "avx2") asked = Isa::avx2;
    if (name == "avx512") asked = Isa::avx512;
    return asked < highest ? asked : highest;
  }();
  return isa;
}

static int64_t cpu_isa() { return static_cast<int64_t>(active_isa()); }

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&fusewire::cpu_isa)); }
