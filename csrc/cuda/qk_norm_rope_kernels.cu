// QK norm with rotary embedding on CUDA: q and k in one launch, each head's row read once and written once, by a part of a warp.
#include "cuda/qk_norm_rope.h"

#include "cuda/head_rows.h"

namespace fusewire::cuda {

template <typename T, int kChunks>
__global__ void __launch_bounds__(kHeadBlock) qk_norm_rope_kernel(const __grid_constant__ QkNorm k) {
  constexpr int N = kChunk<T>;
  const bool is_q = blockIdx.x < k.q_blocks;
  const QkPart& part = k.part[is_q ? 0 : 1];
  const unsigned i_row = (blockIdx.x - (is_q ? 0 : k.q_blocks)) * blockDim.y + threadIdx.y;
  const bool there = i_row < part.rows;  // a row that is not there still takes part in the sums
  const unsigned i_bt = there ? i_row / part.heads : 0;
  const int64_t i_h = there ? i_row % part.heads : 0, i_t = i_bt % part.tokens, i_b = i_bt / part.tokens;
  const T* x = static_cast<const T*>(part.x.data) + (i_b * part.x.batch + i_t * part.x.token + i_h * part.x.head);
  T* out = static_cast<T*>(part.out.data) + (i_b * part.out.batch + i_t * part.out.token + i_h * part.out.head);

  const auto channel = [](int j) { return static_cast<int>(threadIdx.x + j * blockDim.x) * N; };
  float r[kChunks][N], squares = 0.0f;
  int count[kChunks];
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    count[j] = there ? k.dim - channel(j) : 0;
    load_chunk(x + channel(j) * part.x.channel, part.x.channel, count[j], part.x.vector, r[j]);
#pragma unroll
    for (int i = 0; i < N; ++i) squares += r[j][i] * r[j][i];
  }
  float root = 1.0f;
  if (k.root == Root::computed) root = 1.0f / sqrtf(lane_sum(squares, static_cast<int>(blockDim.x)) / static_cast<float>(k.dim) + k.eps);
  if (k.root == Root::given && there) root = part.root[i_row];

#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    if (k.root != Root::none) {
#pragma unroll
      for (int i = 0; i < N; ++i) r[j][i] = k.exact ? rounded<T>(r[j][i] * root) : r[j][i] * root;
    }
    if (part.weight.data) {
      float w[N];
      load_chunk(static_cast<const T*>(part.weight.data) + channel(j) * part.weight.channel, part.weight.channel, count[j], part.weight.vector, w);
#pragma unroll
      for (int i = 0; i < N; ++i) r[j][i] = k.exact ? rounded<T>(r[j][i] * w[i]) : r[j][i] * w[i];
    }
    if (k.cos.data) {
      float c[N / 2], s[N / 2];
      load_rotation(k.cos, k.sin, i_t, channel(j), count[j], c, s);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        // (even, odd) -> (even cos - odd sin, odd cos + even sin)
        const float even = r[j][2 * i], odd = r[j][2 * i + 1];
        r[j][2 * i] = even * c[i] - odd * s[i];
        r[j][2 * i + 1] = odd * c[i] + even * s[i];
      }
    }
    store_chunk(out + channel(j) * part.out.channel, part.out.channel, count[j], part.out.vector, r[j]);
  }
}

template <typename T, int kChunks>
struct NormRows {
  static const char* launch(QkNorm& task, unsigned lanes, void* stream) {
    const unsigned rows = kHeadBlock / lanes;
    task.q_blocks = static_cast<unsigned>(ceil_div(task.part[0].rows, rows));
    const int64_t blocks = task.q_blocks + ceil_div(task.part[1].rows, rows);
    if (blocks > kMaxBlocks) return "q and k have too many rows";
    return cuda::launch(qk_norm_rope_kernel<T, kChunks>, blocks, dim3(lanes, rows), stream, task);
  }
};

const char* launch_qk_norm(QkNorm task, Type type, void* stream) {
  FUSEWIRE_CUDA_SWITCH(type, { return launch_heads<NormRows, T>(task, stream); })
  return "unknown dtype";
}

}  // namespace fusewire::cuda
