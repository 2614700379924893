// Tile sizes, shared-memory layouts and register layouts of both kernels.
//
// Everything here is constexpr and runs on the host and on the device, so that the tests execute
// the same arithmetic as the kernels. Sizes are in elements unless a name says bytes.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace fastcov::cuda {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

// Where a lane's accumulators lie in the 16 x 8 fragment that mma.sync and wgmma share: registers
// 0, 1 are neighbours in row lane / 4; registers 2, 3 lie eight rows below.
FASTCOV_HD constexpr int fragment_row(int lane, int reg) { return lane / 4 + 8 * (reg / 2); }
FASTCOV_HD constexpr int fragment_col(int lane, int reg) { return 2 * (lane % 4) + reg % 2; }

// The state of a ring of stages guarded by mbarriers. Consumers wait for parity `phase`. Producers
// wait for `phase ^ 1`, which a fresh barrier grants at once: the first round finds stages empty.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  FASTCOV_HD constexpr void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The kernel for sm_90a: wgmma on tiles that TMA puts into shared memory.
//
// Two blocks of a cluster compute the tiles of 128 rows above each other and share the keys of
// their 192 columns: each loads half of them, for both. 192 columns and not 256, because the second
// accumulator must fit into registers too: 2 x 96 of a consumer's 232.
template <int kCluster_>
struct Wgmma {
  static constexpr int kCluster = kCluster_;
  static constexpr int kRows = 128;  // of C, per block
  static constexpr int kCols = 192;
  static constexpr int kDepth = 64;  // rows of keys per stage
  static constexpr int kChunk = 64;  // columns of keys in one 128-byte row of shared memory
  static constexpr int kStep = 16;   // rows of keys per wgmma
  static constexpr int kStages = 5;
  static constexpr int kConsumers = 2;   // warpgroups
  static constexpr int kGroupRows = 64;  // of C, per consumer: the m of wgmma
  static constexpr int kFixers = 3;      // warps that clear masked rows
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kAccumulators = kCols / 2;  // per thread
  using Triangle = cuda::Triangle<kRows * kCluster, kCols, 16 / kCluster>;

  // Registers a thread: the compiler gives all the same, and each warpgroup asks for its own share.
  static constexpr int kFetcherRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kEntryRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kWarpgroup * (kFetcherRegisters + kConsumers * kConsumerRegisters) <=
                    kThreads * kEntryRegisters,
                "more registers than the block has");

  // The tensor cores truncate when they add to their accumulator, so a long chain loses a part of
  // every positive sum. After this many rows it goes to a sum in ordinary float32 arithmetic.
  static constexpr int kPromote = 1024;

  // One chunk in shared memory is kDepth rows of 128 bytes. TMA brings it in kCluster boxes.
  static constexpr int kChunkBytes = kDepth * 128;
  static constexpr int kBoxRows = kDepth / kCluster;
  static constexpr int kBoxBytes = kBoxRows * 128;
  static constexpr int kChunksA = kRows / kChunk;
  static constexpr int kChunksB = kCols / kChunk;
  static constexpr int kStageBytes = (kChunksA + kChunksB) * kChunkBytes;
  static constexpr int kAlignment = 1024;  // of chunks: the 128-byte swizzle repeats after 8 rows

  // Offsets from the aligned start of dynamic shared memory.
  FASTCOV_HD static constexpr uint32_t a_offset(int stage, int chunk) {
    return stage * kStageBytes + chunk * kChunkBytes;
  }
  FASTCOV_HD static constexpr uint32_t b_offset(int stage, int chunk) {
    return a_offset(stage, kChunksA + chunk);
  }
  FASTCOV_HD static constexpr uint32_t full_offset(int stage) {
    return kStages * kStageBytes + 8 * stage;
  }
  FASTCOV_HD static constexpr uint32_t empty_offset(int stage) {
    return full_offset(kStages) + 8 * stage;
  }
  FASTCOV_HD static constexpr uint32_t fixed_offset(int stage) {
    return empty_offset(kStages) + 8 * stage;
  }
  static constexpr int kSharedBytes = kStages * (kStageBytes + 3 * 8) + kAlignment;
  static_assert(kSharedBytes <= 232448, "more shared memory than a block of sm_90 can have");

  // Arrivals that complete a phase of each barrier.
  static constexpr int kFullArrivals = 1;  // the producer's; bytes are counted beside it
  static constexpr int kEmptyArrivals = kCluster * kConsumers * (kWarpgroup / kWarp);
  static constexpr int kFixedArrivals = kFixers;

  // Both operands lie in memory with the rows of keys, wgmma's K, one after the other: they are
  // "MN-major". In such a layout with 128-byte swizzle the leading offset leads to the next 64
  // columns and the stride offset to the next 8 rows of keys. Fields are in units of 16 bytes; bits
  // 62-63 name the swizzle, 1 for 128 bytes.
  FASTCOV_HD static constexpr uint64_t descriptor(uint32_t address) {
    return (static_cast<uint64_t>(address & 0x3FFFF) >> 4) |
           (static_cast<uint64_t>(kChunkBytes >> 4) << 16) |
           (static_cast<uint64_t>(8 * 128 >> 4) << 32) | (uint64_t{1} << 62);
  }

  // Place of accumulator `index` of a thread of a consumer warpgroup in its 64 x 192 tile.
  FASTCOV_HD static constexpr int row(int thread, int index) {
    return 16 * (thread / kWarp) + fragment_row(thread % kWarp, index % 4);
  }
  FASTCOV_HD static constexpr int col(int thread, int index) {
    return 8 * (index / 4) + fragment_col(thread % kWarp, index % 4);
  }
};

