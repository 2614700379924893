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

// ---- cp.async

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

// ---- Registers

template <int kRegisters>
void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
}
template <int kRegisters>
void claim_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg");
}

}  // namespace fastcov::cuda::device

#include "emulated_tensor_cores.h"
