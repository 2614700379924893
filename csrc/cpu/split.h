// Keys into tiles of bf16: a key of more bits is the sum of several bf16 numbers, exactly.
//
// The first part is the key rounded to 8 bits, the next what is missing, rounded to 8 bits, and so
// on: float32 has 24 bits and takes three parts, float16 has 11 and takes two. Rounded and not cut
// off, so that the parts have both signs: what the products leave out then averages to nothing, and
// does not make the diagonal too small.
//
// Included once, inside its namespace and with its instruction set, after pack.h.

// Magnitudes whose parts and products can neither overflow nor be lost. The largest of the keys
// must lie between: above, a product of parts could be infinite where the sum is not, and an
// infinite key would meet the zero parts of others, which gives NaN. Below, products of parts come
// near 2^-126, under which AMX puts zero; what is lost of smaller keys is nothing beside the
// square of one of this size.
constexpr std::int32_t kSmallest = (127 - 32) << 23;  // the bits of 2^-32, and of 2^48
constexpr std::int32_t kLargest = (127 + 48) << 23;

inline bool splits(std::int32_t magnitude) {  // zeros alone do
  return magnitude == 0 || (magnitude >= kSmallest && magnitude < kLargest);
}

// The bits of the nearest bf16 number, of float's width.
inline std::uint32_t rounded(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return (bits + 0x8000u) & 0xffff0000u;
}

inline float as_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// A panel of one step: words of two rows of keys, of one part.
struct Words {
  std::uint32_t lines[kTileWidth][kPanel];
};

// Two rows of keys into their parts. The largest magnitude so far is kept for each column.
template <int kParts>
inline void split_rows(const float* even, const float* odd, int pair, Words* parts,
                       std::int32_t* largest) {
  for (int c = 0; c < kPanel; ++c) {
    float low = even[c], high = odd[c];
    std::int32_t a, b;
    __builtin_memcpy(&a, &low, 4);
    __builtin_memcpy(&b, &high, 4);
    a &= 0x7fffffff;  // magnitudes are ordered as their bits are
    b &= 0x7fffffff;
    const std::int32_t larger = a > b ? a : b;
    largest[c] = largest[c] > larger ? largest[c] : larger;
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const std::uint32_t l = rounded(low), h = rounded(high);
      parts[part].lines[pair][c] = l >> 16 | h;
      low -= as_float(l);  // exact
      high -= as_float(h);
    }
  }
}

