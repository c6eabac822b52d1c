// solver_step: one loop over the elements, compiled once per ISA level.
#include "cpu/solver_step.h"

#include "common/vec.h"

namespace fusewire::FUSEWIRE_ISA {

// v / d, or v * (1 / d); nothing where d is 1.
template <typename C, int N>
struct Divisor {
  C divisor, factor;
  bool needed, reciprocal;
  Divisor(double d, bool reciprocal) : divisor(static_cast<C>(d)), factor(1 / divisor), needed(divisor != 1), reciprocal(reciprocal) {}
  FUSEWIRE_INLINE lanes<C, N> operator()(lanes<C, N> v) const { return reciprocal ? v * splat<N>(factor) : v / splat<N>(divisor); }
};

// kRound: round to T after each operation, except what kWideX0 and kWideOut exempt. The branches of the loop look at scalars of the step alone.
template <typename T, bool kRound, bool kWideX0, bool kWideOut>
static void run(const SolverStep& s, const SolverRow& row, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int N = kLanes<C>;
  using V = lanes<C, N>;
  const auto of_m = [](V v) __attribute__((always_inline)) { return kRound ? rounded<T, N>(v) : v; };
  const auto of_x0 = [](V v) __attribute__((always_inline)) { return kRound && !kWideX0 ? rounded<T, N>(v) : v; };
  const auto of_out = [](V v) __attribute__((always_inline)) { return kRound && !kWideOut ? rounded<T, N>(v) : v; };
  struct { C guidance, x0_x, x0_m, limit, e_x, e_m, e_x0, e_previous, e_scale, x, x0, e, scale, noise, known, known_noise; } const c{
      static_cast<C>(row.guidance), static_cast<C>(row.x0_x), static_cast<C>(row.x0_m), static_cast<C>(row.x0_limit), static_cast<C>(row.e_x),
      static_cast<C>(row.e_m), static_cast<C>(row.e_x0), static_cast<C>(row.e_previous), static_cast<C>(row.e_scale), static_cast<C>(row.x),
      static_cast<C>(row.x0), static_cast<C>(row.e), static_cast<C>(row.scale), static_cast<C>(row.noise), static_cast<C>(row.known),
      static_cast<C>(row.known_noise)};
  const Divisor<C, N> x_divisor(row.x_divisor, s.reciprocal), x0_divisor(row.x0_divisor, s.reciprocal), e_divisor(row.e_divisor, s.reciprocal);
  const auto at = [&](const auto& column, const void* p, bool wide) __attribute__((always_inline)) -> V {
    return wide ? column.load(static_cast<const C*>(p)) : column.load(static_cast<const T*>(p));
  };

  for_columns<N>(begin, end, [&](const auto& column) __attribute__((always_inline)) {
    const V x = at(column, s.sample, false);
    V m = at(column, s.cond, false);
    if (s.uncond) {
      const V u = at(column, s.uncond, false);
      m = of_m(u + of_m(splat<N>(c.guidance) * of_m(m - u)));
    }

    V x0{};
    if (c.x0_x != 0) x0 = of_x0(splat<N>(c.x0_x) * x);
    if (x_divisor.needed) x0 = of_x0(x_divisor(x0));
    if (c.x0_m != 0) x0 = of_x0(x0 + of_m(splat<N>(c.x0_m) * m));
    if (x0_divisor.needed) x0 = of_x0(x0_divisor(x0));
    if (c.limit > 0) {  // a NaN passes
      const V most = splat<N>(c.limit);
      x0 = x0 > most ? most : x0;
      x0 = x0 < -most ? -most : x0;
    }

    V e{};
    if (c.e_x != 0) e = of_x0(splat<N>(c.e_x) * x);
    if (c.e_m != 0) e = of_x0(e + of_m(splat<N>(c.e_m) * m));
    if (c.e_x0 != 0) e = of_x0(e + of_x0(splat<N>(c.e_x0) * x0));
    if (e_divisor.needed) e = of_x0(e_divisor(e));
    if (s.previous && c.e_previous != 0) e = of_x0(e + of_x0(splat<N>(c.e_previous) * at(column, s.previous, s.previous_wide)));
    if (c.e_scale != 1) e = of_x0(e * splat<N>(c.e_scale));

    V out{};
    if (c.x != 0) out = of_out(splat<N>(c.x) * (s.base ? at(column, s.base, false) : x));
    if (c.x0 != 0) out = of_out(out + of_x0(splat<N>(c.x0) * x0));
    if (c.e != 0) out = of_out(out + of_x0(splat<N>(c.e) * e));
    if (c.scale != 1) out = of_out(out * splat<N>(c.scale));
    if (s.noise && c.noise != 0) {
      const V n = splat<N>(c.noise) * at(column, s.noise, s.noise_wide);
      out = of_out(out + (s.noise_wide ? n : of_m(n)));
    }
    if (s.mask) {
      const V mask = at(column, s.mask, false);
      V known = at(column, s.known, false);
      if (s.known_noise) known = of_m(of_m(splat<N>(c.known) * known) + of_m(splat<N>(c.known_noise) * at(column, s.known_noise, false)));
      out = of_m(of_m(of_m(1 - mask) * known) + of_m(mask * of_m(out)));
    }

    column.store(static_cast<T*>(s.out), out);
    const auto keep = [&](void* p, V v) __attribute__((always_inline)) {
      if (s.wide_x0) column.store(static_cast<C*>(p), v);
      else column.store(static_cast<T*>(p), v);
    };
    if (s.x0) keep(s.x0, x0);
    if (s.slope) keep(s.slope, e);
  });
}

template <typename T>
static void choose(const SolverStep& s, const SolverRow& row, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 2) {
    if (s.exact) {
      (s.wide_x0 ? s.wide_out ? run<T, true, true, true> : run<T, true, true, false>
                 : s.wide_out ? run<T, true, false, true> : run<T, true, false, false>)(s, row, begin, end);
      return;
    }
  }
  run<T, false, false, false>(s, row, begin, end);
}

void solver_step(const SolverStep& s, const SolverRow& row, int64_t begin, int64_t end, float) { choose<float>(s, row, begin, end); }
void solver_step(const SolverStep& s, const SolverRow& row, int64_t begin, int64_t end, double) { choose<double>(s, row, begin, end); }
void solver_step(const SolverStep& s, const SolverRow& row, int64_t begin, int64_t end, bfloat16) { choose<bfloat16>(s, row, begin, end); }
void solver_step(const SolverStep& s, const SolverRow& row, int64_t begin, int64_t end, float16) { choose<float16>(s, row, begin, end); }

}  // namespace fusewire::FUSEWIRE_ISA
