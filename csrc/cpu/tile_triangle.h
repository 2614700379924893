// The lower triangle by tiles of bf16, as triangle.h has it by vectors.
//
// Keys of kParts parts make the products of parts that matter: 1, 4 or 6. The six of float32 leave
// out what is below 2^-24 of a product. In a register block of 2 x 2 tiles the products of small
// parts are summed first and those of the first parts after them, so that as many roundings to the
// size of the sum are made as with keys of one part.
//
// Rows of keys are taken in chunks that are packed together; a chunk has slices so long that C
// costs little, and so short that a left strip stays in the first cache and the right strips of a
// block in the second. A register block runs through a slice and is added to C in float32 while the
// next one is multiplied; a block of C stays in the caches while all slices of a chunk are added.
//
// Included once, inside its namespace and with its instruction set.

template <int kParts>
struct TileTriangle {
  static constexpr int kStrip = 2 * kTileWidth;  // columns of a strip, rows and columns of a block
  static constexpr int kStrips = kPanel / kStrip;
  static constexpr std::int64_t kSlice = kParts == 1 ? 768 : 1536 / kParts;  // rows, at most
  static constexpr std::int64_t kRows = 4096;                                // of a chunk, at most
  static constexpr std::int64_t kGroup = 8;  // panels that are packed one after the other
  // Fewer rows go to avx512f, which packs each key once and fills no step with zeros.
  static constexpr std::int64_t kLeast = kParts == 1 ? 16 : 32;
  static constexpr int kProducts = kParts == 1 ? 1 : kParts == 2 ? 4 : 6;

  // A block of registers on its way to C, added line by line while the next one is multiplied:
  // loads right behind a tile's stores would wait for them.
  struct Pending {
    alignas(64) float sum[kStrip][kStrip];
    float* c;
    std::int64_t stride;
    float alpha;
    int line = kStrip;  // the next one

    void add(int lines) {
      const int end = line + lines < kStrip ? line + lines : kStrip;
      for (; line < end; ++line) {
        float* const to = c + line * stride;
        for (int s = 0; s < kStrip; ++s) to[s] += alpha * sum[line][s];
      }
    }
  };

  // Lines of the caches to fetch into the second one, so many a step.
  struct Ahead {
    const std::uint32_t* from;
    std::int64_t lines;

    __attribute__((always_inline)) void fetch() {
      for (std::int64_t n = 0; n < lines; ++n, from += kTileWidth) __builtin_prefetch(from, 0, 2);
    }
  };

  static void run(const Problem& p) {
    if (p.rows < kLeast) return plain_run(p);
    const std::int64_t panels = parts(p.d, kPanel);
    // Not more than kWorkspace bytes of panels, but kFewest rows; all chunks about as long.
    const std::int64_t fit = kWorkspace / (panels * kPanel * kParts * 4);
    const std::int64_t most = least(kRows, fit < kFewest ? kFewest : fit);
    const std::int64_t chunk = parts(p.rows, parts(p.rows, most));
    Problem some = p;
    for (std::int64_t row = 0; row < p.rows; row += chunk) {
      some.offsets = p.offsets + row;
      some.rows = least(chunk, p.rows - row);
      if (!add(some)) plain_run(some);
    }
  }

