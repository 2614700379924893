// The kernel for sm_90a. Warpgroup 0 fetches, warpgroups 1 and 2 multiply; device.h has the
// instructions, layout.h the sizes and places.
#pragma once

#include "arguments.h"
#include "device.h"

namespace fastcov::cuda {

template <class Key, int kCluster>
class WgmmaKernel {
  using L = Wgmma<kCluster>;

 public:
  FASTCOV_DEVICE WgmmaKernel(const WgmmaArguments<L>& arguments, const device::TensorMap* keys)
      : arguments_(arguments),
        keys_(keys),
        rank_(kCluster > 1 ? device::cluster_rank() : 0),
        base_((device::shared_base() + L::kAlignment - 1) & ~uint32_t{L::kAlignment - 1}) {}

  FASTCOV_DEVICE void run() {
    if (device::thread() == 0) {
      for (int stage = 0; stage < L::kStages; ++stage) {
        device::barrier_init(full(stage), L::kFullArrivals);
        device::barrier_init(empty(stage), L::kEmptyArrivals);
        device::barrier_init(fixed(stage), L::kFixedArrivals);
      }
      device::barrier_init_fence();
    }
    device::sync_cluster();
    const int warp = device::thread() / kWarp;
    if (warp < kWarpgroup / kWarp) {
      device::release_registers<L::kFetcherRegisters>();
      if (warp == 0) {
        if (device::thread() == 0) fetch();
      } else if (arguments_.mask != nullptr) {
        clear_masked(warp - 1);
      }
    } else {
      device::claim_registers<L::kConsumerRegisters>();
      multiply();
    }
    // A block must not end while the other one may still write into its shared memory.
    device::sync_cluster();
  }

 private:
  FASTCOV_DEVICE uint32_t full(int stage) const { return base_ + L::full_offset(stage); }
  FASTCOV_DEVICE uint32_t empty(int stage) const { return base_ + L::empty_offset(stage); }
  FASTCOV_DEVICE uint32_t fixed(int stage) const { return base_ + L::fixed_offset(stage); }

  // Blocks start in order, and a worker waits for higher ones only: those must not start later.
  FASTCOV_DEVICE static int worker() { return (device::blocks() - 1 - device::block()) / kCluster; }
  FASTCOV_DEVICE int first_row(Tile tile) const {
    return (tile.row * kCluster + static_cast<int>(rank_)) * L::kRows;
  }

  // One thread. The keys of C's rows are this block's own; those of its columns are fetched in
  // parts that every block of the cluster sends to all. The full barrier counts the bytes of all
  // parts.
  FASTCOV_DEVICE void fetch() const {
    device::prefetch_map(keys_);
    Ring<L::kStages> ring;
    typename Schedule<typename L::Triangle>::Next next;
    Piece piece;
    while (arguments_.schedule.take(worker(), &next, &piece)) {
      const Tile tile = piece.tile;
      for (int step = piece.begin; step < piece.end; ++step, ring.advance()) {
        const uint32_t bar = full(ring.stage);
        const int k = step * L::kDepth;
        device::barrier_wait(empty(ring.stage), ring.phase ^ 1);
        device::barrier_expect(bar, L::kStageBytes);
        for (int chunk = 0; chunk < L::kChunksA; ++chunk) {
          for (int part = 0; part < kCluster; ++part) {
            device::load_box(base_ + L::a_offset(ring.stage, chunk) + part * L::kBoxBytes, keys_,
                             first_row(tile) + chunk * L::kChunk, k + part * L::kBoxRows, bar);
          }
        }
        for (int chunk = 0; chunk < L::kChunksB; ++chunk) {
          const uint32_t place = base_ + L::b_offset(ring.stage, chunk) + rank_ * L::kBoxBytes;
          const int col = tile.col * L::kCols + chunk * L::kChunk;
          const int row = k + static_cast<int>(rank_) * L::kBoxRows;
          if (kCluster > 1) {
            device::load_box_to_all(place, keys_, col, row, bar, (1u << kCluster) - 1);
          } else {
            device::load_box(place, keys_, col, row, bar);
          }
        }
      }
    }
  }

