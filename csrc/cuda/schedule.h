// Which tiles of the lower triangle are computed, in which order and by whom.
//
// Everything here is constexpr and runs on the host and on the device, so that the tests execute
// the same arithmetic as the kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTCOV_HD __host__ __device__ __forceinline__
#else
#define FASTCOV_HD inline
#endif

namespace fastcov::cuda {

// One tile: its place in units of tiles.
struct Tile {
  int row;
  int col;
};

// The tiles that hold at least one element on or below the diagonal of a (d, d) matrix.
//
// Blocks that run at the same time take neighbouring tiles of this order. It goes down bands of
// kBand tile rows, column by column, so that those blocks form a near-square patch: its key
// columns are few enough to stay in the L2 cache, whatever d is. In a plain row-major order they
// would form a strip, whose keys exceed what device memory can deliver.
template <int kRows, int kCols, int kBand>
struct Triangle {
  int d = 0;

  FASTCOV_HD constexpr int row_tiles() const { return (d + kRows - 1) / kRows; }

  // Tile columns that row tile r needs: up to the one that holds its last row's diagonal element.
  FASTCOV_HD constexpr int width(int r) const {
    const int last = (r + 1) * kRows < d ? (r + 1) * kRows : d;
    return (last - 1) / kCols + 1;
  }

  FASTCOV_HD constexpr int count() const {
    int total = 0;
    for (int r = 0; r < row_tiles(); ++r) total += width(r);
    return total;
  }

  // The tile at a place of the order, 0 <= index < count(). Takes one step per row tile: nothing
  // beside the work of a tile.
  FASTCOV_HD constexpr Tile at(int index) const {
    int first = 0;
    int stop = 0;
#pragma unroll 1
    for (;; first = stop) {
      stop = first + kBand < row_tiles() ? first + kBand : row_tiles();
      int tiles = 0;
#pragma unroll 1
      for (int r = first; r < stop; ++r) tiles += width(r);
      if (index < tiles) break;
      index -= tiles;
    }
    const int rows = stop - first;
    const int full = width(first);  // columns that every row of the band needs
    if (index < full * rows) return {first + index % rows, index / rows};
    index -= full * rows;
    int col = full;
    int top = first;
    for (;; ++col) {
      while (width(top) <= col) ++top;  // widths grow downwards
      if (index < stop - top) break;
      index -= stop - top;
    }
    return {top + index, col};
  }
};

// What a worker (a block, or a cluster of blocks) computes at a time: the steps begin <= step < end
// of a tile, a step being some rows of keys.
//
// A tile may be divided among `parts` workers. They add to C one after another, this one as number
// `turn`, so that the result is the same in every run; `slot` numbers the divided tiles.
struct Piece {
  Tile tile;
  int begin;
  int end;
  int turn;
  int parts;
  int slot;
};

// Who computes what. Workers take whole tiles in turn as long as there is one for each of them.
// What is left over would leave some of them idle, so it is put together with the last full round,
// if there is one, and divided evenly: consecutive workers get consecutive shares of steps.
//
// Made on the host, once, and handed to the kernel: there it costs no registers.
template <class Triangle>
class Schedule {
 public:
  static constexpr int kLeastShare = 8;  // steps; below that, adding up the parts costs more

  constexpr Schedule() = default;
  constexpr Schedule(Triangle triangle, int steps, int workers, bool divide)
      : triangle_(triangle), steps_(steps), workers_(workers), whole_(triangle.count()) {
    const int tiles = whole_;
    const int rest = tiles % workers;
    if (!divide || rest == 0) return;
    const int slots = rest + (tiles > workers ? workers : 0);
    const int64_t divided = static_cast<int64_t>(slots) * steps;
    // Counted in int from here on: of so many rows that it overflows, nothing is divided.
    if (divided < int64_t{kLeastShare} * workers || divided > INT32_MAX) return;
    whole_ = tiles - slots;
    share_ = static_cast<int>(divided / workers);
    larger_ = static_cast<int>(divided % workers);
  }

  FASTCOV_HD constexpr int workers() const { return workers_; }

  // Where a worker is in its list of pieces; begin with a default one.
  struct Next {
    int round = 0;  // of whole tiles
    int done = 0;   // steps of the worker's share
  };

  // The next piece of a worker. False if there is none.
  FASTCOV_HD constexpr bool take(int worker, Next* next, Piece* piece) const {
    const int tile = next->round * workers_ + worker;
    if (tile < whole_) {
      ++next->round;
      *piece = {triangle_.at(tile), 0, steps_, 0, 1, 0};
      return true;
    }
    const int step = start(worker) + next->done;
    const int stop = start(worker + 1);
    if (step >= stop) return false;
    const int slot = step / steps_;
    const int first = slot * steps_;
    const int last = first + (steps_ - 1);
    const int end = stop <= last ? stop : last + 1;
    next->done += end - step;
    // The worker of a tile's last part computes it first of all, and the worker of its first part
    // last. In that order nobody waits for long.
    const int final = worker_of(last);
    *piece = {triangle_.at(whole_ + slot),  step - first, end - first, final - worker,
              final - worker_of(first) + 1, slot};
    return true;
  }

 private:
  // The first step of a worker's share, all divided steps being counted in one row. The first
  // `larger_` workers have one more than the others.
  FASTCOV_HD constexpr int start(int worker) const {
    return worker * share_ + (worker < larger_ ? worker : larger_);
  }
  FASTCOV_HD constexpr int worker_of(int step) const {
    const int boundary = larger_ * (share_ + 1);
    return step < boundary ? step / (share_ + 1) : larger_ + (step - boundary) / share_;
  }

  Triangle triangle_;
  int steps_ = 0;
  int workers_ = 1;
  int whole_ = 0;  // tiles that are not divided; they come first in the order
  int share_ = 0;
  int larger_ = 0;
};

}  // namespace fastcov::cuda
