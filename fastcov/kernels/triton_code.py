"""The Triton kernel's device code; `fastcov.kernels.triton` says what it does and launches it.

Imports triton, so nothing imports this file before a kernel is launched. With TRITON_INTERPRET=1 in the environment
when it is imported, the functions run in Triton's interpreter on the CPU.
"""

# mypy: ignore-errors
# A jitted function is Triton's language in Python's syntax, which a type checker cannot read.

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor


@triton.jit
def triangle_row(t):
    """The row of element t of a lower triangle in row-major order, exactly: i (i+1)/2 <= t."""
    # float32 may be off by one row where 8 t + 1 has more than 24 bits, never by two (t < 2^31).
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    return tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)


@triton.jit
def tile_of(t, tiles, BAND: tl.constexpr):
    """Tile (i, j), j <= i, of the work item t; neighbours in t share keys in the L2 cache.

    The tile rows go in bands of BAND. Within a band the tiles left of its corner triangle come column by column, then
    the corner triangle.
    """
    top = triangle_row(t) // BAND * BAND
    height = tl.minimum(BAND, tiles - top)
    inside = t - top * (top + 1) // 2
    corner = inside - top * height
    down = triangle_row(tl.maximum(corner, 0))
    in_corner = corner >= 0
    i = top + tl.where(in_corner, down, inside % height)
    j = tl.where(in_corner, top + corner - down * (down + 1) // 2, inside // height)
    return i, j


@triton.jit
def product(a, b, acc, EMULATED: tl.constexpr):
    """Sum of a^T b and acc on the tensor cores; a (DEPTH, TILE), b (DEPTH, TILE) of 16 bits."""
    if EMULATED:  # the interpreter's dot is wrong for bfloat16; float32 holds these products exactly
        return tl.dot(a.T.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a.T, b, acc)


@triton.jit
def pieces(x):
    """Split x, float32, into three bfloat16 whose sum it is to 24 bits."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add(a, b, acc, EMULATED: tl.constexpr):
    """Sum of a^T b and acc, for keys of any dtype; a (DEPTH, TILE), b (DEPTH, TILE)."""
    if a.dtype == tl.float32:
        a_high, a_middle, a_low = pieces(a)
        b_high, b_middle, b_low = pieces(b)
        # Small products first. What is left out is below 2^-24 of the product of the two keys.
        acc = product(a_low, b_high, acc, EMULATED)
        acc = product(a_high, b_low, acc, EMULATED)
        acc = product(a_middle, b_middle, acc, EMULATED)
        acc = product(a_middle, b_high, acc, EMULATED)
        acc = product(a_high, b_middle, acc, EMULATED)
        acc = product(a_high, b_high, acc, EMULATED)
        return acc
    else:
        return product(a, b, acc, EMULATED)


@triton.jit
def whole_blocks(
    tiled, blocks, count, i, j, total,
    LISTED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, EVERY: tl.constexpr,
    STAGES: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Add the products of blocks of DEPTH rows, which TMA brings; rows beyond the last are zero."""
    acc = tl.zeros((TILE, TILE), tl.float32)
    # The list of blocks is fetched a stage ahead of what it names, and so are rows below.
    for k in tl.range(0, count, num_stages=STAGES + LISTED):
        block = k
        if LISTED:
            block = tl.load(blocks + k).to(tl.int32)
        row = block * DEPTH
        a = tiled.load([row, i * TILE])
        b = tiled.load([row, j * TILE])
        acc = add(a, b, acc, EMULATED)
        if k % EVERY == EVERY - 1:
            total += acc
            # Zero, in a form that stays inside this branch. A constant would become a select, which
            # reads acc at every step while the asynchronous product still writes it.
            acc = tl.minimum(tl.abs(acc), 0.0)
    return total + acc


@triton.jit
def single_rows(
    keys, rows, count, d, stride, i, j, total,
    GATHERED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, EVERY: tl.constexpr,
    STAGES: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Add the products of rows read by pointers: the first `count`, or those named in `rows`."""
    acc = tl.zeros((TILE, TILE), tl.float32)
    left = i * TILE + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    for k in tl.range(0, tl.cdiv(count, DEPTH), num_stages=STAGES + 2 * GATHERED):
        row = k * DEPTH + tl.arange(0, DEPTH)
        there = row < count
        if GATHERED:  # noqa: SIM108 (a constant of compilation)
            start = tl.load(rows + row, mask=there, other=0) * stride
        else:
            start = row.to(tl.int64) * stride
        at = keys + start[:, None]
        a = tl.load(at + left[None, :], mask=there[:, None] & (left < d)[None, :], other=0.0)
        b = tl.load(at + right[None, :], mask=there[:, None] & (right < d)[None, :], other=0.0)
        acc = add(a, b, acc, EMULATED)
        if k % EVERY == EVERY - 1:
            total += acc
            acc = tl.minimum(tl.abs(acc), 0.0)  # see whole_blocks
    return total + acc


@triton.jit
def store_strip(C, strip, row, column, d, alpha, down, WIDTH: tl.constexpr):
    """Add alpha times a strip (TILE, WIDTH) to C at (row, column), at and below the diagonal."""
    rows = row + tl.arange(0, strip.shape[0])
    columns = column + tl.arange(0, WIDTH)
    at = C + rows.to(tl.int64)[:, None] * down + columns[None, :]
    mine = (rows[:, None] >= columns[None, :]) & (rows < d)[:, None]
    tl.store(at, tl.load(at, mask=mine) + alpha * strip, mask=mine)


@triton.jit
def store(C, total, i, j, d, alpha, down, TILE: tl.constexpr):
    """Add alpha times a tile to C by quarters: the addresses of a whole tile would spill."""
    QUARTER: tl.constexpr = TILE // 4
    row = i * TILE
    column = j * TILE
    left, right = total.reshape(TILE, 2, TILE // 2).permute(0, 2, 1).split()
    first, second = left.reshape(TILE, 2, QUARTER).permute(0, 2, 1).split()
    third, fourth = right.reshape(TILE, 2, QUARTER).permute(0, 2, 1).split()
    store_strip(C, first, row, column, d, alpha, down, QUARTER)
    store_strip(C, second, row, column + QUARTER, d, alpha, down, QUARTER)
    store_strip(C, third, row, column + 2 * QUARTER, d, alpha, down, QUARTER)
    store_strip(C, fourth, row, column + 3 * QUARTER, d, alpha, down, QUARTER)


@triton.jit(do_not_specialize=["n", "alpha"])
def rank_k(
    C, keys, tiled, blocks, rows, counts, n, d, alpha, stride, down,
    TILED: tl.constexpr, POINTED: tl.constexpr, COUNTED: tl.constexpr, GATHERED: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, EVERY: tl.constexpr, BAND: tl.constexpr,
    STAGES: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """Lower triangle of C (d, d), float32, += alpha * X^T X for X (n, d), by persistent programs.

    Rows of X are `stride` apart, those of C `down`. With TILED, TMA brings X through the descriptor `tiled` in blocks
    (DEPTH, TILE); with POINTED, rows are read from `keys`, with both of them those that no whole block has. COUNTED, a
    mask became lists (int64) on the device, whose lengths are `counts` (2,): `blocks` whose rows are all kept and, with
    GATHERED, `rows` to read by pointers. The sum is promoted after EVERY products, tile rows go in bands of BAND, the
    keys of STAGES steps are on their way at once, and EMULATED means that the interpreter runs this.
    """
    whole = tl.cdiv(n, DEPTH)
    single = n
    if COUNTED:
        whole = tl.load(counts).to(tl.int32)
        single = tl.load(counts + 1).to(tl.int32)
    tiles = tl.cdiv(d, TILE)
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    for turn in tl.range(0, tl.cdiv(tiles * (tiles + 1) // 2 - first, programs)):
        i, j = tile_of(first + turn * programs, tiles, BAND)
        total = tl.zeros((TILE, TILE), tl.float32)
        if TILED:
            total = whole_blocks(tiled, blocks, whole, i, j, total, COUNTED, TILE, DEPTH, EVERY, STAGES, EMULATED)
        if POINTED:
            total = single_rows(
                keys, rows, single, d, stride, i, j, total,
                GATHERED, TILE, DEPTH, EVERY, STAGES, EMULATED,
            )  # fmt: skip
        store(C, total, i, j, d, alpha, down, TILE)
