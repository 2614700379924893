// The lower triangle by tiles of bf16, as triangle.h has it by vectors.
//
// Keys of kParts parts make the products of parts that matter: 1, 4 or 6. The six of float32 leave
// out what is below 2^-24 of a product. In a register block of 2 x 2 tiles the products of small
// parts are summed first and those of the first parts after them, so that as many roundings to the
// size of the sum are made as with keys of one part.
//
// A block of the triangle is summed over the slices of a chunk in memory of the thread's own, tile
// by tile, and added to C with the last slice: C is read once a chunk.
//
// Included once, inside its namespace and with its instruction set.

template <int kParts>
struct TileTriangle {
  static constexpr int kStrip = 2 * kTileWidth;  // columns of a strip, rows and columns of a block
  static constexpr int kStrips = kPanel / kStrip;
  // Rows of a slice: the strip of the right factor stays in the first cache where it can.
  static constexpr std::int64_t kSlice = kParts == 1 ? 512 : 256;
  static constexpr std::int64_t kRows = 4096;  // of a chunk, at most
  // Whether a slice goes on with the sums of the last one. Not with products of small parts: beside
  // a large sum they would be rounded away, always to the same side on the diagonal.
  static constexpr bool kContinued = kParts == 1;
  static constexpr int kProducts = kParts == 1 ? 1 : kParts == 2 ? 4 : 6;

  static std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
  static std::int64_t parts(std::int64_t whole, std::int64_t part) {
    return (whole + part - 1) / part;
  }

  // The shape of a chunk, and where it lies.
  struct Chunk {
    std::int64_t panels, length, slices, rows;
    std::uint32_t *left, *right;

    std::int64_t strip_words() const { return kParts * length * 2 * kTileWords; }
    std::int64_t slice_words() const { return panels * kStrips * strip_words(); }
    std::int64_t bytes() const { return 2 * slices * slice_words() * 4; }
  };

  static void run(const Problem& p) {
    Chunk chunk{parts(p.d, kPanel), parts(least(kSlice, p.rows), kTileStep), 1, 0, nullptr, nullptr};
    // Not more than kWorkspace bytes of panels, but at least one slice; all chunks about as long.
    const std::int64_t most = least(kWorkspace / chunk.bytes(), kRows / kSlice);
    const std::int64_t all = parts(p.rows, kSlice);
    chunk.slices = parts(all, parts(all, most < 1 ? 1 : most));
    Problem some = p;
    for (std::int64_t row = 0; row < p.rows; row += chunk.slices * kSlice) {
      some.offsets = p.offsets + row;
      some.rows = chunk.rows = least(chunk.slices * kSlice, p.rows - row);
      if (!add(some, chunk)) plain_run(some);
    }
  }

