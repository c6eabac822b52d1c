// CUDA for one CPU thread, as far as csrc/cuda needs it: the kernels are compiled by the C++ compiler and every thread of a block is a fiber.
//
// A warp runs until all its lanes wait for one another or for the block; blocks run one after the other. What a GPU would punish with a hang or with
// garbage is an error here: lanes of a warp that wait at different places, threads that end while others wait, a 16-byte access off its alignment; and
// so is a launch where the tensor's device was not made the current one, or on another stream than its current one.
// cuda_on_cpu_reverse(1) runs warps and lanes in the opposite order: a missing barrier then shows as another result.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "common/scalar.h"
#include "cuda/views.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using __nv_bfloat16 = fusewire::bfloat16;
using __half = fusewire::float16;
inline float __bfloat162float(__nv_bfloat16 x) { return fusewire::to_float(x); }
inline float __half2float(__half x) { return fusewire::to_float(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return fusewire::from_float<__nv_bfloat16>(x); }
inline __half __float2half_rn(float x) { return fusewire::from_float<__half>(x); }

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32, kStack = 256 * 1024, kAtBarrier = 1, kAtShuffle = 2, kEnded = 3;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  jmp_buf at;
  bool started = false;
  unsigned waits = 0;
  uint64_t exchanged[2];  // two, as a lane may write its next value before its neighbour has read this one
  unsigned shuffles = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> body;
  jmp_buf scheduler;
  unsigned current = 0;
  bool reverse = false;
  const char* error = nullptr;
};
inline Machine machine;

// Back to the scheduler, until it lets this thread go on.
inline void wait(unsigned why) {
  Fiber& fiber = *machine.fibers[machine.current];
  fiber.waits = why;
  if (!_setjmp(fiber.at)) _longjmp(machine.scheduler, 1);
}

inline void live() {
  for (;;) {
    machine.body();
    wait(kEnded);
  }
}

inline void resume(unsigned thread) {
  machine.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
  Fiber& fiber = *machine.fibers[thread];
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, live, 0);
  setcontext(&fiber.context);
}

// One warp, up to where all its lanes wait for the block (true) or have ended (false).
inline bool run_warp(unsigned first, unsigned last) {
  for (;;) {
    for (unsigned i = first; i < last; ++i) resume(machine.reverse ? first + last - 1 - i : i);
    const unsigned why = machine.fibers[first]->waits;
    for (unsigned i = first; i < last; ++i) {
      if (machine.fibers[i]->waits != why) {
        machine.error = "the lanes of a warp wait at different places";
        return false;
      }
    }
    if (why != kAtShuffle) return why == kAtBarrier;
  }
}

inline void run_block(unsigned threads) {
  const unsigned warps = (threads + kWarpSize - 1) / kWarpSize;
  for (bool waiting = true; waiting && !machine.error;) {
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < warps && !machine.error; ++i) {
      const unsigned first = (machine.reverse ? warps - 1 - i : i) * kWarpSize;
      at_barrier += run_warp(first, first + kWarpSize < threads ? first + kWarpSize : threads);
    }
    waiting = at_barrier > 0;
    if (!machine.error && waiting && at_barrier < warps) machine.error = "some warps wait for others that have ended";
  }
}

template <typename T>
T exchanged(unsigned mask, T value, unsigned other_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& mine = *machine.fibers[machine.current];
  if (mask != 0xffffffffu) machine.error = "a shuffle without all lanes";
  const unsigned slot = mine.shuffles++ % 2, other = machine.current / kWarpSize * kWarpSize + other_lane;
  std::memcpy(&mine.exchanged[slot], &value, sizeof(T));
  wait(kAtShuffle);
  std::memcpy(&value, &machine.fibers[other]->exchanged[slot], sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

// An access of 8 or 16 bytes, which a GPU refuses off its alignment
template <int kBytes>
struct Vector {
  uint32_t words[kBytes / 4];
  Vector() = default;
  Vector(const Vector& other) { *this = other; }
  Vector& operator=(const Vector& other) {
    const uintptr_t places = reinterpret_cast<uintptr_t>(&other) | reinterpret_cast<uintptr_t>(this);
    if (places % kBytes) cuda_on_cpu::machine.error = "a vector access that is not aligned";
    std::memcpy(words, other.words, kBytes);
    return *this;
  }
};
using uint2 = Vector<8>;
using uint4 = Vector<16>;

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::kAtBarrier); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_on_cpu::exchanged(mask, value, (cuda_on_cpu::machine.current % cuda_on_cpu::kWarpSize) ^ lanes);
}

namespace fusewire::cuda {

template <typename Task>
const char* launch(void (*kernel)(Task), int64_t blocks, dim3 threads, void* stream, const Task& task) {
  auto& machine = cuda_on_cpu::machine;
  const unsigned count = threads.x * threads.y * threads.z;
  if (blocks < 1 || blocks > 2147483647 || count < 1 || count > 1024 || count % 32) return "the grid or the block is not one that a GPU takes";
  if (stream == nullptr || stream != current_stream) return "not on the current stream of the tensor's device";
  while (machine.fibers.size() < count) machine.fibers.push_back(std::make_unique<cuda_on_cpu::Fiber>());
  machine.body = [&] { kernel(task); };
  machine.error = nullptr;
  blockDim = threads;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (int64_t i = 0; i < blocks && !machine.error; ++i) {
    blockIdx = {static_cast<unsigned>(machine.reverse ? blocks - 1 - i : i), 0, 0};
    for (unsigned t = 0; t < count; ++t) machine.fibers[t]->shuffles = 0;
    cuda_on_cpu::run_block(count);
  }
  if (machine.error) machine.fibers.clear();  // they stopped half way
  return machine.error;
}

}  // namespace fusewire::cuda
