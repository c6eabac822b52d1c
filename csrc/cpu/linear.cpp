// Linear layers with an epilogue on the CPU: fusewire::linear.
#include "cpu/linear.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "common/tensor.h"
#include "cpu/thread_memory.h"

namespace fusewire {

static Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu_erf;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "none", "linear: unknown activation");
  return Activation::none;
}

// Cuts the output into blocks and runs them. Threads take blocks as they become free.
template <typename T>
static void on_vectors(const LinearCall& call) {
  const auto kernel = FUSEWIRE_PICK(void (*)(const LinearCall&, const LinearBlock&, float*, T), linear_block);
  const int64_t panel = FUSEWIRE_PICK(int64_t (*)(), linear_panel)();
  const int64_t threads = torch::stable::get_num_threads();
  // As wide as can be (every block copies its rows of x), as equal as can be, and three for each thread: first the rows are cut, as long as a weight
  // is packed for many of them, then the columns.
  const int64_t panels = (call.outputs + panel - 1) / panel, most = kLinearCols / panel, enough = 3 * threads;
  int64_t row_blocks = (call.rows + kLinearRows - 1) / kLinearRows, col_blocks = (panels + most - 1) / most;
  while (row_blocks * col_blocks < enough && call.rows / (row_blocks + 1) >= kLinearManyRows) ++row_blocks;
  while (row_blocks * col_blocks < enough && col_blocks < panels) ++col_blocks;
  const int64_t height = (call.rows + row_blocks - 1) / row_blocks, blocks = row_blocks * col_blocks;
  const int64_t floats = FUSEWIRE_PICK(int64_t (*)(int64_t, int64_t), linear_scratch)(height, (panels + col_blocks - 1) / col_blocks * panel);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, blocks), 1, [&](int64_t, int64_t) {
    float* memory = reinterpret_cast<float*>(linear_memory(floats * sizeof(float)));
    for (int64_t i = next++; i < blocks; i = next++) {
      const int64_t row = i / col_blocks * height, at = i % col_blocks, col = at * panels / col_blocks * panel, end = (at + 1) * panels / col_blocks * panel;
      if (row < call.rows) kernel(call, {row, std::min(height, call.rows - row), col, std::min(end, call.outputs) - col}, memory, T{});
    }
  });
}

// As many blocks of columns as keep every thread at work, since the weight's way through memory is what takes the time.
static void run_few(const LinearCall& call) {
  const auto kernel = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const LinearCall&, const LinearBlock&, float*), linear_few_block);
  const int64_t floats = FUSEWIRE_PICK_UP_TO_AVX512(int64_t (*)(int64_t, int64_t), linear_few_scratch)(call.rows, call.inputs);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t width = std::clamp<int64_t>(call.outputs / (4 * threads) / 16 * 16, 16, kLinearCols), blocks = (call.outputs + width - 1) / width;
  const bool alone = call.outputs * call.inputs * call.rows < kLinearFewAlone;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    float* memory = reinterpret_cast<float*>(linear_memory(floats * sizeof(float)));
    for (int64_t i = next++; i < blocks; i = next++) kernel(call, {0, call.rows, i * width, std::min(width, call.outputs - i * width)}, memory);
  };
  if (alone) return work(0, 1);
  torch::stable::parallel_for(0, std::min(threads, blocks), 1, work);
}

template <typename T>
static void part_on_vectors(const LinearCall& call, LinearBlock b) {
  constexpr int64_t kWidth = 32;  // little memory
  const auto kernel = FUSEWIRE_PICK(void (*)(const LinearCall&, const LinearBlock&, float*, T), linear_block);
  const auto floats = FUSEWIRE_PICK(int64_t (*)(int64_t, int64_t), linear_scratch);
  const int64_t rows = b.row + b.rows, cols = b.col + b.cols;
  for (; b.col < cols; b.col += kWidth) {
    b.cols = std::min(kWidth, cols - b.col);
    float* memory = reinterpret_cast<float*>(linear_memory(floats(std::min(kLinearRows, b.rows), b.cols) * sizeof(float)));
    for (int64_t row = b.row; row < rows; row += kLinearRows) kernel(call, {row, std::min(kLinearRows, rows - row), b.col, b.cols}, memory, T{});
  }
}

void linear_on_vectors(const LinearCall& call, ScalarKind type) {
  with_type(type, [&](auto t) { on_vectors<decltype(t)>(call); });
}
void linear_part_on_vectors(const LinearCall& call, LinearBlock part, ScalarKind type) {
  with_type(type, [&](auto t) { part_on_vectors<decltype(t)>(call, part); });
}

