// Keys into panels: kPanel columns wide, in the dtype of the arithmetic.
//
// X is both factors of X^T X, and a tile reads its left factor in narrower strips than its right
// one. Each panel is therefore kept twice, in strips that a tile reads from end to end: with one
// copy the strips of one factor lie apart in memory, and do not fit the first cache beside the
// other's. Rows are read where they lie, through their offsets: what a mask leaves out is neither
// copied nor looked at.
//
// Included once by each variant, inside its namespace and with its instruction set.

inline float bfloat_as_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

inline float half_as_float(std::uint16_t bits) {
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  std::uint32_t exponent = (bits >> 10) & 0x1fu, fraction = bits & 0x3ffu, wide;
  if (exponent == 0x1fu) {
    wide = sign | 0x7f800000u | (fraction << 13);
  } else if (exponent != 0) {
    wide = sign | ((exponent + 112u) << 23) | (fraction << 13);
  } else {  // zero or subnormal: the fraction times 2^-24, exact in float
    float value = static_cast<float>(fraction) * 0x1p-24f;
    __builtin_memcpy(&wide, &value, 4);
    wide |= sign;
  }
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
#endif
}

template <class T, class Key, Dtype kDtype>
inline T converted(Key key) {
  if constexpr (kDtype == Dtype::kBFloat16) {
    return static_cast<T>(bfloat_as_float(key));
  } else if constexpr (kDtype == Dtype::kFloat16) {
    return static_cast<T>(half_as_float(key));
  } else {
    return static_cast<T>(key);
  }
}

// `width` columns of one row, the rest of the line zero.
template <class T, class Key, Dtype kDtype>
inline void convert_row(const Key* from, std::int64_t stride, int width, T* line) {
  int c = 0;
  if (stride == 1 && width == kPanel) {  // of a width and stride that the compiler knows
#ifdef __F16C__
    if constexpr (kDtype == Dtype::kFloat16 && sizeof(T) == 4) {
      for (; c < kPanel; c += 8) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c));
        _mm256_storeu_ps(line + c, _mm256_cvtph_ps(halves));
      }
      return;
    }
#endif
    for (; c < kPanel; ++c) line[c] = converted<T, Key, kDtype>(from[c]);
    return;
  }
  for (; c < width; ++c) line[c] = converted<T, Key, kDtype>(from[c * stride]);
  for (; c < kPanel; ++c) line[c] = T(0);
}

// Two rows as pairs of bf16, without any conversion.
inline void pair_rows(const std::uint16_t* even, const std::uint16_t* odd, std::int64_t stride,
                      int width, std::uint32_t* line) {
  int c = 0;
  if (stride == 1 && width == kPanel) {
    for (; c < kPanel; ++c) line[c] = even[c] | static_cast<std::uint32_t>(odd[c]) << 16;
    return;
  }
  for (; c < width; ++c) {
    line[c] = even[c * stride] | static_cast<std::uint32_t>(odd[c * stride]) << 16;
  }
  for (; c < kPanel; ++c) line[c] = 0;
}

// Where the strips of one panel and slice go: `left` in strips of kRows, `right` of kColumns.
template <class Arithmetic, int kRows, int kColumns>
struct Strips {
  using Packed = typename Arithmetic::Packed;

  Packed* left;
  Packed* right;
  std::int64_t length;  // steps of a strip

  void write(int step, const Packed* line) const {
    for (int s = 0; s < kPanel / kRows; ++s) {
      __builtin_memcpy(left + (s * length + step) * kRows, line + s * kRows,
                       kRows * sizeof(Packed));
    }
    for (int s = 0; s < kPanel / kColumns; ++s) {
      __builtin_memcpy(right + (s * length + step) * kColumns, line + s * kColumns,
                       kColumns * sizeof(Packed));
    }
  }
};

// The columns from `column` on of `rows` rows from the offset `row` on.
template <class Key, Dtype kDtype, class To>
void pack_numbers(const Problem& p, std::int64_t row, int rows, std::int64_t column, const To& to) {
  using T = typename To::Packed;
  const Key* const x = static_cast<const Key*>(p.x) + column * p.x_column_stride;
  const int width = p.d - column < kPanel ? static_cast<int>(p.d - column) : kPanel;
  const std::int64_t* const offsets = p.offsets + row;
  if (p.x_column_stride == 1) {
    for (int k = 0; k < rows; ++k) {
      T line[kPanel];
      convert_row<T, Key, kDtype>(x + offsets[k], 1, width, line);
      to.write(k, line);
    }
    return;
  }
  // Columns apart, as in a transposed view: a few rows at a time, so that both sides stay in cache.
  constexpr int kTogether = 16;
  for (int first = 0; first < rows; first += kTogether) {
    const int count = rows - first < kTogether ? rows - first : kTogether;
    T lines[kTogether][kPanel] = {};
    for (int c = 0; c < width; ++c) {
      const Key* const from = x + c * p.x_column_stride;
      for (int k = 0; k < count; ++k) {
        lines[k][c] = converted<T, Key, kDtype>(from[offsets[first + k]]);
      }
    }
    for (int k = 0; k < count; ++k) to.write(first + k, lines[k]);
  }
}

// The same for pairs of bf16; an odd last row is paired with zeros.
template <class To>
void pack_pairs(const Problem& p, std::int64_t row, int rows, std::int64_t column, const To& to) {
  const std::uint16_t* const x = static_cast<const std::uint16_t*>(p.x);
  const std::uint16_t* const first = x + column * p.x_column_stride;
  const int width = p.d - column < kPanel ? static_cast<int>(p.d - column) : kPanel;
  const std::int64_t* const offsets = p.offsets + row;
  static const std::uint16_t zeros[kPanel] = {};
  for (int k = 0; k < rows; k += 2) {
    std::uint32_t line[kPanel];
    if (k + 1 < rows) {
      pair_rows(first + offsets[k], first + offsets[k + 1], p.x_column_stride, width, line);
    } else {
      std::uint16_t even[kPanel];
      for (int c = 0; c < width; ++c) even[c] = first[offsets[k] + c * p.x_column_stride];
      pair_rows(even, zeros, 1, width, line);
    }
    to.write(k / 2, line);
  }
}

template <class Arithmetic, class To>
void pack(const Problem& p, std::int64_t row, int rows, std::int64_t column, const To& to) {
  if constexpr (Arithmetic::kStep == 2) {
    pack_pairs(p, row, rows, column, to);
  } else {
    switch (p.x_dtype) {
      case Dtype::kFloat32:
        return pack_numbers<float, Dtype::kFloat32>(p, row, rows, column, to);
      case Dtype::kFloat64:
        return pack_numbers<double, Dtype::kFloat64>(p, row, rows, column, to);
      case Dtype::kFloat16:
        return pack_numbers<std::uint16_t, Dtype::kFloat16>(p, row, rows, column, to);
      case Dtype::kBFloat16:
        return pack_numbers<std::uint16_t, Dtype::kBFloat16>(p, row, rows, column, to);
    }
  }
}
