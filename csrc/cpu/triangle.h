// The lower triangle, tile by tile.
//
// Rows of keys are taken in chunks that are packed into panels together; a chunk has a few slices
// of kSlice rows. The triangle is cut into square blocks, dealt to the threads. A block of C stays
// in the caches while all slices of a chunk are added to it; inside, a register tile of kRows x
// kColumns numbers runs through one slice at a time, with its right strip in the first cache. So C
// goes to memory once a chunk, and a number packed once is used by every tile of its column. By few
// rows of keys there is little to multiply and as much of C to read and write, so tiles follow one
// another along the rows of C.
//
// Included once by each variant, inside its namespace and with its instruction set.

template <class Arithmetic, int kTileRows, int kVectors>
struct Triangle {
  using T = typename Arithmetic::T;
  using V = typename Arithmetic::V;
  using Packed = typename Arithmetic::Packed;
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = Arithmetic::kWidth * kVectors;
  static_assert(kPanel % kRows == 0 && kPanel % kColumns == 0, "tiles fill panels");
  using To = Strips<Arithmetic, kRows, kColumns>;

  static void run(const Problem& p) {
    const std::int64_t panels = parts(p.d, kPanel);
    // Steps of a slice: fewer where there are not so many rows.
    const std::int64_t length = parts(least(kSlice, p.rows), Arithmetic::kStep);
    const std::int64_t piece_size = kPanel * length;  // numbers of one panel and slice
    // Not more than kWorkspace bytes of panels, but at least one slice.
    const std::int64_t slice_bytes =
        2 * panels * piece_size * static_cast<std::int64_t>(sizeof(Packed));
    std::int64_t slices = least(kWorkspace / slice_bytes, kSlices);
    slices = least(slices < 1 ? 1 : slices, parts(p.rows, kSlice));
    const std::int64_t chunk = slices * kSlice;
    Workspace workspace(slices * slice_bytes);
    Packed* const left = static_cast<Packed*>(workspace.data());
    Packed* const right = left + slices * panels * piece_size;
    const Blocks blocks(panels, kBlock, p.threads);
#ifdef _OPENMP
#pragma omp parallel num_threads(p.threads)
#endif
    for (std::int64_t row = 0; row < p.rows; row += chunk) {
      const std::int64_t rows = least(chunk, p.rows - row);
      const std::int64_t pieces = parts(rows, kSlice) * panels;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 4)
#endif
      for (std::int64_t piece = 0; piece < pieces; ++piece) {
        const std::int64_t slice = piece / panels, panel = piece % panels;
        const int count = static_cast<int>(least(kSlice, rows - slice * kSlice));
        const To to{left + piece * piece_size, right + piece * piece_size, length};
        pack<Arithmetic>(p, row + slice * kSlice, count, panel * kPanel, to);
      }
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
      for (std::int64_t number = 0; number < blocks.count; ++number) {
        std::int64_t i, j;
        blocks.place(number, &i, &j);
        block(p, left, right, panels, length, rows, blocks.side, i, j);
      }
    }
  }

  // The panels [i side, (i + 1) side) by [j side, (j + 1) side), over all slices of a chunk.
  static void block(const Problem& p, const Packed* left, const Packed* right, std::int64_t panels,
                    std::int64_t length, std::int64_t rows, std::int64_t side, std::int64_t i,
                    std::int64_t j) {
    const std::int64_t i_end = least(least((i + 1) * side, panels) * kPanel, p.d);
    const std::int64_t j_end = least(least((j + 1) * side, panels) * kPanel, p.d);
    for (std::int64_t slice = 0; slice * kSlice < rows; ++slice) {
      const std::int64_t count = least(kSlice, rows - slice * kSlice);
      const int steps = static_cast<int>(parts(count, Arithmetic::kStep));
      // A panel's strips follow one another, and so do panels: strip s begins at column s * width.
      const Packed* const a = left + slice * panels * kPanel * length;
      const Packed* const b = right + slice * panels * kPanel * length;
      const std::int64_t i_begin = i * side * kPanel, j_begin = j * side * kPanel;
      if (p.rows <= kFew) {  // along the rows of C, which memory then sends in longer pieces
        for (std::int64_t i0 = i_begin; i0 < i_end; i0 += kRows) {
          for (std::int64_t j0 = j_begin; j0 < j_end && j0 < i0 + kRows; j0 += kColumns) {
            tile(p, a + i0 * length, b + j0 * length, steps, i0, j0);
          }
        }
        continue;
      }
      for (std::int64_t j0 = j_begin; j0 < j_end; j0 += kColumns) {
        // The first tile that reaches the diagonal.
        const std::int64_t top = j0 / kRows * kRows;
        for (std::int64_t i0 = top > i_begin ? top : i_begin; i0 < i_end; i0 += kRows) {
          tile(p, a + i0 * length, b + j0 * length, steps, i0, j0);
        }
      }
    }
  }

  // C[i0 .. i0 + kRows, j0 .. j0 + kColumns] += alpha * (strip a)^T (strip b)
  static void tile(const Problem& p, const Packed* a, const Packed* b, int steps, std::int64_t i0,
                   std::int64_t j0) {
    T* const c = static_cast<T*>(p.c);
    const bool inside = p.c_column_stride == 1 && i0 + kRows <= p.d && j0 + kColumns - 1 <= i0;
    if (inside) {  // the sum will be wanted when the tile is done, every line of its rows
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const T* const line = c + (i0 + r) * p.c_row_stride + j0;
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(line + v * Arithmetic::kWidth, 1);
      }
    }
    V sum[kRows][kVectors] = {};
    for (int k = 0; k < steps; ++k, a += kRows, b += kColumns) {
      V right[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) right[v] = Arithmetic::load(b + v * Arithmetic::kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = Arithmetic::multiply_add(a[r], right[v], sum[r][v]);
        }
      }
    }
    const T alpha = static_cast<T>(p.alpha);
    if (inside) {
      using Unaligned = typename Arithmetic::Unaligned;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        T* const line = c + (i0 + r) * p.c_row_stride + j0;
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          Unaligned* const to = reinterpret_cast<Unaligned*>(line + v * Arithmetic::kWidth);
          *to = *to + alpha * sum[r][v];
        }
      }
      return;
    }
    // On the diagonal or at an edge, number by number: nothing above the diagonal is touched. The
    // copy keeps the sums themselves in registers.
    V lines[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) lines[r][v] = sum[r][v];
    }
    const std::int64_t i_end = least(i0 + kRows, p.d);
    for (std::int64_t i = i0; i < i_end; ++i) {
      const std::int64_t j_end = least(j0 + kColumns, i + 1);
      const T* const line = reinterpret_cast<const T*>(lines[i - i0]);
      for (std::int64_t j = j0; j < j_end; ++j) {
        c[i * p.c_row_stride + j * p.c_column_stride] += alpha * line[j - j0];
      }
    }
  }
};

// Multiply-adds on registers that depend on nothing but themselves: what the tile could reach.
template <class Arithmetic>
double multiply_add_rate(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kChains = 12;
  constexpr std::int64_t kRepeat = 1 << 16;
  double rate = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(+ : rate)
#endif
  {
    using V = typename Arithmetic::V;
    V sum[kChains] = {};
    V right = {};
    typename Arithmetic::Packed left = 0;
    __asm__ volatile("" : "+m"(right), "+m"(left));  // unknown to the compiler
    std::int64_t rounds = 0;
    const auto begin = Clock::now();
    double elapsed = 0;
    while (elapsed < seconds) {
      for (std::int64_t i = 0; i < kRepeat; ++i) {
#pragma GCC unroll 16
        for (int s = 0; s < kChains; ++s) {
          sum[s] = Arithmetic::multiply_add(left, right, sum[s]);
        }
      }
      ++rounds;
      elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    }
    for (int s = 0; s < kChains; ++s) __asm__ volatile("" : : "m"(sum[s]));
    const double done = 2.0 * Arithmetic::kStep * Arithmetic::kWidth * kChains * kRepeat * rounds;
    rate += done / elapsed * 1e-9;
  }
  return rate;
}
