// What AMX tiles can reach on this processor, one thread for each argument's core: prints "case<TAB>TFLOP/s" lines.
// The loops are those of a matrix product in bfloat16 with 2 x 2 tiles of results; only where operands and results lie differs.
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

constexpr int64_t kBlock = 4096;  // bytes of one step of both operands, and of 32 x 32 results
constexpr int kRounds = 25;
static std::atomic<int> ready{0};

struct Case {
  const char* name;
  int64_t steps, left_blocks;  // of 32 summed elements between visits to the results; blocks of 32 rows that take turns
  bool loads, results;         // whether operands are loaded, and results loaded and stored
  bool streams = false;        // whether rows pass by the first-level cache, and the next results are fetched into it meanwhile
};
static const Case kCases[] = {
    {"products of what is in tile registers", 8, 1, false, false},
    {"operands in the first-level cache", 8, 1, true, false},
    {"rows from the second-level cache, columns from the first", 8, 8, true, false},
    {"the same, and results updated every 256 summed elements", 8, 8, true, true},
    {"the same, every 512, rows passing by the first-level cache and results fetched into it ahead", 16, 8, true, true, true},
    {"rows and columns from the second-level cache, results every 1536", 48, 8, true, true},
};

static double run(const Case& c, char* memory, int threads, int round) {
  char *columns = memory, *rows = memory + (256 << 10), *results = memory + (1280 << 10);
  const int64_t visits = 24000 / c.steps;
  ready.fetch_add(1);
  while (ready.load() < threads * (round + 1)) {}
  const auto start = std::chrono::steady_clock::now();
  for (int64_t v = 0; v < visits; ++v) {
    const char *a = rows + v % c.left_blocks * c.steps * kBlock / 2, *b = columns;
    char *out = results + v % 48 * kBlock, *next = results + (v + 1) % 48 * kBlock;
    const int64_t lines = kBlock / 64 / c.steps;  // of the next results, a step
    asm volatile("" ::: "memory");
    if (c.results) {
      _tile_loadd(0, out, 64); _tile_loadd(1, out + 1024, 64); _tile_loadd(2, out + 2048, 64); _tile_loadd(3, out + 3072, 64);
    } else {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (int64_t s = 0; s < c.steps; ++s, a += kBlock / 2, b += kBlock / 2) {
      if (c.loads) {
        for (int64_t i = 0; c.streams && i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T0);
        _tile_loadd(6, b, 64);
        if (c.streams) _tile_stream_loadd(4, a, 64);
        else _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (c.streams) _tile_stream_loadd(5, a + 1024, 64);
        else _tile_loadd(5, a + 1024, 64);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (c.results) {
      _tile_stored(0, out, 64); _tile_stored(1, out + 1024, 64); _tile_stored(2, out + 2048, 64); _tile_stored(3, out + 3072, 64);
    }
    asm volatile("" ::: "memory");
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(c.steps * visits) / seconds * 1e-12;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1, cases = sizeof(kCases) / sizeof(kCases[0]);
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1;  // Linux: ask for the tile registers
  std::vector<std::vector<double>> best(threads, std::vector<double>(cases, 0));
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      alignas(64) uint8_t config[64] = {1};
      for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
      asm volatile("" : : "r"(config) : "memory");
      _tile_loadconfig(config);
      char* memory = static_cast<char*>(std::aligned_alloc(2 << 20, 2 << 20));
      madvise(memory, 2 << 20, MADV_HUGEPAGE);
      for (int64_t i = 0; i < 1 << 20; ++i) reinterpret_cast<uint16_t*>(memory)[i] = static_cast<uint16_t>(0x3c00 + i * 7919 % 100 + (i * 104729 % 2 << 15));
      _tile_loadd(4, memory, 64); _tile_loadd(5, memory, 64); _tile_loadd(6, memory, 64); _tile_loadd(7, memory, 64);
      for (int round = 0; round < kRounds * cases; ++round) {
        const int i = round % cases;
        const double rate = run(kCases[i], memory, threads, round);
        if (rate > best[t][i]) best[t][i] = rate;
      }
      _tile_release();
    });
  }
  for (auto& thread : team) thread.join();
  for (int i = 0; i < cases; ++i) {
    double sum = 0;
    for (const auto& of_thread : best) sum += of_thread[i];
    std::printf("%s\t%.2f\n", kCases[i].name, sum);
  }
}
