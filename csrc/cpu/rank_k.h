// What the variants compute on a CPU: the symmetric rank-k update, lower triangle of C += alpha *
// X^T X over given rows; and products of few rows.
#pragma once

#include <cstdint>

namespace fastcov::cpu {

// The codes that Python passes; fastcov/kernels/cpu.py has the same.
enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

struct Problem {
  const void* x;                 // keys
  Dtype x_dtype;                 // any of the four
  std::int64_t x_column_stride;  // in elements
  const std::int64_t* offsets;   // of the first element of each row to sum, in elements from x
  std::int64_t rows;             // how many offsets there are
  std::int64_t d;                // columns of x; C is (d, d)
  void* c;                       // the sum
  Dtype c_dtype;                 // kFloat32 or kFloat64, and products are summed in the same
  std::int64_t c_row_stride;     // in elements
  std::int64_t c_column_stride;  // in elements
  double alpha;
  int threads;
};

// y = x W^T, or x W where `across`, for few rows x and a matrix W (n, k) in float32.
struct Skinny {
  const float* x;         // (m, k), or (m, n) where `across`; columns side by side, as in W
  std::int64_t x_stride;  // in elements, of a row
  std::int64_t m;         // at most `skinny_most` of the variant
  const float* w;
  std::int64_t w_stride;
  std::int64_t n;
  std::int64_t k;
  float* y;  // (m, n), or (m, k) where `across`; without gaps
  bool across;
  int threads;
};

// One compiled variant. `run` throws std::bad_alloc where its workspace cannot be had.
struct Variant {
  const char* name;
  // Whether this processor and its operating system can run it.
  bool (*supported)();
  void (*run)(const Problem&);
  // The rate of independent multiply-adds on registers alone, in GFLOP/s, over so many threads;
  // `dtype` kFloat32 or kFloat64, or kBFloat16 for the variants that multiply pairs of bf16.
  double (*peak)(Dtype dtype, int threads, double seconds);
  // Products of few rows, up to so many; null where the variant has none of its own.
  void (*skinny)(const Skinny&);
  int skinny_most;
};

// All variants in this build, the fastest first.
const Variant* variants(int* count);

bool is_intel();  // who made this processor

// Instances of the variants, each compiled for its own instructions. Nothing of them may be called
// before `supported` said so.
namespace portable {
void run(const Problem&);
double peak(Dtype, int, double);
void skinny(const Skinny&);
}  // namespace portable
namespace avx2 {
void run(const Problem&);
double peak(Dtype, int, double);
void skinny(const Skinny&);
}  // namespace avx2
namespace avx512f {
void run(const Problem&);
double peak(Dtype, int, double);
void skinny(const Skinny&);
}  // namespace avx512f
namespace avx512_bf16 {
void run(const Problem&);
double peak(Dtype, int, double);
}  // namespace avx512_bf16
namespace amx_bf16 {
bool supported();
void run(const Problem&);
double peak(Dtype, int, double);
}  // namespace amx_bf16

}  // namespace fastcov::cpu
