// A step of a solver on CUDA: one pass over the latents, the step's scalars read from the table on the device.
#include "cuda/solver_step.h"

#include "cuda/device.h"

namespace fusewire::cuda {

constexpr int kBlock = 256;  // threads at most, a chunk each

// T: the latents' dtype. kRound: round to it after each operation, but for what kWideX0 and kWideOut exempt.
template <typename T, bool kRound, bool kWideX0, bool kWideOut>
struct Solver {
  static constexpr int N = kChunk<T>;
  const SolverStep& k;
  const double* row;
  bool inside;
  int64_t first;
  int count;

  // A row outside the table gives NaN, not whatever lies beside it
  __device__ float scalar(Column c) const { return inside ? static_cast<float>(row[static_cast<int>(c) * k.table_column]) : nanf(""); }
  __device__ static float of_m(float v) { return kRound ? rounded<T>(v) : v; }
  __device__ static float of_x0(float v) { return kRound && !kWideX0 ? rounded<T>(v) : v; }
  __device__ static float of_out(float v) { return kRound && !kWideOut ? rounded<T>(v) : v; }

  __device__ void load(const void* p, float (&r)[N]) const { load_chunk(static_cast<const T*>(p) + first, 1, count, k.vector, r); }
  __device__ void load(const void* p, bool wide, float (&r)[N]) const {
    if (wide) load_chunk(static_cast<const float*>(p) + first, 1, count, k.vector, r);
    else load(p, r);
  }
  __device__ void store(void* p, bool wide, const float (&r)[N]) const {
    if (!wide || sizeof(T) == 4) return store_chunk(static_cast<T*>(p) + first, 1, count, k.vector, r);
    float* out = static_cast<float*>(p) + first;
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      const float part[4] = {r[j], r[j + 1], r[j + 2], r[j + 3]};
      const int rest = count - j;
      if (rest > 0) store_chunk(out + j, 1, rest < 4 ? rest : 4, k.vector, part);
    }
  }

  __device__ void divide(float (&v)[N], float divisor) const {
    const float factor = k.reciprocal ? 1.0f / divisor : 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = of_x0(k.reciprocal ? v[i] * factor : v[i] / divisor);
  }

  __device__ void run() const {
    float x[N], m[N], x0[N], e[N], other[N];
    load(k.sample, x);
    load(k.cond, m);
    if (k.uncond) {
      const float g = scalar(Column::guidance);
      load(k.uncond, other);
#pragma unroll
      for (int i = 0; i < N; ++i) m[i] = of_m(other[i] + of_m(g * of_m(m[i] - other[i])));
    }

    float c = scalar(Column::x0_x);
#pragma unroll
    for (int i = 0; i < N; ++i) x0[i] = c != 0 ? of_x0(c * x[i]) : 0.0f;
    divide(x0, scalar(Column::x_divisor));
    c = scalar(Column::x0_m);
#pragma unroll
    for (int i = 0; i < N; ++i) x0[i] = of_x0(x0[i] + (c != 0 ? of_m(c * m[i]) : 0.0f));
    divide(x0, scalar(Column::x0_divisor));
    c = scalar(Column::x0_limit);
    if (c > 0) {  // a NaN passes
#pragma unroll
      for (int i = 0; i < N; ++i) x0[i] = x0[i] > c ? c : x0[i] < -c ? -c : x0[i];
    }

    c = scalar(Column::e_x);
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = c != 0 ? of_x0(c * x[i]) : 0.0f;
    c = scalar(Column::e_m);
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = of_x0(e[i] + (c != 0 ? of_m(c * m[i]) : 0.0f));
    c = scalar(Column::e_x0);
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = of_x0(e[i] + (c != 0 ? of_x0(c * x0[i]) : 0.0f));
    divide(e, scalar(Column::e_divisor));
    if (k.previous) {
      c = scalar(Column::e_previous);
      load(k.previous, k.previous_wide, other);
#pragma unroll
      for (int i = 0; i < N; ++i) e[i] = of_x0(e[i] + (c != 0 ? of_x0(c * other[i]) : 0.0f));
    }
    c = scalar(Column::e_scale);
#pragma unroll
    for (int i = 0; i < N; ++i) e[i] = of_x0(e[i] * c);
    store(k.x0, k.wide_x0, x0);
    if (k.slope) store(k.slope, k.wide_x0, e);

    if (k.base) load(k.base, x);
    const float of_x = scalar(Column::x), c_x0 = scalar(Column::x0), c_e = scalar(Column::e), c_scale = scalar(Column::scale);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float v = of_x != 0 ? of_out(of_x * x[i]) : 0.0f;
      v = of_out(v + (c_x0 != 0 ? of_x0(c_x0 * x0[i]) : 0.0f));
      v = of_out(v + (c_e != 0 ? of_x0(c_e * e[i]) : 0.0f));
      x[i] = of_out(v * c_scale);
    }
    if (k.noise) {
      c = scalar(Column::noise);
      load(k.noise, k.noise_wide, other);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float n = c * other[i];
        x[i] = of_out(x[i] + (c != 0 ? k.noise_wide ? n : of_m(n) : 0.0f));
      }
    }
    if (k.mask) {
      load(k.known, m);
      if (k.known_noise) {
        const float of_known = scalar(Column::known), of_noise = scalar(Column::known_noise);
        load(k.known_noise, other);
#pragma unroll
        for (int i = 0; i < N; ++i) m[i] = of_m(of_m(of_known * m[i]) + of_m(of_noise * other[i]));
      }
      load(k.mask, other);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = of_m(of_m(of_m(1.0f - other[i]) * m[i]) + of_m(other[i] * of_m(x[i])));
    }
    store(k.out, false, x);
  }
};

template <typename T, bool kRound, bool kWideX0, bool kWideOut>
__global__ void __launch_bounds__(kBlock) solver_kernel(const __grid_constant__ SolverStep k) {
  constexpr int N = kChunk<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N, rest = k.count - first;
  if (rest <= 0) return;
  const int64_t row = k.counter ? *k.counter : k.step;
  const bool inside = row >= 0 && row < k.steps;
  const Solver<T, kRound, kWideX0, kWideOut> solver{k, k.table + (inside ? row * k.table_row : 0), inside, first, rest < N ? static_cast<int>(rest) : N};
  solver.run();
}

template <typename T, bool kRound, bool kWideX0, bool kWideOut>
static const char* launch_as(const SolverStep& task, void* stream) {
  const int64_t chunks = ceil_div(task.count, kChunk<T>);
  const unsigned threads = static_cast<unsigned>(chunks < kBlock ? ceil_div(chunks, kWarp) * kWarp : kBlock);
  const int64_t blocks = ceil_div(chunks, threads);
  if (blocks > kMaxBlocks) return "the latents are too large";
  return launch(solver_kernel<T, kRound, kWideX0, kWideOut>, blocks, dim3(threads), stream, task);
}

const char* launch_solver_step(const SolverStep& task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, {
    if constexpr (sizeof(T) == 2) {
      if (task.exact) {
        return (task.wide_x0 ? task.wide_out ? launch_as<T, true, true, true> : launch_as<T, true, true, false>
                             : task.wide_out ? launch_as<T, true, false, true> : launch_as<T, true, false, false>)(task, stream);
      }
    }
    return launch_as<T, false, false, false>(task, stream);
  })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
