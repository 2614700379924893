// The kernel for sm_80 and later, and for the keys that the wgmma kernel does not take: named rows,
// float32, any strides. device.h has the instructions, layout.h the sizes and places.
#pragma once

#include "arguments.h"
#include "device.h"

namespace fastcov::cuda {

template <class Key, int kKeyBytes>
class MmaKernel {
  using L = Mma<kKeyBytes>;

 public:
  FASTCOV_DEVICE explicit MmaKernel(const MmaArguments<L>& arguments)
      : arguments_(arguments), base_(device::shared_base()) {}

  FASTCOV_DEVICE void run() {
    // Blocks start in order, and a worker waits for higher ones only: those must not start later.
    const int worker = device::blocks() - 1 - device::block();
    typename Schedule<typename L::Triangle>::Next next;
    Piece piece;
    while (arguments_.schedule.take(worker, &next, &piece)) {
      Accumulators total = {};
      compute(piece, total);
      in_turn(
          arguments_.sum, piece, piece.slot, device::thread() == 0, [] { device::sync_block(); },
          [&] { add(piece.tile, total); });
    }
  }

 private:
  using Accumulators = float[L::kFragmentsM][L::kFragmentsN][4];

  FASTCOV_DEVICE void compute(const Piece& piece, Accumulators& total) const {
    constexpr int kGroup = L::kPromote / L::kDepth;
    Accumulators sums = {};
    device::sync_block();  // the tile before is no longer read
    for (int ahead = 0; ahead < L::kStages - 1; ++ahead) {
      if (piece.begin + ahead < piece.end) load(piece.tile, piece.begin + ahead, ahead);
      device::copies_commit();  // an empty group, where there is none, keeps the count
    }
    int stage = 0;
    int since = 0;  // the last promotion
    for (int step = piece.begin; step < piece.end; ++step) {
      device::copies_wait<L::kStages - 2>();
      device::sync_block();  // this step's stage has arrived, and the last step's is free
      const int next = step + L::kStages - 1;
      if (next < piece.end) load(piece.tile, next, (stage + L::kStages - 1) % L::kStages);
      device::copies_commit();
      multiply(stage, sums);
      stage = (stage + 1) % L::kStages;
      if (++since == kGroup) {
        promote(sums, total);
        since = 0;
      }
    }
    promote(sums, total);
    device::copies_wait<0>();
  }

  FASTCOV_DEVICE static void promote(Accumulators& sums, Accumulators& total) {
#pragma unroll
    for (int i = 0; i < L::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < L::kFragmentsN; ++j) {
#pragma unroll
        for (int reg = 0; reg < 4; ++reg) {
          total[i][j][reg] += sums[i][j][reg];
          sums[i][j][reg] = 0.0f;
        }
      }
    }
  }