// The kernel for sm_80 and whatever the other one does not take: mma.sync on tiles that cp.async
// puts into shared memory. Eight warps, 2 x 4, of 64 x 32 elements of C each.
template <int kKeyBytes_>
struct Mma {
  static constexpr int kKeyBytes = kKeyBytes_;
  static constexpr bool kSplit = kKeyBytes == 4;   // float32 keys: three products of TF32 parts
  static constexpr int kSide = 128;                // rows and columns of C per block
  static constexpr int kDepth = kSplit ? 16 : 32;  // rows of keys per stage
  static constexpr int kStep = kSplit ? 8 : 16;    // rows of keys per mma.sync
  static constexpr int kStages = 4;
  static constexpr int kThreads = 256;
  static constexpr int kWarpRows = 64;
  static constexpr int kWarpCols = 32;
  static constexpr int kFragmentsM = kWarpRows / 16;
  static constexpr int kFragmentsN = kWarpCols / 8;
  using Triangle = cuda::Triangle<kSide, kSide, 8>;

  // See Wgmma::kPromote. Splitting needs six times the additions for the same rows.
  static constexpr int kPromote = kSplit ? 64 : 512;

  static constexpr int kUnitBytes = 16;  // what one cp.async copies
  static constexpr int kPerUnit = kUnitBytes / kKeyBytes;
  static constexpr int kUnits = kSide / kPerUnit;  // per row of a tile
  static constexpr int kLoads = kDepth * kUnits / kThreads;

  // 16-bit tiles are read by ldmatrix, eight rows of 16 bytes at a time: the unit is swizzled with
  // the row so that they lie in different banks. 32-bit tiles are read by four rows of eight
  // neighbours at a time: 32 bytes of padding put those into different banks.
  static constexpr int kRowBytes = kSide * kKeyBytes + (kSplit ? 32 : 0);
  static constexpr int kTileBytes = kDepth * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  FASTCOV_HD static constexpr uint32_t tile_offset(int stage, int operand) {
    return stage * kStageBytes + operand * kTileBytes;
  }
  FASTCOV_HD static constexpr uint32_t unit_offset(int row, int unit) {
    return row * kRowBytes + 16 * (kSplit ? unit : unit ^ (row % 8));
  }
  FASTCOV_HD static constexpr uint32_t word_offset(int row, int col) {
    return row * kRowBytes + 4 * col;
  }

  // What thread copies at its load `index`: a row and a unit of both tiles.
  FASTCOV_HD static constexpr int load_row(int thread, int index) {
    return (thread + index * kThreads) / kUnits;
  }
  FASTCOV_HD static constexpr int load_unit(int thread, int index) {
    return (thread + index * kThreads) % kUnits;
  }

  // ldmatrix.x4.trans: lane 8 i + r gives the address of row r of matrix i. For the left operand
  // the four matrices are (m 0-7, k 0-7), (m 8-15, k 0-7), (m 0-7, k 8-15), (m 8-15, k 8-15); for
  // the right one, which yields two fragments, (k 0-7, n 0-7), (k 8-15, n 0-7), (k 0-7, n 8-15),
  // ...
  FASTCOV_HD static constexpr uint32_t left_offset(int lane, int k, int m) {
    return unit_offset(k + lane % 8 + 8 * (lane / 16), m / 8 + lane / 8 % 2);
  }
  FASTCOV_HD static constexpr uint32_t right_offset(int lane, int k, int n) {
    return unit_offset(k + lane % 8 + 8 * (lane / 8 % 2), n / 8 + lane / 16);
  }

  // The same for 32-bit tiles, which are read word by word: where register `reg` of a lane comes
  // from. (Left: rows 0-7 and 8-15 of k 0-3, then of k 4-7; right: k 0-3, then k 4-7.)
  FASTCOV_HD static constexpr uint32_t left_word(int lane, int reg, int k, int m) {
    return word_offset(k + lane % 4 + 4 * (reg / 2), m + lane / 4 + 8 * (reg % 2));
  }
  FASTCOV_HD static constexpr uint32_t right_word(int lane, int reg, int k, int n) {
    return word_offset(k + lane % 4 + 4 * reg, n + lane / 4);
  }

  // The corner of a warp's part of the tile.
  FASTCOV_HD static constexpr int warp_row(int warp) { return warp / 4 * kWarpRows; }
  FASTCOV_HD static constexpr int warp_col(int warp) { return warp % 4 * kWarpCols; }

  // Bytes that a unit at column `col` really has: the rest of its 16 is filled with zeros.
  FASTCOV_HD static constexpr int unit_bytes(bool keep, int64_t col, int64_t d) {
    const int64_t left = (d - col) * kKeyBytes;
    return !keep || left <= 0 ? 0 : (left < kUnitBytes ? static_cast<int>(left) : kUnitBytes);
  }
};

}  // namespace fastcov::cuda