  // All rows of one chunk; false, and nothing done, where the keys do not split.
  static bool add(const Problem& p, Chunk chunk) {
    // Blocks small enough that every thread gets several.
    std::int64_t side = kBlock;
    while (side > 1 &&
           parts(chunk.panels, side) * (parts(chunk.panels, side) + 1) / 2 < 8 * p.threads) {
      --side;
    }
    const std::int64_t blocks = parts(chunk.panels, side), pairs = blocks * (blocks + 1) / 2;
    const std::int64_t slices = parts(chunk.rows, kSlice), pieces = slices * chunk.panels;
    // Sums of one thread, where there are several slices to sum.
    const std::int64_t sums = slices == 1 ? 0 : side * side * kPanel * kPanel;
    Workspace workspace(static_cast<std::size_t>(chunk.bytes() + p.threads * sums * 4));
    chunk.left = static_cast<std::uint32_t*>(workspace.data());
    chunk.right = chunk.left + chunk.slices * chunk.slice_words();
    float* const own = reinterpret_cast<float*>(chunk.right + chunk.slices * chunk.slice_words());
    std::int32_t largest = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(p.threads)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 4) reduction(max : largest)
#endif
      for (std::int64_t piece = 0; piece < pieces; ++piece) {
        const std::int64_t slice = piece / chunk.panels, panel = piece % chunk.panels;
        const std::int64_t begin = piece * kStrips * chunk.strip_words();
        const int count = static_cast<int>(least(kSlice, chunk.rows - slice * kSlice));
        const TileStrips<kParts> to{chunk.left + begin, chunk.right + begin, chunk.length};
        const std::int32_t found =
            pack_tiles<kParts>(p, slice * kSlice, count, panel * kPanel, to);
        largest = largest > found ? largest : found;
      }
      if (splits(largest)) {  // the same for every thread
#ifdef _OPENMP
        float* const mine = own + sums * omp_get_thread_num();
#else
        float* const mine = own;
#endif
        Tiles tiles;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (std::int64_t pair = 0; pair < pairs; ++pair) {
          // From the last row of blocks on, where the rows are longest.
          const std::int64_t index = pairs - 1 - pair;
          std::int64_t i = 0;
          while ((i + 1) * (i + 2) / 2 <= index) ++i;
          block(p, chunk, tiles, mine, side * kStrips, i, index - i * (i + 1) / 2);
        }
      }
    }
    return splits(largest);
  }

  // The strips [i side, (i + 1) side) by [j side, (j + 1) side), over all slices of a chunk.
  static void block(const Problem& p, const Chunk& chunk, Tiles& tiles, float* sums,
                    std::int64_t side, std::int64_t i, std::int64_t j) {
    const std::int64_t strips = parts(p.d, kStrip), size = chunk.strip_words();
    const std::int64_t i_end = least((i + 1) * side, strips);
    const std::int64_t j_end = least((j + 1) * side, strips);
    for (std::int64_t slice = 0; slice * kSlice < chunk.rows; ++slice) {
      const std::int64_t count = least(kSlice, chunk.rows - slice * kSlice);
      const std::int64_t steps = parts(count, kTileStep);
      const bool last = (slice + 1) * kSlice >= chunk.rows;
      const std::uint32_t* const a = chunk.left + slice * chunk.slice_words();
      const std::uint32_t* const b = chunk.right + slice * chunk.slice_words();
      float* sum = sums;
      for (std::int64_t t = j * side; t < j_end; ++t) {
        for (std::int64_t s = t > i * side ? t : i * side; s < i_end; ++s, sum += 4 * kTileWords) {
          if (last) prefetch(p, s * kStrip, t * kStrip);
          const bool continued = kContinued && slice > 0;
          continued ? load(tiles, sum) : zero(tiles);
          multiply(tiles, a + s * size, b + t * size, chunk.length, steps);
          float* const earlier = slice > 0 && !kContinued ? sum : nullptr;
          if (last) {
            add_to(p, tiles, earlier, s * kStrip, t * kStrip);
          } else if (earlier == nullptr) {
            store(tiles, sum);
          } else {
            alignas(64) float more[kStrip * kStrip];
            store(tiles, more);
            for (int k = 0; k < kStrip * kStrip; ++k) sum[k] += more[k];
          }
        }
      }
    }
  }

  static void zero(Tiles& tiles) {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
  }
  // The block of 2 x 2 tiles lies in memory as kStrip rows of kStrip numbers.
  static constexpr std::int64_t kRow = 4 * kStrip;
  static constexpr std::int64_t kLower = kStrip * kTileWidth;
  static void load(Tiles& tiles, const float* sum) {
    tiles.load<0>(sum, kRow);
    tiles.load<1>(sum + kTileWidth, kRow);
    tiles.load<2>(sum + kLower, kRow);
    tiles.load<3>(sum + kLower + kTileWidth, kRow);
  }
  static void store(Tiles& tiles, float* sum) {
    tiles.store<0>(sum, kRow);
    tiles.store<1>(sum + kTileWidth, kRow);
    tiles.store<2>(sum + kLower, kRow);
    tiles.store<3>(sum + kLower + kTileWidth, kRow);
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

  // C[i0 .. i0 + kStrip, j0 .. j0 + kStrip] += alpha * (what the registers have + earlier slices)
  static void add_to(const Problem& p, Tiles& tiles, const float* earlier, std::int64_t i0,
                     std::int64_t j0) {
    alignas(64) float sum[kStrip][kStrip];
    store(tiles, sum[0]);
    if (earlier != nullptr) {
      for (int k = 0; k < kStrip * kStrip; ++k) sum[0][k] += earlier[k];
    }
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