  // Rows that are masked or beyond the end are filled with zeros and never read.
  FASTCOV_DEVICE void load(Tile tile, int step, int stage) const {
    const MmaArguments<L>& g = arguments_;
#pragma unroll
    for (int i = 0; i < L::kLoads; ++i) {
      const int row = L::load_row(device::thread(), i);
      const int unit = L::load_unit(device::thread(), i);
      const int64_t k = static_cast<int64_t>(step) * L::kDepth + row;
      const bool inside = k < g.count;
      const int64_t source = inside ? (g.rows != nullptr ? g.rows[k] : k) : 0;
      if (source < 0 || source >= g.n) {
        if (inside) device::trap();  // a named row that does not exist
        continue;
      }
      const bool keep = inside && (g.mask == nullptr || g.mask[source] != 0);
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        const int64_t col = static_cast<int64_t>(operand == 0 ? tile.row : tile.col) * L::kSide +
                            unit * L::kPerUnit;
        const uint32_t place = base_ + L::tile_offset(stage, operand) + L::unit_offset(row, unit);
        const int bytes = L::unit_bytes(keep, col, g.sum.d);
        if (g.vectors) {
          const char* from = static_cast<const char*>(g.keys);
          if (bytes > 0) from += (source * g.row_stride + col) * kKeyBytes;
          device::copy_async16(place, from, bytes);
        } else {
          gather(place, source * g.row_stride + col * g.col_stride, bytes / kKeyBytes);
        }
      }
    }
  }

  // One unit, element by element: whatever the strides and the alignment.
  FASTCOV_DEVICE void gather(uint32_t place, int64_t offset, int elements) const {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < L::kPerUnit; ++i) {
      if (i >= elements) break;
      const int64_t at = offset + i * arguments_.col_stride;
      if (kKeyBytes == 4) {
        words[i % 4] = static_cast<const uint32_t*>(arguments_.keys)[at];
      } else {
        const uint32_t half = static_cast<const uint16_t*>(arguments_.keys)[at];
        words[i / 2 % 4] |= half << (16 * (i % 2));
      }
    }
    device::store16(place, words);
  }

  FASTCOV_DEVICE void multiply(int stage, Accumulators& sums) const {
    const int lane = device::thread() % kWarp;
    const int warp = device::thread() / kWarp;
    const uint32_t left = base_ + L::tile_offset(stage, 0);
    const uint32_t right = base_ + L::tile_offset(stage, 1);
#pragma unroll
    for (int k = 0; k < L::kDepth; k += L::kStep) {
      if constexpr (L::kSplit) {
        multiply_split(left, right, k, lane, warp, sums);
      } else {
        uint32_t b[L::kFragmentsN / 2][4];
#pragma unroll
        for (int j = 0; j < L::kFragmentsN / 2; ++j) {
          device::load_matrices(b[j], right + L::right_offset(lane, k, L::warp_col(warp) + 16 * j));
        }
#pragma unroll
        for (int i = 0; i < L::kFragmentsM; ++i) {
          uint32_t a[4];
          device::load_matrices(a, left + L::left_offset(lane, k, L::warp_row(warp) + 16 * i));
#pragma unroll
          for (int j = 0; j < L::kFragmentsN; ++j) {
            device::mma<Key>(sums[i][j], a, &b[j / 2][j % 2 * 2]);
          }
        }
      }
    }
  }

  // float32 keys: x = high + low with 11 bits each, and three of the four products. The one left
  // out is 2^-22 of the result.
  FASTCOV_DEVICE void multiply_split(uint32_t left, uint32_t right, int k, int lane, int warp,
                                     Accumulators& sums) const {
    uint32_t high_b[L::kFragmentsN][2];
    uint32_t low_b[L::kFragmentsN][2];
#pragma unroll
    for (int j = 0; j < L::kFragmentsN; ++j) {
#pragma unroll
      for (int reg = 0; reg < 2; ++reg) {
        const int n = L::warp_col(warp) + 8 * j;
        split(device::load4(right + L::right_word(lane, reg, k, n)), high_b[j][reg], low_b[j][reg]);
      }
    }
#pragma unroll
    for (int i = 0; i < L::kFragmentsM; ++i) {
      uint32_t high_a[4];
      uint32_t low_a[4];
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int m = L::warp_row(warp) + 16 * i;
        split(device::load4(left + L::left_word(lane, reg, k, m)), high_a[reg], low_a[reg]);
      }
#pragma unroll
      for (int j = 0; j < L::kFragmentsN; ++j) device::mma<Key>(sums[i][j], low_a, high_b[j]);
#pragma unroll
      for (int j = 0; j < L::kFragmentsN; ++j) device::mma<Key>(sums[i][j], high_a, low_b[j]);
#pragma unroll
      for (int j = 0; j < L::kFragmentsN; ++j) device::mma<Key>(sums[i][j], high_a, high_b[j]);
    }
  }

  // The high part is rounded to nearest, so the low part has either sign and its own rounding does
  // not bias a sum of squares.
  FASTCOV_DEVICE static void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    constexpr uint32_t kKept = 0xFFFFE000u;
    high = (bits + 0x1000u) & kKept;
    low = device::bits(device::number(bits) - device::number(high)) & kKept;
  }

  FASTCOV_DEVICE void add(Tile tile, const Accumulators& total) const {
    const int lane = device::thread() % kWarp;
    const int warp = device::thread() / kWarp;
    const int64_t row = static_cast<int64_t>(tile.row) * L::kSide + L::warp_row(warp);
    const int64_t col = static_cast<int64_t>(tile.col) * L::kSide + L::warp_col(warp);
#pragma unroll
    for (int i = 0; i < L::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < L::kFragmentsN; ++j) {
#pragma unroll
        for (int reg = 0; reg < 4; reg += 2) {
          add_pair(arguments_.sum, row + 16 * i + fragment_row(lane, reg),
                   col + 8 * j + fragment_col(lane, reg), total[i][j][reg], total[i][j][reg + 1]);
        }
      }
    }
  }

  const MmaArguments<L>& arguments_;
  uint32_t base_;
};

}  // namespace fastcov::cuda