  // One chunk; false, and nothing done, where its keys do not split.
  static bool add(const Problem& p) {
    const std::int64_t panels = parts(p.d, kPanel), slices = parts(p.rows, kSlice);
    const std::int64_t steps = parts(parts(p.rows, slices), kTileStep);  // of a slice
    const std::int64_t panel_words = kStrips * strip_words(steps);
    const std::int64_t words = slices * panels * panel_words;
    Workspace workspace(static_cast<std::size_t>(2 * words * 4));
    std::uint32_t* const left = static_cast<std::uint32_t*>(workspace.data());
    std::uint32_t* const right = left + words;
    const Blocks blocks(panels, kBlock, p.threads);
    const std::int64_t groups = parts(panels, kGroup);
    std::int32_t largest = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(p.threads)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1) reduction(max : largest)
#endif
      for (std::int64_t piece = 0; piece < parts(p.rows, kTileStep) * groups; ++piece) {
        const std::int64_t step = piece / groups, panel = piece % groups * kGroup;
        const std::int64_t slice = step / steps, begin = slice * panels * panel_words;
        const TileStrips<kParts> to{left + begin, right + begin, steps};
        const std::int32_t found =
            pack_step<kParts>(rows_of(p, slice, steps), step % steps * kTileStep, panel,
                              least(panel + kGroup, panels), to, panel_words);
        largest = largest > found ? largest : found;
      }
      if (splits(largest)) {  // the same for every thread
        Tiles tiles;
        Pending pending;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (std::int64_t number = 0; number < blocks.count; ++number) {
          std::int64_t i, j;
          blocks.place(number, &i, &j);
          for (std::int64_t slice = 0; slice < slices; ++slice) {
            const std::int64_t begin = slice * panels * panel_words;
            block(p, left + begin, right + begin, tiles, pending, steps,
                  parts(rows_of(p, slice, steps).rows, kTileStep), blocks.side * kStrips, i, j);
          }
          pending.add(kStrip);  // before another thread has the block of C in the next chunk
        }
      }
    }
    return splits(largest);
  }

  static std::int64_t strip_words(std::int64_t steps) { return kParts * steps * 2 * kTileWords; }

  // The problem of one slice; with none of its rows where the ones before it have them all.
  static Problem rows_of(const Problem& p, std::int64_t slice, std::int64_t steps) {
    const std::int64_t begin = least(slice * steps * kTileStep, p.rows);
    Problem part = p;
    part.offsets = p.offsets + begin;
    part.rows = least(steps * kTileStep, p.rows - begin);
    return part;
  }

  // The strips [i side, (i + 1) side) by [j side, (j + 1) side)
  static void block(const Problem& p, const std::uint32_t* a, const std::uint32_t* b, Tiles& tiles,
                    Pending& pending, std::int64_t length, std::int64_t steps, std::int64_t side,
                    std::int64_t i, std::int64_t j) {
    const std::int64_t strips = parts(p.d, kStrip), size = strip_words(length);
    const std::int64_t i_begin = i * side, i_end = least(i_begin + side, strips);
    const std::int64_t j_begin = j * side, j_end = least(j_begin + side, strips);
    // What comes next from far away, by lines a step: while the first left strip stays, the next
    // right one; then, in as many pieces as there are right strips, the next left one.
    constexpr std::int64_t kLines = kParts * 2 * kTileWords / kTileWidth;
    const std::int64_t piece = parts(kLines, j_end - j_begin);
    // Along rows of C, which memory likes best.
    for (std::int64_t s = i_begin; s < i_end; ++s) {
      for (std::int64_t t = j_begin; t < j_end && t <= s; ++t) {
        prefetch(p, s * kStrip, t * kStrip);
        const bool first = s == i_begin;
        const std::uint32_t* const next =
            first ? b + (t + 1) * size
                  : a + (s + 1) * size + (t - j_begin) * steps * piece * kTileWidth;
        multiply(tiles, pending, a + s * size, b + t * size, length, steps,
                 Ahead{next, (first ? t + 1 < j_end : s + 1 < i_end) ? first ? kLines : piece : 0});
        add_to(p, tiles, pending, s * kStrip, t * kStrip);
      }
    }
  }

  static void zero(Tiles& tiles) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
  }
  static void product(Tiles& tiles) {
    tiles.multiply_add<0, 4, 6>();
    tiles.multiply_add<1, 4, 7>();
    tiles.multiply_add<2, 5, 6>();
    tiles.multiply_add<3, 5, 7>();
  }
  // The same with a new left factor, a new right one, or both: loads go between products, which
  // hide them.
  static void left(Tiles& tiles, const std::uint32_t* a) {
    tiles.load<4>(a, kTileRow);
    tiles.multiply_add<0, 4, 6>();
    tiles.multiply_add<1, 4, 7>();
    tiles.load<5>(a + kTileWords, kTileRow);
    tiles.multiply_add<2, 5, 6>();
    tiles.multiply_add<3, 5, 7>();
  }
  static void right(Tiles& tiles, const std::uint32_t* b) {
    tiles.load_past<6>(b, kTileRow);
    tiles.multiply_add<0, 4, 6>();
    tiles.multiply_add<2, 5, 6>();
    tiles.load_past<7>(b + kTileWords, kTileRow);
    tiles.multiply_add<1, 4, 7>();
    tiles.multiply_add<3, 5, 7>();
  }
  static void both(Tiles& tiles, const std::uint32_t* a, const std::uint32_t* b) {
    tiles.load<4>(a, kTileRow);
    tiles.load_past<6>(b, kTileRow);
    tiles.multiply_add<0, 4, 6>();
    tiles.load<5>(a + kTileWords, kTileRow);
    tiles.multiply_add<2, 5, 6>();
    tiles.load_past<7>(b + kTileWords, kTileRow);
    tiles.multiply_add<1, 4, 7>();
    tiles.multiply_add<3, 5, 7>();
  }

  static void multiply(Tiles& tiles, Pending& pending, const std::uint32_t* a,
                       const std::uint32_t* b, std::int64_t length, std::int64_t steps,
                       Ahead ahead) {
    zero(tiles);
    constexpr std::int64_t kNext = 2 * kTileWords;
    const int lines = static_cast<int>(parts(kStrip, steps));  // to add in a step
    if constexpr (kParts > 1) {  // only one factor changes from a product to the next
      const std::int64_t next = length * kNext;  // to the next part
      const std::uint32_t *x = a, *y = b;
      for (std::int64_t step = 0; step < steps; ++step, x += kNext, y += kNext) {
        ahead.fetch();
        pending.add(lines);
        both(tiles, x, y + (kParts - 1) * next);
        if constexpr (kParts == 3) right(tiles, y + next);
        left(tiles, x + next);
        right(tiles, y);
        if constexpr (kParts == 3) left(tiles, x + 2 * next);
      }
    }
    for (std::int64_t step = 0; step < steps; ++step, a += kNext, b += kNext) {
      if constexpr (kParts == 1) {
        ahead.fetch();
        pending.add(lines);
      }
      both(tiles, a, b);
    }
  }

  static bool inside(const Problem& p, std::int64_t i0, std::int64_t j0) {
    return p.c_column_stride == 1 && i0 + kStrip <= p.d && j0 + kStrip - 1 <= i0;
  }

  // The numbers of C that will be wanted when the block of registers is done: into the second
  // cache, as many of them may have one place in the first. Inlined as prefetch_rows is.
  __attribute__((always_inline)) static void prefetch(const Problem& p, std::int64_t i0,
                                                      std::int64_t j0) {
    if (!inside(p, i0, j0)) return;
    const float* const c = static_cast<const float*>(p.c) + i0 * p.c_row_stride + j0;
    for (int r = 0; r < kStrip; ++r) {
      __builtin_prefetch(c + r * p.c_row_stride, 1, 2);
      __builtin_prefetch(c + r * p.c_row_stride + kTileWidth, 1, 2);
    }
  }

  // C[i0 .. i0 + kStrip, j0 .. j0 + kStrip] += alpha * what the registers have, now or by and by
  static void add_to(const Problem& p, Tiles& tiles, Pending& pending, std::int64_t i0,
                     std::int64_t j0) {
    auto& sum = pending.sum;
    pending.add(kStrip);
    tiles.store<0>(&sum[0][0], sizeof(sum[0]));
    tiles.store<1>(&sum[0][kTileWidth], sizeof(sum[0]));
    tiles.store<2>(&sum[kTileWidth][0], sizeof(sum[0]));
    tiles.store<3>(&sum[kTileWidth][kTileWidth], sizeof(sum[0]));
    float* const c = static_cast<float*>(p.c);
    const float alpha = static_cast<float>(p.alpha);
    if (inside(p, i0, j0)) {
      pending.c = c + i0 * p.c_row_stride + j0;
      pending.stride = p.c_row_stride;
      pending.alpha = alpha;
      pending.line = 0;
      return;
    }
    // On the diagonal or at an edge: nothing above the diagonal is touched.
    const std::int64_t i_end = least(i0 + kStrip, p.d);
    for (std::int64_t i = i0; i < i_end; ++i) {
      const std::int64_t j_end = least(j0 + kStrip, i + 1);
      for (std::int64_t j = j0; j < j_end; ++j) {
        c[i * p.c_row_stride + j * p.c_column_stride] += alpha * sum[i - i0][j - j0];
      }
    }
  }
};
