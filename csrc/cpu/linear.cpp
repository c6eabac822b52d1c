// Linear layers with an epilogue on the CPU: fusewire::linear.
#include "cpu/linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "common/tensor.h"

namespace fusewire {

// The rows of t as rows of a tensor whose leading dimensions are those of x: t broadcasts over missing dimensions and those of size 1.
static LeadingRows rows_of(const Tensor& t, const Tensor& x) {
  LeadingRows rows{t.data_ptr(), static_cast<int>(x.dim()) - 1, {}, {}, t.size(t.dim() - 1) == 1 ? 0 : t.stride(t.dim() - 1)};
  STD_TORCH_CHECK(rows.dims <= LeadingRows::kMaxDims, "linear: x has more than 9 dimensions");
  for (int d = 0; d < rows.dims; ++d) {
    const int64_t own = d - (x.dim() - t.dim());
    rows.sizes[d] = x.size(d);
    rows.strides[d] = own < 0 || t.size(own) == 1 ? 0 : t.stride(own);
  }
  return rows;
}

static Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "none", "linear: unknown activation");
  return Activation::none;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Working memory of one thread, kept for its next task: allocated per task it would cost a page fault for every 4 KiB.
static float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    STD_TORCH_CHECK(memory, "linear: out of memory");
    size = floats;
  }
  return memory.get();
}

// Cuts the output into blocks and runs them. Threads take blocks as they become free.
template <typename T>
static void run(const LinearCall& call) {
  const auto kernel = FUSEWIRE_PICK(void (*)(const LinearCall&, const LinearBlock&, float*, T), linear_block);
  const int64_t panel = FUSEWIRE_PICK(int64_t (*)(), linear_panel)();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = (call.outputs + panel - 1) / panel, row_blocks = (call.rows + kLinearRows - 1) / kLinearRows;
  // As wide as can be (every block reads its rows of x once), with three blocks for each thread.
  const int64_t width = std::clamp<int64_t>(std::min(panels * row_blocks / (3 * threads), kLinearPacked / (call.inputs * panel)), 1,
                                           kLinearCols / panel) * panel;
  const int64_t floats = FUSEWIRE_PICK(int64_t (*)(int64_t, int64_t), linear_scratch)(call.inputs, width);
  const int64_t height = (call.rows + row_blocks - 1) / row_blocks;
  const int64_t col_blocks = (call.outputs + width - 1) / width, blocks = col_blocks * row_blocks;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, blocks), 1, [&](int64_t, int64_t) {
    float* memory = scratch(floats);
    for (int64_t i = next++; i < blocks; i = next++) {
      const int64_t row = i / col_blocks * height, col = i % col_blocks * width;
      kernel(call, {row, std::min(height, call.rows - row), col, std::min(width, call.outputs - col)}, memory, T{});
    }
  });
}

static Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, std::string activation,
                     const std::optional<Tensor>& gate, const std::optional<Tensor>& residual, bool exact) {
  LinearCall call{};
  call.inputs = x.size(x.dim() - 1);
  call.outputs = weight.size(0);
  call.rows = 1;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    call.rows *= x.size(d);
  }
  shape.push_back(call.outputs);
  Tensor out = torch::stable::new_empty(x, shape);
  call.x = rows_of(x, x);
  call.weight = weight.data_ptr();
  call.weight_row = weight.stride(0);
  call.weight_col = weight.stride(1);
  if (bias) {
    call.bias = bias->data_ptr();
    call.bias_stride = bias->stride(0);
  }
  call.activation = activation_of(activation);
  if (gate) call.gate = rows_of(*gate, x);
  if (residual) call.residual = rows_of(*residual, x);
  call.out = out.data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float: run<float>(call); break;
    case ScalarType::BFloat16: run<bfloat16>(call); break;
    case ScalarType::Half: run<float16>(call); break;
    default: STD_TORCH_CHECK(false, "linear: unsupported dtype");
  }
  return out;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("linear", TORCH_BOX(&fusewire::linear)); }
