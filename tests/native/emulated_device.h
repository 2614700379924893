// The instructions of csrc/cuda/device.h on the emulated machine. They are written from the PTX
// ISA, not from the kernels: where a lane's registers lie in a fragment and what a descriptor means
// is said here a second time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arguments.h"
#include "machine.h"

#define FASTCOV_DEVICE inline

namespace fastcov::cuda::device {

using emulated::check;
using emulated::Machine;

// A matrix of 16-bit elements, as cuTensorMapEncodeTiled is told of it.
struct TensorMap {
  const uint8_t* data;
  int64_t cols;
  int64_t rows;
  int64_t row_bytes;
  int box_cols;
  int box_rows;
};

inline int grid_blocks = 1;

inline int thread() { return Machine::now().self().thread; }
inline int block() { return Machine::now().self().block; }
inline int blocks() { return grid_blocks; }
inline void sync_block() { Machine::now().meet(Machine::now().own().meeting); }
inline void sync_warp() { Machine::now().meet(Machine::now().warp().meeting); }
inline void sync_warpgroup(int id) {
  check(id == thread() / 128 - 1, "a warpgroup uses the barrier of another one");
  Machine::now().meet(Machine::now().own().warpgroups[id + 1]);
}
inline void trap() { emulated::fail("trap"); }
inline uint32_t shared_base() { return emulated::Block::kBase; }

inline float number(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits(float number) {
  uint32_t value;
  std::memcpy(&value, &number, 4);
  return value;
}

// The value of a 16-bit key or of a TF32 register, exactly.
template <class Key>
double value(uint32_t bits) {
  if constexpr (std::is_same_v<Key, Tf32>) {
    check((bits & 0x1FFF) == 0, "a TF32 register has bits that the tensor cores do not see");
    return number(bits);
  } else if constexpr (std::is_same_v<Key, BFloat16>) {
    return number(bits << 16);
  } else {
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const double mantissa = bits & 1023;
    const double size = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(mantissa, -24)
                                        : std::ldexp(mantissa + 1024, exponent - 25);
    return (bits & 0x8000) != 0 ? -size : size;
  }
}

// What a tensor core does with an accumulator: one rounding for the products of an instruction.
inline void accumulate(float& sum, double products) {
  const double exact = sum + products;
  float rounded = static_cast<float>(exact);
  if (Machine::now().mode().truncate && std::fabs(rounded) > std::fabs(exact)) {
    rounded = std::nextafter(rounded, 0.0f);
  }
  sum = rounded;
}

// Words that all lanes of a warp show each other.
template <class Back>
void show(const uint64_t* words, int count, Back back) {
  emulated::Warp& warp = Machine::now().warp();
  std::memcpy(warp.words[thread() % 32], words, sizeof(uint64_t) * count);
  sync_warp();
  back(warp);
  sync_warp();
}

inline uint32_t ballot(bool vote) {
  const uint64_t word = vote ? 1 : 0;
  uint32_t votes = 0;
  show(&word, 1, [&](const emulated::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
      votes |= static_cast<uint32_t>(warp.words[lane][0]) << lane;
  });
  return votes;
}

inline void add_global(float* place, float value) { *place += value; }
inline void add_global(float* place, float first, float second) {
  check(reinterpret_cast<uintptr_t>(place) % 8 == 0, "a pair of C is not aligned to 8 bytes");
  place[0] += first;
  place[1] += second;
}

inline void turn_wait(const int* turn, int wanted) {
  Machine::now().wait_until([=] { return *turn == wanted; });
}
inline void turn_set(int* turn, int next) { *turn = next; }
inline void global_fence() {}

inline uint32_t load4(uint32_t place) {
  check(place % 4 == 0, "a word of shared memory is not aligned");
  uint32_t word;
  std::memcpy(&word, Machine::now().own().at(place, 4), 4);
  return word;
}
inline void store16(uint32_t place, const uint32_t (&words)[4]) {
  check(place % 16 == 0, "16 bytes of shared memory are not aligned");
  std::memcpy(Machine::now().own().at(place, 16), words, 16);
}
inline void store_zeros16(uint32_t place) {
  const uint32_t zeros[4] = {};
  store16(place, zeros);
  ++Machine::now().self().unfenced;
}
inline void async_proxy_fence() { Machine::now().self().unfenced = 0; }

// ---- cp.async, ldmatrix, mma.sync

inline void copy_async16(uint32_t place, const void* from, int bytes) {
  check(place % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes >= 0 && bytes <= 16,
        "cp.async is not aligned to 16 bytes");
  uint8_t* to = Machine::now().own().at(place, 16);
  std::memset(to, 0xFF, 16);  // whoever still reads what was there gets NaN
  Machine::now().defer([=] {
    std::memset(to, 0, 16);
    std::memcpy(to, from, bytes);
  });
}
inline void copies_commit() { Machine::now().commit(); }
template <int kLeft>
void copies_wait() {
  Machine::now().finish_all_but(kLeft);
}

// ldmatrix.x4.trans: lane 8 i + r names row r of matrix i; a lane gets two elements of its column
// lane / 4, from rows 2 (lane % 4) and the next.
inline void load_matrices(uint32_t (&r)[4], uint32_t place) {
  check(place % 16 == 0, "ldmatrix is not aligned to 16 bytes");
  const uint64_t word = place;
  const int lane = thread() % 32;
  show(&word, 1, [&](const emulated::Warp& warp) {
    for (int i = 0; i < 4; ++i) {
      r[i] = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = 2 * (lane % 4) + half;
        const uint32_t from = static_cast<uint32_t>(warp.words[8 * i + row][0]) + 2 * (lane / 4);
        uint16_t element;
        std::memcpy(&element, Machine::now().own().at(from, 2), 2);
        r[i] |= static_cast<uint32_t>(element) << (16 * half);
      }
    }
  });
}

// m16n8k16 for 16-bit keys, m16n8k8 for TF32.
template <class Key>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  const uint64_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const int lane = thread() % 32;
  show(words, 6, [&](const emulated::Warp& warp) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0);
      const int col = 2 * (lane % 4) + i % 2;
      double products = 0;
      if constexpr (std::is_same_v<Key, Tf32>) {
        for (int k = 0; k < 8; ++k) {
          const uint64_t left = warp.words[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)];
          const uint64_t right = warp.words[col * 4 + k % 4][4 + k / 4];
          products +=
              value<Key>(static_cast<uint32_t>(left)) * value<Key>(static_cast<uint32_t>(right));
        }
      } else {
        for (int k = 0; k < 16; ++k) {
          const int shift = 16 * (k % 2);
          const uint64_t left = warp.words[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
          const uint64_t right = warp.words[col * 4 + k % 8 / 2][4 + k / 8];
          products += value<Key>(left >> shift & 0xFFFF) * value<Key>(right >> shift & 0xFFFF);
        }
      }
      accumulate(d[i], products);
    }
  });
}

