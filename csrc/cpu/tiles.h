// The tile registers of AMX: eight of them, each 16 rows of 64 bytes.
//
// A product of tiles adds, to 16 x 16 floats, 32 rows of bf16 keys: its left factor holds a column
// of keys in each row, its right factor a pair of rows, both as words of two bf16. Where the
// instructions are not compiled in, the same in plain C++, operation by operation: so the tests of
// everything around it run on any processor.
//
// Included once, inside its namespace and with its instruction set.

constexpr int kTileWidth = 16;                       // numbers, or words, in a row of a tile
constexpr int kTileWords = kTileWidth * kTileWidth;  // of a tile: 1024 bytes
constexpr std::int64_t kTileRow = 4 * kTileWidth;    // bytes
constexpr int kTileStep = 2 * kTileWidth;            // rows of keys in one product
constexpr double kTileFlops = 2.0 * kTileWords * kTileStep;

#ifdef __AMX_BF16__
// The registers belong to a thread between `Tiles` and its end. Not the intrinsics: GCC's are
// macros that take no template argument for the number of a register.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) {
      shape.row_bytes[t] = kTileRow;
      shape.rows[t] = kTileWidth;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Rows `stride` bytes apart, here and below.
  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride), "i"(kTile)
                     : "memory");
  }
  // What is read once in a while: it leaves the first cache to what is read again and again.
  template <int kTile>
  void load_past(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride), "i"(kTile)
                     : "memory");
  }
  template <int kTile>
  void store(void* to, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(stride), "i"(kTile)
                     : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
};
#else
class Tiles {
 public:
  template <int kTile>
  void zero() {
    __builtin_memset(words_[kTile], 0, sizeof(words_[kTile]));
  }
  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    for (int r = 0; r < kTileWidth; ++r) {
      __builtin_memcpy(words_[kTile][r], static_cast<const char*>(from) + r * stride, kTileRow);
    }
  }
  template <int kTile>
  void load_past(const void* from, std::int64_t stride) {
    load<kTile>(from, stride);
  }
  template <int kTile>
  void store(void* to, std::int64_t stride) {
    for (int r = 0; r < kTileWidth; ++r) {
      __builtin_memcpy(static_cast<char*>(to) + r * stride, words_[kTile][r], kTileRow);
    }
  }
  // Even and odd rows of keys are summed apart, then together, and that is added to the sum; what
  // is below the normal numbers counts as zero, before an operation and after it.
  template <int kSum, int kLeft, int kRight>
  void multiply_add() {
    for (int r = 0; r < kTileWidth; ++r) {
      float even[kTileWidth] = {}, odd[kTileWidth] = {};
      for (int k = 0; k < kTileWidth; ++k) {
        const std::uint32_t left = words_[kLeft][r][k];
        for (int c = 0; c < kTileWidth; ++c) {
          const std::uint32_t right = words_[kRight][k][c];
          even[c] = normal(even[c] + number(left << 16) * number(right << 16));
          odd[c] = normal(odd[c] + number(left & kUpper) * number(right & kUpper));
        }
      }
      for (int c = 0; c < kTileWidth; ++c) {
        const float sum = normal(number(words_[kSum][r][c]) + normal(even[c] + odd[c]));
        __builtin_memcpy(&words_[kSum][r][c], &sum, 4);
      }
    }
  }

 private:
  static constexpr std::uint32_t kUpper = 0xffff0000u;
  static float normal(float value) {
    return value < 0x1p-126f && value > -0x1p-126f ? 0.0f : value;
  }
  static float number(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return normal(value);
  }
  std::uint32_t words_[8][kTileWidth][kTileWidth] = {};
};
#endif
