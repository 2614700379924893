// Products of few rows with a large matrix W (n, k): what a model does with a short text.
//
// There W decides: it is read once, from memory, and each number of it is used m times. A library
// packs W first, as it must for many rows, and that alone takes longer than reading it.
//
// Included once by each variant, inside its namespace and with its instruction set.

constexpr int kSums = FASTCOV_ROWS * FASTCOV_VECTORS;    // vectors of sums that the registers hold
constexpr int kGroupMost = (kSums + kSums / 6) / 4 * 2;  // rows of x, two vectors of sums each
constexpr int kDots = 4;    // rows of x whose products are summed across lanes
constexpr int kAhead = 64;  // rows of W in a piece
// Sums are of so many numbers at most, and then of sums: rounding grows with their length.
constexpr std::int64_t kShort = 128, kPieces = 16;

// y (m, n) = x (m, k) W^T. The rows of x are the lanes of kVectors vectors, so that a number of W
// is broadcast into one product with all of them, and nothing is summed across lanes.
template <class Numbers, int kVectors>
struct Along {
  using V = typename Numbers::V;
  static constexpr int kLanes = Numbers::kWidth * kVectors;
  static constexpr int kFull =
      kSums / kVectors < 12 ? kSums / kVectors : 12;  // rows of W in a tile

  template <int kTile>
  static inline void tile(const float* x, std::int64_t k, const float* w, std::int64_t stride,
                          const float* next, std::int64_t m, float* y, std::int64_t y_stride) {
    V total[kTile][kVectors] = {};
    for (std::int64_t c = 0; c < k;) {
      V sum[kTile][kVectors] = {};
      for (const std::int64_t end = least(c + kShort, k); c < end;) {
#pragma GCC unroll 16
        for (int r = 0; r < kTile; ++r) __builtin_prefetch(next + r * stride + c, 0, 2);
        for (const std::int64_t line = least(c + 16, end); c < line; ++c) {
          V right[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            right[v] = Numbers::load(x + c * kLanes + v * Numbers::kWidth);
#pragma GCC unroll 16
          for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
              sum[r][v] = Numbers::multiply_add(w[r * stride + c], right[v], sum[r][v]);
            }
          }
        }
      }
      for (int r = 0; r < kTile; ++r) {
        for (int v = 0; v < kVectors; ++v) total[r][v] += sum[r][v];
      }
    }
    float lanes[kTile][kLanes];
    __builtin_memcpy(lanes, total, sizeof(lanes));
    for (std::int64_t i = 0; i < m; ++i) {
      for (int r = 0; r < kTile; ++r) y[i * y_stride + r] = lanes[r][i];
    }
  }

  static void run(const Skinny& p) {
    Workspace workspace(p.k * kLanes * sizeof(float));
    float* const x = static_cast<float*>(workspace.data());
    const std::int64_t tiles = parts(p.n, kFull);
#ifdef _OPENMP
#pragma omp parallel num_threads(p.threads)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (std::int64_t c = 0; c < p.k; ++c) {
        for (int i = 0; i < kLanes; ++i)
          x[c * kLanes + i] = i < p.m ? p.x[i * p.x_stride + c] : 0.0f;
      }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t first = t * kFull;
        const float* const w = p.w + first * p.w_stride;
        if (first + kFull <= p.n) {
          const float* const next = first + 2 * kFull <= p.n ? w + kFull * p.w_stride : w;
          tile<kFull>(x, p.k, w, p.w_stride, next, p.m, p.y + first, p.n);
        } else {
          for (std::int64_t r = 0; first + r < p.n; ++r) {
            const float* const row = w + r * p.w_stride;
            tile<1>(x, p.k, row, p.w_stride, row, p.m, p.y + first + r, p.n);
          }
        }
      }
    }
  }
};

// The same for fewer rows than fill a vector: W is read in vectors, and their lanes are summed.
template <int kRows>
struct Dots {
  using V = Floats::V;
  static constexpr int kTile = 4;  // rows of W at a time

  template <int kCount>
  static inline void tile(const Skinny& p, const float* w, float* y) {
    V total[kCount][kRows] = {};
    std::int64_t c = 0;
    for (const std::int64_t full = p.k / Floats::kWidth * Floats::kWidth; c < full;) {
      V sum[kCount][kRows] = {};
      for (const std::int64_t end = least(c + kShort * Floats::kWidth, full); c < end;
           c += Floats::kWidth) {
        V right[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) right[i] = Floats::load(p.x + i * p.x_stride + c);
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
          const V left = Floats::load(w + r * p.w_stride + c);
          __builtin_prefetch(w + (r + kCount) * p.w_stride + c, 0, 2);
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) sum[r][i] += left * right[i];
        }
      }
      for (int r = 0; r < kCount; ++r) {
        for (int i = 0; i < kRows; ++i) total[r][i] += sum[r][i];
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int i = 0; i < kRows; ++i) {
        float lanes[Floats::kWidth], tail = 0.0f;
        __builtin_memcpy(lanes, &total[r][i], sizeof(lanes));
        for (int width = Floats::kWidth / 2; width > 0; width /= 2) {
          for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
        }
        for (std::int64_t rest = c; rest < p.k; ++rest)
          tail += w[r * p.w_stride + rest] * p.x[i * p.x_stride + rest];
        y[i * p.n + r] = lanes[0] + tail;
      }
    }
  }

  static void run(const Skinny& p) {
    const std::int64_t tiles = parts(p.n, kTile);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(p.threads)
#endif
    for (std::int64_t t = 0; t < tiles; ++t) {
      const std::int64_t first = t * kTile;
      const float* const w = p.w + first * p.w_stride;
      if (first + kTile <= p.n) {
        tile<kTile>(p, w, p.y + first);
      } else {
        for (std::int64_t r = 0; first + r < p.n; ++r)
          tile<1>(p, w + r * p.w_stride, p.y + first + r);
      }
    }
  }
};