// ---- Clusters, mbarriers, TMA

inline uint32_t cluster_rank() { return Machine::now().rank(); }
inline void sync_cluster() { Machine::now().meet(Machine::now().cluster()); }

inline void barrier_init(uint32_t bar, int arrivals) {
  check(bar % 8 == 0, "a barrier is not aligned to 8 bytes");
  Machine::now().own().at(bar, 8);
  emulated::Barrier& barrier = Machine::now().own().barriers[bar];
  barrier.count = barrier.pending = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint32_t bar, int bytes) {
  emulated::Barrier& barrier = Machine::now().own().barrier(bar);
  barrier.bytes += bytes;
  barrier.arrive();
}
inline void barrier_arrive_at(uint32_t bar, uint32_t rank) {
  check(Machine::now().warp_is_fenced(),
        "stores to shared memory are not fenced before an arrival");
  Machine::now().peer(rank).barrier(bar).arrive();
}
inline void barrier_arrive(uint32_t bar) { barrier_arrive_at(bar, cluster_rank()); }
inline void barrier_wait(uint32_t bar, uint32_t parity) {
  emulated::Barrier& barrier = Machine::now().own().barrier(bar);
  Machine::now().wait_until([&barrier, parity] { return barrier.phase != parity; });
}

inline void prefetch_map(const TensorMap*) {}