// The tile whose rows are the columns of this one; `from` is 16 words of each line of a panel.
#ifdef __AVX512F__
inline void transpose(const std::uint32_t* from, std::uint32_t* to) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(from + r * kPanel);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r += 2) {  // pairs of rows
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < 16; r += 4) {  // four rows: a[r + q] has column q of each quarter
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {  // the quarters themselves
    const __m512i low = _mm512_shuffle_i32x4(a[q], a[q + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(a[q], a[q + 4], 0xdd);
    const __m512i lower = _mm512_shuffle_i32x4(a[q + 8], a[q + 12], 0x88);
    const __m512i higher = _mm512_shuffle_i32x4(a[q + 8], a[q + 12], 0xdd);
    _mm512_storeu_si512(to + 16 * q, _mm512_shuffle_i32x4(low, lower, 0x88));
    _mm512_storeu_si512(to + 16 * (q + 4), _mm512_shuffle_i32x4(high, higher, 0x88));
    _mm512_storeu_si512(to + 16 * (q + 8), _mm512_shuffle_i32x4(low, lower, 0xdd));
    _mm512_storeu_si512(to + 16 * (q + 12), _mm512_shuffle_i32x4(high, higher, 0xdd));
  }
}
#else
inline void transpose(const std::uint32_t* from, std::uint32_t* to) {
  for (int r = 0; r < kTileWidth; ++r) {
    for (int c = 0; c < kTileWidth; ++c) to[c * kTileWidth + r] = from[r * kPanel + c];
  }
}
#endif

// What pack.h writes its lines to: rows of floats, or of words.
template <class Number>
struct Lines {
  using Packed = Number;
  Number (*lines)[kPanel];
  void write(int k, const Number* line) const { __builtin_memcpy(lines[k], line, kPanel * 4); }
};

// The tiles of one panel and slice: strips of two tiles' width, in each first all steps of the
// first part, then those of the next.
template <int kParts>
struct TileStrips {
  std::uint32_t* left;
  std::uint32_t* right;
  std::int64_t steps;  // of a strip

  void write(std::int64_t step, const Words* parts) const {
    for (int part = 0; part < kParts; ++part) {
      for (int t = 0; t < kPanel / kTileWidth; ++t) {
        const std::int64_t strip = t / 2;
        const std::int64_t tile = ((strip * kParts + part) * steps + step) * 2 + t % 2;
        const std::uint32_t* const from = parts[part].lines[0] + t * kTileWidth;
        for (int r = 0; r < kTileWidth; ++r) {
          __builtin_memcpy(right + tile * kTileWords + r * kTileWidth, from + r * kPanel, kTileRow);
        }
        transpose(from, left + tile * kTileWords);
      }
    }
  }
};

// The keys of the next panel: rows lie apart, where no processor expects them. Inlined by force,
// since GCC takes a function that does nothing else for one without effect and drops its calls.
__attribute__((always_inline)) inline void prefetch_rows(const Problem& p, std::int64_t row,
                                                         int count, std::int64_t column) {
  if (p.x_column_stride != 1) return;
  const std::int64_t size = p.x_dtype == Dtype::kFloat64 ? 8 : p.x_dtype == Dtype::kFloat32 ? 4 : 2;
  const std::int64_t width = least(kPanel, p.d - column);
  for (std::int64_t k = row; k < row + count; ++k) {
    const char* const from = static_cast<const char*>(p.x) + (p.offsets[k] + column) * size;
    for (std::int64_t byte = 0; byte < width * size; byte += 64) __builtin_prefetch(from + byte);
  }
}

// One step, the rows from `row` on, of all panels, so that rows are read from end to end. The
// strips of a panel begin `panel_words` after those of the one before. Returns the bits of the
// largest magnitude, for keys of several parts.
template <int kParts>
std::int32_t pack_step(const Problem& p, std::int64_t row, std::int64_t panel, std::int64_t end,
                       const TileStrips<kParts>& to, std::int64_t panel_words) {
  Words parts[kParts];
  std::int32_t largest[kPanel] = {};
  const int count = static_cast<int>(least(kTileStep, p.rows - row));
  for (; panel < end; ++panel) {
    const std::int64_t column = panel * kPanel, begin = panel * panel_words;
    if (panel + 1 < end) prefetch_rows(p, row, count, column + kPanel);
    if constexpr (kParts == 1) {
      pack<PairKeys>(p, row, count, column, Lines<std::uint32_t>{parts[0].lines});
      const int filled = (count + 1) / 2;
      __builtin_memset(parts[0].lines[filled], 0,
                       (kTileWidth - filled) * sizeof(parts[0].lines[0]));
    } else {
      float lines[kTileStep][kPanel];
      pack<FloatKeys>(p, row, count, column, Lines<float>{lines});
      __builtin_memset(lines[count], 0, (kTileStep - count) * sizeof(lines[0]));
      for (int pair = 0; pair < kTileWidth; ++pair) {
        split_rows<kParts>(lines[2 * pair], lines[2 * pair + 1], pair, parts, largest);
      }
    }
    TileStrips<kParts>{to.left + begin, to.right + begin, to.steps}.write(row / kTileStep, parts);
  }
  std::int32_t most = 0;
  for (int c = 0; c < kPanel; ++c) most = most > largest[c] ? most : largest[c];
  return most;
}
