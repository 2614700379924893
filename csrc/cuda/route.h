// Which kernel takes which tensors. Plain C++, looks at no memory and no device.
#pragma once

#include <cstdint>
#include <limits>

#include "arguments.h"
#include "rank_k.h"

namespace fastcov::cuda {

inline int key_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Rows of keys are contiguous and start at multiples of 16 bytes.
inline bool has_vectors(const Update& u) {
  return u.x_col_stride == 1 && u.x_row_stride * key_bytes(u.dtype) % 16 == 0 && aligned(u.x, 16);
}

// Whether a tensor map can describe the keys and wgmma multiply them: 16 bits, no named rows, and
// sizes and strides within what a map holds.
inline bool wgmma_takes(const Update& u) {
  return u.dtype != Dtype::kFloat32 && u.rows == nullptr && has_vectors(u) &&
         u.x_row_stride >= u.d && u.x_row_stride * 2 < (int64_t{1} << 40) &&
         u.n < std::numeric_limits<int>::max() - Wgmma<1>::kDepth;
}

// `hopper`: the device has compute capability 9.0, and the kernel was compiled for it.
inline Route choose_route(const Update& u, bool hopper) {
  if (u.route != Route::kAuto) return u.route;
  return hopper && wgmma_takes(u) ? Route::kWgmma : Route::kMma;
}

inline Sum sum_of(const Update& u, int processors) {
  const bool pairs = u.c_col_stride == 1 && u.c_row_stride % 2 == 0 && aligned(u.c, 8);
  int* turns = u.turns_count >= turns_needed(processors) ? u.turns : nullptr;
  return {u.c, u.c_row_stride, u.c_col_stride, static_cast<int>(u.d), u.alpha, pairs, turns};
}

template <class L>
Schedule<typename L::Triangle> make_schedule(int64_t rows, int most, const Sum& sum) {
  const typename L::Triangle triangle = {sum.d};
  const bool divide = sum.turns != nullptr;
  const int tiles = triangle.count();
  // Workers without a tile of their own are of use where tiles can be divided.
  return {triangle, static_cast<int>((rows + L::kDepth - 1) / L::kDepth),
          divide || tiles > most ? most : tiles, divide};
}

template <class L>
WgmmaArguments<L> wgmma_arguments(const Update& u, int processors) {
  const Sum sum = sum_of(u, processors);
  const int most = processors > L::kCluster ? processors / L::kCluster : 1;
  return {sum, make_schedule<L>(u.n, most, sum), u.mask, static_cast<int>(u.n)};
}

template <class L>
MmaArguments<L> mma_arguments(const Update& u, int processors) {
  MmaArguments<L> arguments = {};
  arguments.sum = sum_of(u, processors);
  arguments.keys = u.x;
  arguments.row_stride = u.x_row_stride;
  arguments.col_stride = u.x_col_stride;
  arguments.n = u.n;
  arguments.mask = u.mask;
  arguments.rows = u.rows;
  arguments.count = u.rows != nullptr ? u.count : u.n;
  arguments.vectors = has_vectors(u);
  arguments.schedule = make_schedule<L>(arguments.count, processors, arguments.sum);
  return arguments;
}

}  // namespace fastcov::cuda
