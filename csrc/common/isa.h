// ISA levels of the CPU kernels. Every *_kernels.cpp is compiled once per level inside a namespace of the level's name;
// FUSEWIRE_PICK(type, f) gives the address of f at the level this process runs at. AMX is a level for matrix products alone (amx_*.cpp,
// compiled once, FUSEWIRE_HAS_AMX where the compiler knows it); everything else runs as at avx512_bf16.
#pragma once

namespace fusewire {

enum class Isa : int { base = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The fastest level that the processor has (the highest, but on Intel's without AMX), or the one that FUSEWIRE_CPU_ISA names if it has that. Read once.
Isa active_isa();

}  // namespace fusewire

// FUSEWIRE_DECLARE(R, f, (A, B)): declares R f(A, B) at every level. Use inside namespace fusewire.
#define FUSEWIRE_DECLARE_ONE(isa, R, f, args) namespace isa { R f args; }
#if defined(FUSEWIRE_ONLY_ISA)  // a library of one level, as the sanitizers get
#define FUSEWIRE_DECLARE(R, f, args) FUSEWIRE_DECLARE_ONE(FUSEWIRE_ONLY_ISA, R, f, args)
#define FUSEWIRE_PICK(type, f) (static_cast<type>(&::fusewire::FUSEWIRE_ONLY_ISA::f))
#define FUSEWIRE_PICK_UP_TO_AVX512(type, f) FUSEWIRE_PICK(type, f)
#elif defined(__x86_64__)
#define FUSEWIRE_DECLARE(R, f, args)          \
  FUSEWIRE_DECLARE_ONE(base, R, f, args)      \
  FUSEWIRE_DECLARE_ONE(avx2, R, f, args)      \
  FUSEWIRE_DECLARE_ONE(avx512, R, f, args)    \
  FUSEWIRE_DECLARE_ONE(avx512_bf16, R, f, args)
// FUSEWIRE_PICK(type, f): f at the active level, as a pointer of `type` (which chooses among overloads).
#define FUSEWIRE_PICK(type, f)                                                              \
  (active_isa() >= Isa::avx512_bf16  ? static_cast<type>(&::fusewire::avx512_bf16::f)       \
       : active_isa() == Isa::avx512 ? static_cast<type>(&::fusewire::avx512::f)            \
       : active_isa() == Isa::avx2   ? static_cast<type>(&::fusewire::avx2::f)              \
                                     : static_cast<type>(&::fusewire::base::f))
// For files that are not compiled at avx512_bf16, because they would be the same there as at avx512 (CMakeLists.txt lists the others).
#define FUSEWIRE_PICK_UP_TO_AVX512(type, f)                                                 \
  (active_isa() >= Isa::avx512     ? static_cast<type>(&::fusewire::avx512::f)              \
       : active_isa() == Isa::avx2 ? static_cast<type>(&::fusewire::avx2::f)                \
                                   : static_cast<type>(&::fusewire::base::f))
#else
#define FUSEWIRE_DECLARE(R, f, args) FUSEWIRE_DECLARE_ONE(base, R, f, args)
#define FUSEWIRE_PICK(type, f) (static_cast<type>(&::fusewire::base::f))
#define FUSEWIRE_PICK_UP_TO_AVX512(type, f) FUSEWIRE_PICK(type, f)
#endif
