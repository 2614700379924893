// The matrix instructions on the emulated machine, from the PTX ISA: ldmatrix, mma.sync, wgmma.
#pragma once

#include "emulated_device.h"

namespace fastcov::cuda::device {

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
template <int kCount>
void wgmma_settle(float (&)[kCount]) {}

}  // namespace fastcov::cuda::device
