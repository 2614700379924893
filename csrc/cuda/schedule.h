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
// The tiles of the round that would leave some of them idle are cut into equal parts of steps, and
// as many workers as there are for each part take that part of one tile after another: those that
// run at the same time read the same rows of keys of neighbouring tiles. Shares of the same size
// for all would balance better, but put every worker at other rows, so that about twice as many
// keys are asked for at a time.
//
// Made on the host, once, and handed to the kernel: there it costs no registers.
template <class Triangle>
class Schedule {
 public:
  static constexpr int kLeastShare = 8;  // steps; below that, adding up the parts costs more
  static constexpr int kAdding = 9;      // steps; what a piece costs beside its own, an estimate
  static constexpr int kParts = 16;      // of a tile, at most, unless there are workers for more

  constexpr Schedule() = default;
  constexpr Schedule(Triangle triangle, int steps, int workers, bool divide)
      : triangle_(triangle), steps_(steps), workers_(workers), whole_(triangle.count()) {
    const int rest = whole_ % workers;
    if (!divide || rest == 0) return;
    const int most = workers / rest > kParts ? workers / rest : kParts;
    int64_t least = int64_t{steps} + kAdding;
    for (int parts = 2; parts <= most && parts <= workers && steps / parts >= kLeastShare;
         ++parts) {
      const int each = workers / parts;  // workers for a part
      const int rounds = (rest + each - 1) / each;
      const int64_t cost = int64_t{rounds} * ((steps + parts - 1) / parts + kAdding);
      // The more parts, the fewer workers read the same rows: they have to be worth it.
      if (33 * cost > 32 * least) continue;
      least = cost;
      parts_ = parts;
    }
    if (parts_ > 1) whole_ -= rest;
  }

  FASTCOV_HD constexpr int workers() const { return workers_; }

  // Where a worker is in its list of pieces; begin with a default one.
  struct Next {
    int round = 0;  // of whole tiles, then of parts
  };

  // The next piece of a worker. False if there is none.
  FASTCOV_HD constexpr bool take(int worker, Next* next, Piece* piece) const {
    const int tile = next->round * workers_ + worker;
    if (tile < whole_) {
      ++next->round;
      *piece = {triangle_.at(tile), 0, steps_, 0, 1, 0};
      return true;
    }
    const int each = workers_ / parts_;
    const int part = worker / each;
    if (parts_ == 1 || part >= parts_) return false;
    const int slot = (next->round - whole_ / workers_) * each + worker % each;
    if (whole_ + slot >= triangle_.count()) return false;
    ++next->round;
    // The last part is added first: a worker waits for higher ones only, which have begun before
    // it, so that nobody waits for one that finds no place on the device.
    *piece = {triangle_.at(whole_ + slot), start(part), start(part + 1),
              parts_ - 1 - part,           parts_,      slot};
    return true;
  }

 private:
  // The first step of a part. The first ones have a step more than the others.
  FASTCOV_HD constexpr int start(int part) const {
    const int larger = steps_ % parts_;
    return part * (steps_ / parts_) + (part < larger ? part : larger);
  }

  Triangle triangle_;
  int steps_ = 0;
  int workers_ = 1;
  int whole_ = 0;  // tiles that are not divided; they come first in the order
  int parts_ = 1;  // of each of the others
};

}  // namespace fastcov::cuda
