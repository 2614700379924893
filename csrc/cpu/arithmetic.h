// How a register tile multiplies: vectors of T, or pairs of bf16 summed in float.
//
// Written with the compiler's vector types and not with intrinsics, so that one source serves every
// width, and so that a tile meant for 512-bit registers can be tested on a processor without them.
// Only bf16 pairs need an instruction of their own.
//
// Included once by each variant, inside its namespace and with its instruction set.

// V is a vector of kWidth numbers T; a panel holds plain numbers of T, one row of keys a step.
template <class Number, int kVectorWidth>
struct Plain {
  using T = Number;
  using Packed = Number;
  static constexpr int kWidth = kVectorWidth;
  static constexpr int kStep = 1;  // rows of keys in one step of a panel
  typedef T V __attribute__((vector_size(sizeof(T) * kVectorWidth)));
  typedef T Unaligned __attribute__((vector_size(sizeof(T) * kVectorWidth), aligned(sizeof(T))));

  static inline V multiply_add(Packed left, V right, V sum) { return sum + left * right; }
  static inline V load(const Packed* from) { return *reinterpret_cast<const Unaligned*>(from); }
};

// A panel holds pairs of bf16: the lower half of a word is the row 2 k, the upper half 2 k + 1.
template <int kVectorWidth>
struct BfloatPairs {
  using T = float;
  using Packed = std::uint32_t;
  static constexpr int kWidth = kVectorWidth;
  static constexpr int kStep = 2;
  typedef float V __attribute__((vector_size(4 * kVectorWidth)));
  typedef float Unaligned __attribute__((vector_size(4 * kVectorWidth), aligned(4)));

#ifdef __AVX512BF16__
  static inline V multiply_add(Packed left, V right, V sum) {
    static_assert(kVectorWidth == 16, "the instruction is used with 512-bit registers");
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(left)),
                               (__m512bh)right);
  }
#else
  // What the instruction does, by shifts: the odd row first, each product added with one rounding.
  typedef std::uint32_t Words __attribute__((vector_size(4 * kVectorWidth)));
  static inline V multiply_add(Packed left, V right, V sum) {
    const Words words = (Words)right;
    sum += number(left & 0xffff0000u) * (V)(words & 0xffff0000u);
    return sum + number(left << 16) * (V)(words << 16);
  }
  static inline float number(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
#endif
  static inline V load(const Packed* from) { return *reinterpret_cast<const Unaligned*>(from); }
};