// y (m, k) = x (m, n) W. Each thread has rows of W, in pieces of kAhead that stay in the first
// caches while two vectors of columns after another are summed for all rows of x, kGroup at a time.
template <int kGroup>
struct Across {
  using V = Floats::V;
  static constexpr int kColumns = 2 * Floats::kWidth;

  static inline void tile(const float* x, int rows, const float* w, std::int64_t stride,
                          float* sums, std::int64_t sums_stride) {
    V sum[kGroup][2] = {};
    for (int r = 0; r < rows; ++r) {
      const float* const row = w + r * stride;
      const V first = Floats::load(row), second = Floats::load(row + Floats::kWidth);
      __builtin_prefetch(row + kColumns, 0, 3);
      __builtin_prefetch(row + kColumns + Floats::kWidth, 0, 3);
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) {
        sum[i][0] = Floats::multiply_add(x[r * kGroup + i], first, sum[i][0]);
        sum[i][1] = Floats::multiply_add(x[r * kGroup + i], second, sum[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) {
      sum[i][0] += Floats::load(sums + i * sums_stride);
      sum[i][1] += Floats::load(sums + i * sums_stride + Floats::kWidth);
      __builtin_memcpy(sums + i * sums_stride, &sum[i][0], sizeof(V));
      __builtin_memcpy(sums + i * sums_stride + Floats::kWidth, &sum[i][1], sizeof(V));
    }
  }

  static void run(const Skinny& p) {
    const std::int64_t groups = parts(p.m, kGroup), pieces = parts(p.n, kAhead);
    const std::int64_t full = p.k / kColumns * kColumns;  // columns that fill tiles
    const std::int64_t threads = least(p.threads, pieces);
    const std::int64_t sums_size = groups * kGroup * p.k, x_size = groups * kGroup * kAhead;
    const std::int64_t part_size = 2 * sums_size + x_size;
    Workspace workspace(threads * part_size * sizeof(float));
    float* const all = static_cast<float*>(workspace.data());
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(threads))
#endif
    {
      // Parts and not the runtime's threads, of which there may be fewer.
#ifdef _OPENMP
#pragma omp for schedule(static, 1)
#endif
      for (std::int64_t part = 0; part < threads; ++part) {
        float* const total = all + part * part_size;
        float* const sums = total + sums_size;
        float* const x = sums + sums_size;
        for (std::int64_t i = 0; i < 2 * sums_size; ++i) total[i] = 0.0f;
        const std::int64_t begin = part * pieces / threads, end = (part + 1) * pieces / threads;
        for (std::int64_t piece = begin; piece < end; ++piece) {
          const std::int64_t first = piece * kAhead;
          const int rows = static_cast<int>(least(kAhead, p.n - first));
          const float* const w = p.w + first * p.w_stride;
          for (std::int64_t i = 0; i < groups * kGroup; ++i) {
            float* const to = x + i / kGroup * kGroup * kAhead + i % kGroup;
            for (int r = 0; r < rows; ++r)
              to[r * kGroup] = i < p.m ? p.x[i * p.x_stride + first + r] : 0.0f;
          }
          for (std::int64_t c = 0; c < full; c += kColumns) {
            for (std::int64_t group = 0; group < groups; ++group) {
              tile(x + group * kGroup * kAhead, rows, w + c, p.w_stride,
                   sums + group * kGroup * p.k + c, p.k);
            }
          }
          for (std::int64_t i = 0; i < p.m; ++i) {
            for (int r = 0; r < rows; ++r) {
              const float left = p.x[i * p.x_stride + first + r];
              for (std::int64_t c = full; c < p.k; ++c)
                sums[i * p.k + c] += left * w[r * p.w_stride + c];
            }
          }
          if ((piece - begin) % kPieces == kPieces - 1 || piece == end - 1) {
            for (std::int64_t i = 0; i < sums_size; ++i) total[i] += sums[i], sums[i] = 0.0f;
          }
        }
      }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
      for (std::int64_t i = 0; i < p.m * p.k; ++i) {
        float sum = 0.0f;
        for (std::int64_t part = 0; part < threads; ++part) sum += all[part * part_size + i];
        p.y[i] = sum;
      }
    }
  }
};

// The smallest group that takes all rows, or the largest.
template <int kGroup>
void across(const Skinny& p, std::int64_t each) {
  if constexpr (kGroup < kGroupMost) {
    if (each > kGroup) return across<kGroup + 2>(p, each);
  }
  Across<kGroup>::run(p);
}

template <int kVectors>
void along(const Skinny& p) {
  if constexpr (kVectors < 4) {
    if (p.m > Floats::kWidth * kVectors) return along<kVectors + 1>(p);
  }
  // Half as wide registers hold eight rows, and often twice as many of them are multiplied at once.
  if (p.m <= 8) return Along<Plain<float, 8>, 1>::run(p);
  Along<Floats, kVectors>::run(p);
}

template <int kRows>
void dots(const Skinny& p) {
  if constexpr (kRows < kDots) {
    if (p.m > kRows) return dots<kRows + 1>(p);
  }
  Dots<kRows>::run(p);
}
