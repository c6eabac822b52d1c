// The CPU library: the ISA level it runs at.
#include <cstdlib>
#include <string_view>
#if defined(FUSEWIRE_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/isa.h"
#include "common/tensor.h"
#include "cpu/processor.h"

namespace fusewire {

#if defined(FUSEWIRE_HAS_AMX)
// The processor has AMX tiles for bfloat16, and the kernel lets this process use them: Linux hands out the 8 KiB of state on request only.
static bool amx_granted() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kStates = 3u << 17;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (low & kStates) == kStates && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

static Isa highest_isa() {
#if defined(FUSEWIRE_ONLY_ISA)
  return Isa::FUSEWIRE_ONLY_ISA;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(FUSEWIRE_HAS_AMX)
  if (v4 && __builtin_cpu_supports("avx512bf16") && amx_granted()) return Isa::amx;
#endif
  if (v4) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  return v3 ? Isa::avx2 : Isa::base;
#else
  return Isa::base;
#endif
}

// MKL, behind PyTorch's float32 products, runs at full speed on Intel's processors and at about half of it on others.
bool cpu_is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Isa active_isa() {
  static const Isa isa = [] {
    const Isa highest = highest_isa();
    const char* wanted = std::getenv("FUSEWIRE_CPU_ISA");
    const std::string_view name = wanted ? wanted : "";
    Isa asked = highest;
#if !defined(FUSEWIRE_ONLY_ISA)
    // Intel multiplies bfloat16 by vdpbf16ps at half the rate of float32's FMA: without AMX the operands are widened (attention 275 GFLOP/s, not 155)
    if (highest == Isa::avx512_bf16 && cpu_is_intel()) asked = Isa::avx512;
#endif
    if (name == "base") asked = Isa::base;
    if (name == "avx2") asked = Isa::avx2;
    if (name == "avx512") asked = Isa::avx512;
    if (name == "avx512_bf16") asked = Isa::avx512_bf16;
    return asked < highest ? asked : highest;
  }();
  return isa;
}

static int64_t cpu_isa() { return static_cast<int64_t>(active_isa()); }

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fusewire::cpu_isa));
  m.impl("cpu_is_intel", TORCH_BOX(&fusewire::cpu_is_intel));
}
