// Tiles of AMX: bf16 keys as they are, others in parts of bf16, summed in float32.
//
// float64 sums, keys too large or too small for parts, and very few rows go to avx512f, which every
// processor with AMX has. bf16 keys below 2^-126 count as zero, as in avx512_bf16, and so do
// products.
#include <chrono>
#include <cstddef>
#include <cstdint>

#include <immintrin.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "rank_k.h"
#include "workspace.h"

namespace fastcov::cpu::amx_bf16 {
namespace {

constexpr int kPanel = 64;  // columns of a panel
// Bytes of packed panels, but for the rounding to whole slices; fewer than the other variants take,
// since what is packed anew into the same place is read from the caches.
constexpr std::int64_t kWorkspace = std::int64_t{32} << 20;
constexpr std::int64_t kFewest = 256;  // rows, whatever they take
constexpr std::int64_t kBlock = 6;     // panels a side of a block

// What pack.h is to make: pairs of bf16 words, or floats.
struct PairKeys {
  static constexpr int kStep = 2;
};
struct FloatKeys {
  static constexpr int kStep = 1;
};

// What is not for tiles.
void plain_run(const Problem& p) {
#ifdef __AMX_BF16__
  avx512f::run(p);
#else
  portable::run(p);
#endif
}

#include "blocks.h"
#include "pack.h"
#include "tiles.h"
// After both.
#include "split.h"
#include "tile_triangle.h"

}  // namespace

bool supported() {
#if defined(__AMX_BF16__) && defined(__linux__)
  // Linux gives a process these registers when it asks, once and for all of its threads.
  static const bool granted = [] {
    constexpr unsigned kBfloatTiles = (1u << 22) | (1u << 24);
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBfloatTiles) == kBfloatTiles &&
           syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

void run(const Problem& p) {
  if (p.rows == 0 || p.d == 0) return;
  if (p.c_dtype == Dtype::kFloat64) return plain_run(p);
  switch (p.x_dtype) {
    case Dtype::kBFloat16:
      return TileTriangle<1>::run(p);
    case Dtype::kFloat16:
      return TileTriangle<2>::run(p);
    case Dtype::kFloat32:
    case Dtype::kFloat64:
      return TileTriangle<3>::run(p);
  }
}

// Products of registers that depend on nothing but themselves, divided by how many of them a
// multiply-add of such keys takes.
double peak(Dtype dtype, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr std::int64_t kRepeat = 1 << 14;
  double rate = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(+ : rate)
#else
  (void)threads;
#endif
  {
    Tiles tiles;
    std::int64_t rounds = 0;
    const auto begin = Clock::now();
    double elapsed = 0;
    while (elapsed < seconds) {
      for (std::int64_t i = 0; i < kRepeat; ++i) TileTriangle<1>::product(tiles);
      ++rounds;
      elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    }
    rate += 4.0 * kTileFlops * kRepeat * rounds / elapsed * 1e-9;
  }
  if (dtype == Dtype::kBFloat16) return rate;
  if (dtype == Dtype::kFloat16) return rate / TileTriangle<2>::kProducts;
  return rate / TileTriangle<3>::kProducts;
}

}  // namespace fastcov::cpu::amx_bf16
