// The instructions the kernels are written in. The tests put an emulation in their place and run
// the kernels on the CPU: see tests/native/.
#pragma once

#ifdef FASTCOV_EMULATED
#include "emulated_device.h"
#else
#include "ptx.cuh"
#endif

namespace fastcov::cuda {

// Adds two neighbours in a row to C, as far as they are on or below the diagonal. The addition is
// left to the L2 cache, because then nothing waits for C to arrive.
FASTCOV_DEVICE void add_pair(const Sum& sum, int64_t row, int64_t col, float first, float second) {
  if (row >= sum.d || col > row) return;
  float* place = sum.data + row * sum.row_stride + col * sum.col_stride;
  if (sum.pairs && col < row) {
    device::add_global(place, sum.alpha * first, sum.alpha * second);
    return;
  }
  device::add_global(place, sum.alpha * first);
  if (col < row) device::add_global(place + sum.col_stride, sum.alpha * second);
}

// Calls add() when it is this piece's turn. `place` tells apart the groups of threads that add to
// different parts of the tile, `leader` is true in one thread of a group, and sync() waits for all
// of the group. An element is added to by the same thread of every worker.
template <class Sync, class Add>
FASTCOV_DEVICE void in_turn(const Sum& sum, const Piece& piece, int place, bool leader, Sync sync,
                            Add add) {
  if (piece.parts == 1) {
    add();
    return;
  }
  int* turn = sum.turns + place;
  if (leader) device::turn_wait(turn, piece.turn);
  sync();
  add();
  device::global_fence();
  sync();
  if (leader) device::turn_set(turn, piece.turn + 1);
}

}  // namespace fastcov::cuda
