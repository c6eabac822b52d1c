// Linear layers with an epilogue on the CPU: fusewire::linear.
#include "cpu/linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensor.h"
#include "cpu/scratch.h"

namespace fusewire {

static Activation activation_of(const std::string& name) {
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "none", "linear: unknown activation");
  return Activation::none;
}

// Working memory of one thread, kept for its next task: allocated per task it would cost a page fault for every 4 KiB.
class Memory {
 public:
  char* take(int64_t bytes) {
    if (size_ < bytes) {
      data_.reset();
      size_ = 0;
      const int64_t page = bytes < kHugePage ? 64 : kHugePage, whole = (bytes + page - 1) / page * page;
      data_.reset(static_cast<char*>(std::aligned_alloc(page, whole)));
      STD_TORCH_CHECK(data_, "linear: out of memory");
#if defined(__linux__)
      if (page == kHugePage) madvise(data_.get(), whole, MADV_HUGEPAGE);  // thousands of small pages would not fit the page tables' cache
#endif
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  static constexpr int64_t kHugePage = 2 << 20;
  struct Free { void operator()(char* p) const { std::free(p); } };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};
static char* scratch(int64_t bytes) {
  thread_local Memory memory;
  count_scratch(Scratch::linear, bytes);
  return memory.take(bytes);
}

// Cuts the output into blocks and runs them. Threads take blocks as they become free.
template <typename T>
static void run(const LinearCall& call) {
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
    float* memory = reinterpret_cast<float*>(scratch(floats * sizeof(float)));
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
    float* memory = reinterpret_cast<float*>(scratch(floats * sizeof(float)));
    for (int64_t i = next++; i < blocks; i = next++) kernel(call, {0, call.rows, i * width, std::min(width, call.outputs - i * width)}, memory);
  };
  if (alone) return work(0, 1);
  torch::stable::parallel_for(0, std::min(threads, blocks), 1, work);
}

#if defined(FUSEWIRE_HAS_AMX)
// Rows and columns that do not split into bfloat16 parts, done over by the AVX-512 kernel. They are rare, so one thread does.
template <typename T>
static void redo(const LinearCall& call, LinearBlock b) {
  const auto kernel = FUSEWIRE_PICK(void (*)(const LinearCall&, const LinearBlock&, float*, T), linear_block);
  const auto floats = FUSEWIRE_PICK(int64_t (*)(int64_t, int64_t), linear_scratch);
  const int64_t rows = b.row + b.rows, cols = b.col + b.cols;
  for (; b.col < cols; b.col += amx::kLinearBlock) {
    b.cols = std::min(amx::kLinearBlock, cols - b.col);
    float* memory = reinterpret_cast<float*>(scratch(floats(std::min(kLinearRows, b.rows), b.cols) * sizeof(float)));
    for (int64_t row = b.row; row < rows; row += kLinearRows) kernel(call, {row, std::min(kLinearRows, rows - row), b.col, b.cols}, memory, T{});
  }
}

// The same on AMX tiles. Whether a row goes there depends on that row alone, so that a sample's result does not depend on its batch.
template <typename T>
static void run_amx(const LinearCall& call, ScalarKind type) {
  const int64_t threads = torch::stable::get_num_threads(), block = amx::kLinearBlock;
  const int64_t block_bytes = amx::linear_packed_bytes(call.inputs, type);
  const int64_t row_blocks = (call.rows + block - 1) / block;
  const int64_t most = std::clamp<int64_t>(amx::kLinearSlabBytes / block_bytes, 1, amx::kLinearSlab / block);
  const int64_t slabs = (row_blocks + most - 1) / most, slab = (row_blocks + slabs - 1) / slabs;  // as equal as can be
  const int64_t panels = (call.outputs + block - 1) / block;
  const int64_t width = std::clamp<int64_t>(panels / (3 * threads), 1, kLinearCols / block) * block, cols = (call.outputs + width - 1) / width;
  thread_local Memory shared;
  const int64_t bytes = std::min(slab, row_blocks) * block_bytes;
  count_scratch(Scratch::packed_rows, bytes);
  char* const packed = shared.take(bytes);
  std::vector<uint32_t> bad_rows(row_blocks), bad_panels(cols);
  for (int64_t first = 0; first < row_blocks; first += slab) {
    const int64_t here = std::min(slab, row_blocks - first);
    torch::stable::parallel_for(0, here, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) bad_rows[first + i] = amx::linear_pack(call, (first + i) * block, i, here, packed, type);
    });
    const int64_t rows = std::min(here * block, call.rows - first * block);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, cols), 1, [&](int64_t, int64_t) {
      char* memory = scratch(amx::linear_scratch_bytes(rows, width, type));
      for (int64_t i = next++; i < cols; i = next++) {
        const LinearBlock part{first * block, rows, i * width, std::min(width, call.outputs - i * width)};
        bad_panels[i] = amx::linear_columns(call, part, packed, memory, type);
      }
    });
  }
  for (int64_t i = 0; i < row_blocks; ++i) {
    for (int64_t r = 0; r < block && bad_rows[i] != 0; ++r) {
      if (bad_rows[i] >> r & 1) redo<T>(call, {i * block + r, 1, 0, call.outputs});
    }
  }
  for (int64_t i = 0; i < cols; ++i) {
    for (int64_t n = 0; n < width / block && bad_panels[i] != 0; ++n) {
      const int64_t col = i * width + n * block;
      if (bad_panels[i] >> n & 1) redo<T>(call, {0, call.rows, col, std::min(block, call.outputs - col)});
    }
  }
}
#endif