  // The other three warps of the warpgroup, where there is a mask: write zeros over masked rows in
  // both operands, since zero times NaN is NaN. Padding is rare where batches are bucketed by
  // length, so most stages are looked at and passed on.
  FASTCOV_DEVICE void clear_masked(int fixer) const {
    const int lane = device::thread() % kWarp;
    Ring<L::kStages> ring;
    typename Schedule<typename L::Triangle>::Next next;
    Piece piece;
    while (arguments_.schedule.take(worker(), &next, &piece)) {
      for (int step = piece.begin; step < piece.end; ++step, ring.advance()) {
        const int k = step * L::kDepth;
        // Loaded before the wait, which hides what it takes.
        const uint32_t low = device::ballot(masked(k + lane));
        const uint32_t high = device::ballot(masked(k + kWarp + lane));
        device::barrier_wait(full(ring.stage), ring.phase);
        if ((low | high) != 0) {
          for (int row = fixer; row < L::kDepth; row += L::kFixers) {
            if (((row < kWarp ? low >> row : high >> (row - kWarp)) & 1) == 0) continue;
            // The swizzle permutes the units within a row, and the whole row goes.
            for (int unit = lane; unit < (L::kChunksA + L::kChunksB) * 8; unit += kWarp) {
              device::store_zeros16(base_ + L::a_offset(ring.stage, unit / 8) + row * 128 +
                                    unit % 8 * 16);
            }
          }
          device::async_proxy_fence();
        }
        device::sync_warp();
        if (lane == 0) device::barrier_arrive(fixed(ring.stage));
      }
    }
  }

  FASTCOV_DEVICE bool masked(int row) const {
    return row < arguments_.n && arguments_.mask[row] == 0;
  }

  // A consumer warpgroup: 64 rows of the tile.
  FASTCOV_DEVICE void multiply() const {
    constexpr int kGroup = L::kPromote / L::kDepth;
    const int group = device::thread() / kWarpgroup - 1;
    Ring<L::kStages> ring;
    typename Schedule<typename L::Triangle>::Next next;
    Piece piece;
    while (arguments_.schedule.take(worker(), &next, &piece)) {
      float total[L::kAccumulators] = {};
      // The warpgroups promote at different times, so that one multiplies while the other adds.
      int stop = piece.begin + kGroup / (1 + group);
      int step = piece.begin;
      while (step < piece.end) {
        if (stop > piece.end) stop = piece.end;
        float sums[L::kAccumulators] = {};
        int previous = -1;
        for (; step < stop; ++step, ring.advance()) {
          device::barrier_wait(full(ring.stage), ring.phase);
          if (arguments_.mask != nullptr) device::barrier_wait(fixed(ring.stage), ring.phase);
          device::wgmma_fence();
#pragma unroll
          for (int k = 0; k < L::kDepth; k += L::kStep) {
            device::wgmma<Key>(sums,
                               L::descriptor(base_ + L::a_offset(ring.stage, group) + k * 128),
                               L::descriptor(base_ + L::b_offset(ring.stage, 0) + k * 128));
          }
          device::wgmma_commit();
          if (previous >= 0) {
            device::wgmma_wait<1>();  // the stage before is no longer read
            release(previous);
          }
          previous = ring.stage;
        }
        device::wgmma_wait<0>();
        device::wgmma_settle(sums);
        release(previous);
#pragma unroll
        for (int i = 0; i < L::kAccumulators; ++i) total[i] += sums[i];
        stop += kGroup;
      }
      const int place = (piece.slot * kCluster + static_cast<int>(rank_)) * L::kConsumers + group;
      in_turn(
          arguments_.sum, piece, place, device::thread() % kWarpgroup == 0,
          [=] { device::sync_warpgroup(group); }, [&] { add(piece.tile, group, total); });
    }
  }

  FASTCOV_DEVICE void add(Tile tile, int group, const float (&total)[L::kAccumulators]) const {
    const Sum& sum = arguments_.sum;
    const int thread = device::thread() % kWarpgroup;
    const int64_t top = first_row(tile) + group * L::kGroupRows;
    const int64_t row = top + L::row(thread, 0);
    const int64_t col = static_cast<int64_t>(tile.col) * L::kCols + L::col(thread, 0);
    // Most tiles are wholly inside of the triangle: no comparison for each element there.
    if (sum.pairs && top + L::kGroupRows <= sum.d && (tile.col + 1) * L::kCols <= top) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* place = sum.data + (row + 8 * half) * sum.row_stride + col;
#pragma unroll
        for (int i = 2 * half; i < L::kAccumulators; i += 4) {
          device::add_global(place + 2 * i - 4 * half, sum.alpha * total[i],
                             sum.alpha * total[i + 1]);
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < L::kAccumulators; i += 2) {
      add_pair(sum, top + L::row(thread, i),
               static_cast<int64_t>(tile.col) * L::kCols + L::col(thread, i), total[i],
               total[i + 1]);
    }
  }

  // One lane of every warp tells every producer that writes into this block's stage.
  FASTCOV_DEVICE void release(int stage) const {
    const int lane = device::thread() % kWarp;
    if (kCluster == 1) {
      if (lane == 0) device::barrier_arrive(empty(stage));
    } else if (lane < kCluster) {
      device::barrier_arrive_at(empty(stage), lane);
    }
  }

  const WgmmaArguments<L>& arguments_;
  const device::TensorMap* keys_;
  uint32_t rank_;
  uint32_t base_;
};

}  // namespace fastcov::cuda
