// The rank-k update on CUDA devices. Plain C++: includes nothing of CUDA.
#pragma once

#include <cstdint>

namespace fastcov::cuda {

// The codes that Python passes, the same as for the CPU.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 3 };

// Which kernel runs. kAuto takes wgmma where the device and the keys allow it.
enum class Route : int { kAuto = 0, kMma = 1, kWgmma = 2 };

// Lower triangle of C (d, d), float32, += alpha * X^T X over the rows of X (n, d) that are kept.
// Strides are in elements; pointers are on the device.
struct Update {
  int device;
  void* stream;  // cudaStream_t
  float* c;
  int64_t c_row_stride;
  int64_t c_col_stride;
  const void* x;
  Dtype dtype;
  int64_t n;
  int64_t d;
  int64_t x_row_stride;
  int64_t x_col_stride;
  const uint8_t* mask;  // (n,), zero where a row is left out, or null
  const int64_t* rows;  // (count,), indices of rows, or null
  int64_t count;
  float alpha;
  int* turns;           // (turns_count,) zeros, by which divided tiles are added up in order
  int64_t turns_count;  // 4 for every multiprocessor; if there are fewer, no tile is divided
  Route route;
};

// Launches the update. Returns a cudaError_t, 0 for success; otherwise nothing was launched.
int rank_k_update(const Update& update);

// The route that these arguments take on their device, in `route`. Returns a cudaError_t.
int find_route(const Update& update, Route* route);

// Whether the device can run the kernels of this build: a cudaError_t, 0 if it can.
int check_device(int device);

// The name and the text of a cudaError_t.
const char* error_name(int error);
const char* error_text(int error);

}  // namespace fastcov::cuda
