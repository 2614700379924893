// The lower triangle by tiles of bf16, as triangle.h has it by vectors.
//
// Keys of kParts parts make the products of parts that matter: 1, 4 or 6. The six of float32 leave
// out what is below 2^-24 of a product. In a register block of 2 x 2 tiles the products of small
// parts are summed first and those of the first parts after them, so that as many roundings to the
// size of the sum are made as with keys of one part.
//
// Rows of keys are taken in chunks that are packed together; a chunk has slices so long that C
// costs little, and so short that the right strips of a block stay in the second cache while its
// left strips pass by. A register block runs through a slice and is added to C in float32; a block
// of C stays in the caches while all slices of a chunk are added.
//
// Included once, inside its namespace and with its instruction set.

template <int kParts>
struct TileTriangle {
  static constexpr int kStrip = 2 * kTileWidth;  // columns of a strip, rows and columns of a block
  static constexpr int kStrips = kPanel / kStrip;
  static constexpr std::int64_t kSlice = 1536 / kParts;  // rows, at most
  static constexpr std::int64_t kRows = 4096;            // of a chunk, at most
  static constexpr int kProducts = kParts == 1 ? 1 : kParts == 2 ? 4 : 6;

  static void run(const Problem& p) {
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
    std::int32_t largest = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(p.threads)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1) reduction(max : largest)
#endif
      for (std::int64_t piece = 0; piece < slices * panels; ++piece) {
        const TileStrips<kParts> to{left + piece * panel_words, right + piece * panel_words, steps};
        const Problem part = rows_of(p, piece / panels, steps);
        const std::int32_t found = pack_tiles<kParts>(part, piece % panels * kPanel, to);
        largest = largest > found ? largest : found;
      }
      if (splits(largest)) {  // the same for every thread
        Tiles tiles;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (std::int64_t number = 0; number < blocks.count; ++number) {
          std::int64_t i, j;
          blocks.place(number, &i, &j);
          for (std::int64_t slice = 0; slice < slices; ++slice) {
            const std::int64_t begin = slice * panels * panel_words;
            block(p, left + begin, right + begin, tiles, steps,
                  parts(rows_of(p, slice, steps).rows, kTileStep), blocks.side * kStrips, i, j);
          }
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
                    std::int64_t length, std::int64_t steps, std::int64_t side, std::int64_t i,
                    std::int64_t j) {
    const std::int64_t strips = parts(p.d, kStrip), size = strip_words(length);
    const std::int64_t i_end = least((i + 1) * side, strips);
    const std::int64_t j_end = least((j + 1) * side, strips);
    // Along rows of C, which memory likes best.
    for (std::int64_t s = i * side; s < i_end; ++s) {
      for (std::int64_t t = j * side; t < j_end && t <= s; ++t) {
        prefetch(p, s * kStrip, t * kStrip);
        multiply(tiles, a + s * size, b + t * size, length, steps);
        add_to(p, tiles, s * kStrip, t * kStrip);
      }
    }
  }

  static void zero(Tiles& tiles) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
  }
  static void left(Tiles& tiles, const std::uint32_t* a) {
    tiles.load<4>(a, kTileRow);
    tiles.load<5>(a + kTileWords, kTileRow);
  }
  static void right(Tiles& tiles, const std::uint32_t* b) {
    tiles.load<6>(b, kTileRow);
    tiles.load<7>(b + kTileWords, kTileRow);
  }
  static void product(Tiles& tiles) {
    tiles.multiply_add<0, 4, 6>();
    tiles.multiply_add<1, 4, 7>();
    tiles.multiply_add<2, 5, 6>();
    tiles.multiply_add<3, 5, 7>();
  }

  static void multiply(Tiles& tiles, const std::uint32_t* a, const std::uint32_t* b,
                       std::int64_t length, std::int64_t steps) {
    zero(tiles);
    constexpr std::int64_t kNext = 2 * kTileWords;
    if constexpr (kParts > 1) {  // only one factor changes from a product to the next
      const std::int64_t next = length * kNext;  // to the next part
      const std::uint32_t *x = a, *y = b;
      for (std::int64_t step = 0; step < steps; ++step, x += kNext, y += kNext) {
        left(tiles, x);
        if constexpr (kParts == 3) {
          right(tiles, y + 2 * next);
          product(tiles);
        }
        right(tiles, y + next);
        product(tiles);
        left(tiles, x + next);
        product(tiles);
        right(tiles, y);
        product(tiles);
        if constexpr (kParts == 3) {
          left(tiles, x + 2 * next);
          product(tiles);
        }
      }
    }
    for (std::int64_t step = 0; step < steps; ++step, a += kNext, b += kNext) {
      left(tiles, a);
      right(tiles, b);
      product(tiles);
    }
  }

  static bool inside(const Problem& p, std::int64_t i0, std::int64_t j0) {
    return p.c_column_stride == 1 && i0 + kStrip <= p.d && j0 + kStrip - 1 <= i0;
  }

  // The numbers of C that will be wanted when the block of registers is done: into the second
  // cache, as many of them may have one place in the first.
  static void prefetch(const Problem& p, std::int64_t i0, std::int64_t j0) {
    if (!inside(p, i0, j0)) return;
    const float* const c = static_cast<const float*>(p.c) + i0 * p.c_row_stride + j0;
    for (int r = 0; r < kStrip; ++r) {
      __builtin_prefetch(c + r * p.c_row_stride, 1, 2);
      __builtin_prefetch(c + r * p.c_row_stride + kTileWidth, 1, 2);
    }
  }

  // C[i0 .. i0 + kStrip, j0 .. j0 + kStrip] += alpha * what the registers have
  static void add_to(const Problem& p, Tiles& tiles, std::int64_t i0, std::int64_t j0) {
    alignas(64) float sum[kStrip][kStrip];
    tiles.store<0>(&sum[0][0], sizeof(sum[0]));
    tiles.store<1>(&sum[0][kTileWidth], sizeof(sum[0]));
    tiles.store<2>(&sum[kTileWidth][0], sizeof(sum[0]));
    tiles.store<3>(&sum[kTileWidth][kTileWidth], sizeof(sum[0]));
    float* const c = static_cast<float*>(p.c);
    const float alpha = static_cast<float>(p.alpha);
    if (inside(p, i0, j0)) {
      for (int r = 0; r < kStrip; ++r) {
        float* const line = c + (i0 + r) * p.c_row_stride + j0;
        for (int s = 0; s < kStrip; ++s) line[s] += alpha * sum[r][s];
      }
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
