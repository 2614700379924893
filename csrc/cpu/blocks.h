// The square blocks into which the lower triangle is cut, to be dealt to the threads.
//
// Included once by each variant, inside its namespace and with its instruction set.

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t parts(std::int64_t whole, std::int64_t part) {
  return (whole + part - 1) / part;
}

struct Blocks {
  std::int64_t side;   // in panels
  std::int64_t count;  // of blocks that reach the triangle

  // Small enough that every thread gets several, of `most` panels a side at most.
  Blocks(std::int64_t panels, std::int64_t most, int threads) : side(most) {
    while (side > 1 && triangle(parts(panels, side)) < 8 * threads) --side;
    count = triangle(parts(panels, side));
  }

  // Row and column of a block, from the last row of blocks on, where the rows are longest.
  void place(std::int64_t number, std::int64_t* i, std::int64_t* j) const {
    const std::int64_t index = count - 1 - number;
    *i = 0;
    while (triangle(*i + 1) <= index) ++*i;
    *j = index - triangle(*i);
  }

 private:
  static std::int64_t triangle(std::int64_t rows) { return rows * (rows + 1) / 2; }
};