template <typename T>
static void run(const LinearCall& call, ScalarKind type) {
#if defined(FUSEWIRE_HAS_AMX)
  if (active_isa() == Isa::amx) return run_amx<T>(call, type);
#endif
  run<T>(call);
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
        run<float>(call, ScalarKind::f32);
      break;
    case ScalarType::BFloat16: run<bfloat16>(call, ScalarKind::bf16); break;
    case ScalarType::Half: run<float16>(call, ScalarKind::f16); break;
    default: STD_TORCH_CHECK(false, "linear: unsupported dtype");
  }
  return out;
}

// A convolution whose patches are gathered where they are multiplied. x [B, C, H, W], channels-last; weight [O, C, kernel_h, kernel_w], contiguous
// -> [B, H' * W', O], contiguous.
static Tensor conv_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  STD_TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1, "conv_rows: the channels of x do not lie beside each other");
  const Picture picture{x.size(1), x.size(2), x.size(3), weight.size(2), weight.size(3), stride_h, stride_w, pad_h, pad_w,
                        x.stride(0), 1, x.stride(2), x.stride(3)};
  LinearCall call{};
  call.picture = &picture;
  call.x.data = x.data_ptr();
  call.x.channel = 1;
  call.rows = x.size(0) * picture.pixels();
  call.inputs = picture.channels * picture.taps();
  call.outputs = weight.size(0);
  call.weight = weight.data_ptr();
  call.weight_row = call.inputs;
  call.weight_col = picture.taps();
  if (bias) {
    call.bias = bias->data_ptr();
    call.bias_stride = bias->stride(0);
  }
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), picture.pixels(), call.outputs});
  call.out = out.data_ptr();
  if (call.rows == 0 || call.outputs == 0) return out;
  switch (x.scalar_type()) {
    case ScalarType::Float: run<float>(call); break;
    case ScalarType::BFloat16: run<bfloat16>(call); break;
    case ScalarType::Half: run<float16>(call); break;
    default: STD_TORCH_CHECK(false, "conv_rows: unsupported dtype");
  }
  return out;
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("linear", TORCH_BOX(&fusewire::linear));
  m.impl("conv_rows", TORCH_BOX(&fusewire::conv_rows));
}
