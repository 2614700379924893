// The instructions of device.h in PTX. What each one promises is in the PTX ISA, under its name.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "arguments.h"

#define FASTCOV_DEVICE __device__ __forceinline__

namespace fastcov::cuda::device {

using TensorMap = CUtensorMap;

FASTCOV_DEVICE int thread() { return threadIdx.x; }
FASTCOV_DEVICE int block() { return blockIdx.x; }
FASTCOV_DEVICE int blocks() { return gridDim.x; }
FASTCOV_DEVICE void sync_block() { __syncthreads(); }
FASTCOV_DEVICE void sync_warp() { __syncwarp(); }
// All threads of one warpgroup; `id` tells warpgroups of a block apart.
FASTCOV_DEVICE void sync_warpgroup(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + id) : "memory");  // 0 is __syncthreads's
}
FASTCOV_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }
FASTCOV_DEVICE void trap() { __trap(); }
FASTCOV_DEVICE float number(uint32_t bits) { return __uint_as_float(bits); }
FASTCOV_DEVICE uint32_t bits(float number) { return __float_as_uint(number); }

// The address of dynamic shared memory, which the kernels own whole.
FASTCOV_DEVICE uint32_t shared_base() {
  extern __shared__ char shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Global and shared memory

FASTCOV_DEVICE void add_global(float* place, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(place)),
               "f"(value)
               : "memory");
}

FASTCOV_DEVICE void add_global(float* place, float first, float second) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(place)),
      "f"(first), "f"(second)
      : "memory");
#else
  add_global(place, first);
  add_global(place + 1, second);
#endif
}

FASTCOV_DEVICE void turn_wait(const int* turn, int wanted) {
  int now = 0;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(now)
                 : "l"(__cvta_generic_to_global(turn))
                 : "memory");
  } while (now != wanted);
}

FASTCOV_DEVICE void turn_set(int* turn, int next) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(turn)),
               "r"(next)
               : "memory");
}

FASTCOV_DEVICE void global_fence() { __threadfence(); }

FASTCOV_DEVICE uint32_t load4(uint32_t place) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(place) : "memory");
  return word;
}

FASTCOV_DEVICE void store16(uint32_t place, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

FASTCOV_DEVICE void store_zeros16(uint32_t place) {
  const uint32_t zeros[4] = {};
  store16(place, zeros);
}

// ---- sm_80: asynchronous copies and the matrix instructions of a warp

// 16 bytes, of which the first `bytes` come from memory and the rest are zeros.
FASTCOV_DEVICE void copy_async16(uint32_t place, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

FASTCOV_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kLeft>
FASTCOV_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

FASTCOV_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t place) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(place)
               : "memory");
}

#define FASTCOV_MMA(SHAPE)                                                        \
  asm volatile("mma.sync.aligned." SHAPE                                          \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class Key>
FASTCOV_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b);

template <>
FASTCOV_DEVICE void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  FASTCOV_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}

template <>
FASTCOV_DEVICE void mma<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  FASTCOV_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

template <>
FASTCOV_DEVICE void mma<Tf32>(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  FASTCOV_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef FASTCOV_MMA

// ---- sm_90: clusters, barriers in shared memory, the tensor memory accelerator

FASTCOV_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

FASTCOV_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

FASTCOV_DEVICE void barrier_init(uint32_t bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

FASTCOV_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives once, and makes the phase last until so many bytes have come as well.
FASTCOV_DEVICE void barrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

FASTCOV_DEVICE void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// The barrier at the same place in another block of the cluster, or in this one. The default scope
// is enough: what the arrival hands over is a stage that wgmma has read and TMA writes, and no
// ordinary memory. The scope of the cluster would cost a fence of the whole GPU at every stage.
FASTCOV_DEVICE void barrier_arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(bar),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is over.
FASTCOV_DEVICE void barrier_wait(uint32_t bar, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
  }
}

FASTCOV_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of the matrix with its corner at (row, col) to shared memory; the barrier counts its bytes.
FASTCOV_DEVICE void load_box(uint32_t place, const TensorMap* map, int col, int row, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(place),
      "l"(map), "r"(col), "r"(row), "r"(bar)
      : "memory");
}

// The same to this place in all blocks named by the bits of `ranks`; each one's own barrier counts.
FASTCOV_DEVICE void load_box_to_all(uint32_t place, const TensorMap* map, int col, int row,
                                    uint32_t bar, uint32_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(place),
      "l"(map), "r"(col), "r"(row), "r"(bar), "h"(static_cast<uint16_t>(ranks))
      : "memory");
}

// Orders ordinary stores to shared memory before what wgmma and TMA do next.
FASTCOV_DEVICE void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- sm_90a: registers and matrix instructions of a warpgroup

template <int kRegisters>
FASTCOV_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
FASTCOV_DEVICE void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

FASTCOV_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

FASTCOV_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kLeft>
FASTCOV_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// What reads the sums comes after this, and this after the wait: the products that are in flight
// write registers behind the compiler's back.
template <int kCount>
FASTCOV_DEVICE void wgmma_settle(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

}  // namespace fastcov::cuda::device

#include "wgmma.cuh"
