// What the kernels are given.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fastcov::cuda {

// The element types of keys. TF32 parts stand for float32 keys.
struct BFloat16 {};
struct Float16 {};
struct Tf32 {};

// The sum C (d, d), of which the lower triangle gets alpha times the products.
struct Sum {
  float* data;
  int64_t row_stride;
  int64_t col_stride;
  int d;
  float alpha;
  bool pairs;  // two neighbours in a row are 8 aligned bytes if the first has an even column
  int* turns;  // zeros, one for every part of C that several workers may add to; or null
};

// Turns that a launch needs on a device with so many multiprocessors.
constexpr int64_t turns_needed(int processors) { return int64_t{4} * processors; }

// Beside these, the wgmma kernel gets the keys as a tensor map. Rows beyond n and columns beyond d
// read as zeros there.
template <class L>
struct WgmmaArguments {
  Sum sum;
  Schedule<typename L::Triangle> schedule;
  const uint8_t* mask;  // (n,), zero where a row is left out; or null
  int n;
};

template <class L>
struct MmaArguments {
  Sum sum;
  Schedule<typename L::Triangle> schedule;
  const void* keys;
  int64_t row_stride;
  int64_t col_stride;
  int64_t n;
  const uint8_t* mask;  // (n,) or null
  const int64_t* rows;  // (count,) or null
  int64_t count;        // rows to add up: n, or how many are named
  bool vectors;         // units of 16 bytes are aligned and contiguous
};

}  // namespace fastcov::cuda
