// Sampler steps: loops over one run of elements, compiled once per ISA level.
#include "cpu/sampler_step.h"

#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

constexpr int64_t kBlock = 256;  // elements of a strided operand that are gathered at a time

template <typename T>
static const T* gather(const T* x, int64_t stride, int64_t count, T* scratch) {
  if (stride == 1) return x;
  for (int64_t i = 0; i < count; ++i) scratch[i] = x[i * stride];
  return scratch;
}

// kExact rounds after every operation of the stock code: cond - uncond, * guidance, + uncond, * dt; then adds to the sample in float32.
template <typename T, bool kExact, bool kGuidance>
static void run(const T* sample, const T* cond, const T* uncond, T* out, int64_t count, compute_t<T> dt, compute_t<T> guidance) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  const auto round = [](lanes<C, N> v) __attribute__((always_inline)) { return kExact ? rounded<T, N>(v) : v; };
  for_columns<N>(0, count, [&](const auto& column) __attribute__((always_inline)) {
    lanes<C, N> v = column.load(cond);
    if constexpr (kGuidance) {
      const lanes<C, N> u = column.load(uncond);
      v = round(u + round(round(v - u) * splat<N>(guidance)));
    }
    lanes<C, N> x = column.load(sample);
    if constexpr (kExact && sizeof(C) == 8) x = __builtin_convertvector(__builtin_convertvector(x, lanes<float, N>), lanes<C, N>);
    column.store(out, x + round(splat<N>(dt) * v));
  });
}

template <typename T>
static void choose(const FlowEuler& s) {
  using C = compute_t<T>;
  // Stock's dt is a 0-dim float32 tensor on the left of the product: it is rounded to T. Its guidance is a number: it is not.
  C dt = static_cast<C>(s.dt);
  if (s.exact) {
    dt = static_cast<float>(s.dt);
    if constexpr (sizeof(T) == 2) dt = to_float(from_float<T>(dt));
  }
  const C guidance = static_cast<C>(s.guidance);
  T buffers[3][kBlock];
  const bool inner = s.sample_stride == 1 && s.cond_stride == 1 && (!s.uncond || s.uncond_stride == 1);
  const int64_t block = inner ? s.count : kBlock;
  for (int64_t i = 0; i < s.count; i += block) {
    const int64_t count = s.count - i < block ? s.count - i : block;
    const T* sample = gather(static_cast<const T*>(s.sample) + i * s.sample_stride, s.sample_stride, count, buffers[0]);
    const T* cond = gather(static_cast<const T*>(s.cond) + i * s.cond_stride, s.cond_stride, count, buffers[1]);
    const T* uncond = s.uncond ? gather(static_cast<const T*>(s.uncond) + i * s.uncond_stride, s.uncond_stride, count, buffers[2]) : nullptr;
    T* out = static_cast<T*>(s.out) + i;
    if (uncond) {
      (s.exact ? run<T, true, true> : run<T, false, true>)(sample, cond, uncond, out, count, dt, guidance);
    } else {
      (s.exact ? run<T, true, false> : run<T, false, false>)(sample, cond, nullptr, out, count, dt, guidance);
    }
  }
}

void flow_euler(const FlowEuler& s, float) { choose<float>(s); }
void flow_euler(const FlowEuler& s, double) { choose<double>(s); }
void flow_euler(const FlowEuler& s, bfloat16) { choose<bfloat16>(s); }
void flow_euler(const FlowEuler& s, float16) { choose<float16>(s); }

}  // namespace fusewire::FUSEWIRE_ISA