// The 128-byte swizzle: in rows of 128 bytes, the number of the row, modulo 8, is added without
// carry to the number of the 16-byte unit. Rows are counted from where the address is a multiple of
// 1024.
inline void load_box_to_all(uint32_t place, const TensorMap* map, int col, int row, uint32_t bar,
                            uint32_t ranks) {
  check(place % 128 == 0, "TMA writes to an address that is not aligned to 128 bytes");
  check(map->box_cols * 2 == 128, "a box of this swizzle is 128 bytes wide");
  const int bytes = map->box_rows * 128;
  for (int rank = 0; ranks >> rank != 0; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    emulated::Block& block = Machine::now().peer(rank);
    std::memset(block.at(place, bytes), 0xFF, bytes);
    Machine::now().later([=, &block] {
      for (int r = 0; r < map->box_rows; ++r) {
        for (int c = 0; c < map->box_cols; ++c) {
          uint16_t element = 0;
          if (row + r < map->rows && col + c < map->cols) {
            std::memcpy(&element, map->data + (row + r) * map->row_bytes + 2 * (col + c), 2);
          }
          const uint32_t line = place + 128 * r;
          const uint32_t unit = (c / 8) ^ (line / 128 % 8);
          std::memcpy(block.at(line + 16 * unit + 2 * (c % 8), 2), &element, 2);
        }
      }
      emulated::Barrier& barrier = block.barrier(bar);
      barrier.bytes -= bytes;
      barrier.settle();
    });
  }
}
inline void load_box(uint32_t place, const TensorMap* map, int col, int row, uint32_t bar) {
  load_box_to_all(place, map, col, row, bar, 1u << cluster_rank());
}

// ---- Registers and wgmma

template <int kRegisters>
void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
}
template <int kRegisters>
void claim_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
}

// An element of an MN-major operand with 128-byte swizzle, by its descriptor: 64 elements lie in a
// row of 128 bytes, eight rows of K make a pattern, the stride offset leads to the next pattern and
// the leading offset to the next 64 elements. The swizzle adds address bits 7-9 to bits 4-6.
inline uint32_t operand_address(uint64_t descriptor, int mn, int k) {
  check(descriptor >> 62 == 1, "the descriptor does not name the 128-byte swizzle");
  check((descriptor >> 49 & 7) == 0, "the descriptor has a base offset");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
  check(start % 1024 == 0, "an operand does not start where the swizzle repeats");
  const uint32_t address = start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
  return address ^ ((address >> 7 & 7) << 4);
}

template <class Key>
void wgmma(float (&d)[96], uint64_t a, uint64_t b) {
  float* sums = d;
  Machine::now().defer([=] {
    emulated::Block& block = Machine::now().own();
    const int warp = thread() / 32 % 4;
    const int lane = thread() % 32;
    const auto element = [&block](uint64_t descriptor, int mn, int k) {
      uint16_t bits;
      std::memcpy(&bits, block.at(operand_address(descriptor, mn, k), 2), 2);
      return value<Key>(bits);
    };
    double left[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) left[half][k] = element(a, 16 * warp + 8 * half + lane / 4, k);
    }
    for (int tile = 0; tile < 192 / 8; ++tile) {
      for (int neighbour = 0; neighbour < 2; ++neighbour) {
        const int col = 8 * tile + 2 * (lane % 4) + neighbour;
        double products[2] = {};
        for (int k = 0; k < 16; ++k) {
          const double right = element(b, col, k);
          products[0] += left[0][k] * right;
          products[1] += left[1][k] * right;
        }
        accumulate(sums[4 * tile + neighbour], products[0]);
        accumulate(sums[4 * tile + 2 + neighbour], products[1]);
      }
    }
  });
}
inline void wgmma_fence() {}
inline void wgmma_commit() { Machine::now().commit(); }
template <int kLeft>
void wgmma_wait() {
  Machine::now().finish_all_but(kLeft);
  sync_warp();  // the warp waits as one
}

}  // namespace fastcov::cuda::device
