// One variant of the update. The including file says for which registers:
//
//   FASTCOV_VARIANT        the namespace
//   FASTCOV_VECTOR_BYTES   the width of a register
//   FASTCOV_ROWS           rows of the register tile
//   FASTCOV_VECTORS        vectors in a row of the register tile
//   FASTCOV_BFLOAT_PAIRS   bf16 keys of float32 sums are multiplied in pairs
//
// Everything below is compiled with the instructions of that variant, so it lies in its namespace
// and uses no function of the standard library that another file might share with it.

#include <chrono>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "rank_k.h"
#include "workspace.h"

namespace fastcov::cpu::FASTCOV_VARIANT {
namespace {

constexpr int kPanel = 48;           // columns of a panel
constexpr int kSlice = 256;          // rows of keys a tile runs through at once
constexpr std::int64_t kSlices = 8;  // slices of a chunk, at most
constexpr std::int64_t kWorkspace = std::int64_t{96} << 20;  // bytes of packed panels, at most
constexpr std::int64_t kBlock = 8;                           // panels a side of a block
constexpr std::int64_t kFew = 128;                           // rows of keys, so few that C decides

#include "arithmetic.h"
#include "blocks.h"
#include "pack.h"
#include "triangle.h"

using Floats = Plain<float, FASTCOV_VECTOR_BYTES / 4>;
using Doubles = Plain<double, FASTCOV_VECTOR_BYTES / 8>;
#ifdef FASTCOV_BFLOAT_PAIRS
using Pairs = BfloatPairs<FASTCOV_VECTOR_BYTES / 4>;
#endif

#include "skinny.h"

}  // namespace

void run(const Problem& p) {
  if (p.rows == 0 || p.d == 0) return;
  if (p.c_dtype == Dtype::kFloat64) {
    Triangle<Doubles, FASTCOV_ROWS, FASTCOV_VECTORS>::run(p);
    return;
  }
#ifdef FASTCOV_BFLOAT_PAIRS
  if (p.x_dtype == Dtype::kBFloat16) {
    Triangle<Pairs, FASTCOV_ROWS, FASTCOV_VECTORS>::run(p);
    return;
  }
#endif
  Triangle<Floats, FASTCOV_ROWS, FASTCOV_VECTORS>::run(p);
}

void skinny(const Skinny& p) {
  if (p.across) {
    const std::int64_t groups = parts(p.m, kGroupMost);
    across<2>(p, parts(p.m, groups));
  } else if (p.m <= kDots) {
    dots<1>(p);
  } else {
    along<1>(p);
  }
}

double peak(Dtype dtype, int threads, double seconds) {
  if (dtype == Dtype::kFloat64) return multiply_add_rate<Doubles>(threads, seconds);
#ifdef FASTCOV_BFLOAT_PAIRS
  if (dtype == Dtype::kBFloat16) return multiply_add_rate<Pairs>(threads, seconds);
#endif
  return multiply_add_rate<Floats>(threads, seconds);
}

}  // namespace fastcov::cpu::FASTCOV_VARIANT