#if defined(FUSEWIRE_HAS_AMX)
// The same on AMX tiles. Rows and columns that do not split into bfloat16 parts are done over on vectors: they are rare, so one thread does. Whether a row
// does depends on that row alone, so that a sample's result does not depend on its batch.
static void on_tiles(const LinearCall& call, ScalarKind type) {
  const int64_t threads = torch::stable::get_num_threads(), block = amx::kLinearBlock;
  const int64_t block_bytes = amx::linear_packed_bytes(call.inputs, type);
  const int64_t row_blocks = (call.rows + block - 1) / block;
  const int64_t most = std::clamp<int64_t>(amx::kLinearSlabBytes / block_bytes, 1, amx::linear_slab(type) / block);
  const int64_t slabs = (row_blocks + most - 1) / most, slab = (row_blocks + slabs - 1) / slabs;  // as equal as can be
  const int64_t panels = (call.outputs + block - 1) / block, width = std::clamp<int64_t>(panels / (3 * threads), 1, kLinearCols / block) * block;
  char* const packed = packed_memory(std::min(slab, row_blocks) * block_bytes);
  std::vector<uint32_t> bad_rows(row_blocks);
  std::vector<uint8_t> bad_panels(panels);
  for (int64_t first = 0; first < row_blocks; first += slab) {
    const int64_t here = std::min(slab, row_blocks - first);
    torch::stable::parallel_for(0, here, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) bad_rows[first + i] = amx::linear_pack(call, (first + i) * block, i, here, packed, type);
    });
    const int64_t rows = std::min(here * block, call.rows - first * block);
    // Each block of columns is taken while the one before is at work, which fetches its first weights.
    std::atomic<int64_t> free{0};
    const auto take = [&]() -> LinearBlock {
      const int64_t col = free.fetch_add(width);
      return {first * block, rows, col, std::min(width, call.outputs - col)};
    };
    torch::stable::parallel_for(0, std::min(threads, panels), 1, [&](int64_t, int64_t) {
      char* memory = linear_memory(amx::linear_scratch_bytes(rows, width, type));
      for (LinearBlock part = take(), later; part.cols > 0; part = later) {
        later = take();
        const uint32_t bad = amx::linear_columns(call, part, later, packed, memory, type);
        for (int64_t n = 0; n * block < part.cols; ++n) bad_panels[part.col / block + n] = bad >> n & 1;
      }
    });
  }
  for (int64_t i = 0; i < row_blocks; ++i) {
    for (int64_t r = 0; r < block && bad_rows[i] != 0; ++r) {
      if (bad_rows[i] >> r & 1) linear_part_on_vectors(call, {i * block + r, 1, 0, call.outputs}, type);
    }
  }
  for (int64_t n = 0; n < panels; ++n) {
    const int64_t col = n * block;
    if (bad_panels[n]) linear_part_on_vectors(call, {0, call.rows, col, std::min(block, call.outputs - col)}, type);
  }
}
#endif

static void run(const LinearCall& call, ScalarKind type) {
#if defined(FUSEWIRE_HAS_AMX)
  if (active_isa() == Isa::amx) return on_tiles(call, type);
#endif
  linear_on_vectors(call, type);
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
  if (call.rows == 0 || call.outputs == 0) return out;
  STD_TORCH_CHECK(call.inputs > 0, "linear: x has rows of no elements");
  call.x = leading_rows(x, x);
  call.weight = weight.data_ptr();
  call.weight_row = weight.stride(0);
  call.weight_col = weight.stride(1);
  if (bias) {
    call.bias = bias->data_ptr();
    call.bias_stride = bias->stride(0);
  }
  call.activation = activation_of(activation);
  if (gate) call.gate = leading_rows(*gate, x);
  if (residual) call.residual = leading_rows(*residual, x);
  call.out = out.data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float:
      if (x.dim() <= 2 && call.rows <= kLinearFewRows)
        run_few(call);
      else
        run(call, ScalarKind::f32);
      break;
    case ScalarType::BFloat16: run(call, ScalarKind::bf16); break;
    case ScalarType::Half: run(call, ScalarKind::f16); break;
    default: STD_TORCH_CHECK(false, "linear: unsupported dtype");
  }
  return out;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("linear", TORCH_BOX(&fusewire::linear)); }
