"""A process that runs the Triton kernel in Triton's interpreter, for test_triton.py.

Triton reads TRITON_INTERPRET when functions are decorated, so one process either interprets or compiles. This one
interprets: it reads pickled (task, arguments) from stdin and answers each on stdout with (whether it worked, the result
or the error).
"""

from __future__ import annotations

import os
import pickle
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from fastcov.kernels import triton as kernel
from fastcov.kernels import triton_code


@triton.jit
def decode(i_out, j_out, row_out, start, tiles, BAND: tl.constexpr, BLOCK: tl.constexpr):
    t = start + tl.arange(0, BLOCK)
    i, j = triton_code.tile_of(t, tiles, BAND)
    tl.store(i_out + t, i)
    tl.store(j_out + t, j)
    tl.store(row_out + t, triton_code.triangle_row(t))


@triton.jit
def rows_of(t, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, triton_code.triangle_row(tl.load(t + at)))


def launch(C, X, mask, alpha, config, tma, processors, chain):
    kernel.launch(C, X, mask, alpha, kernel.Config(*config), tma, processors, chain)
    return C


def public(C, X, mask, alpha):
    assert kernel.why_not(C, X) is None
    kernel.update(C, X, mask, alpha)
    return C


def refusal(C, X):
    return kernel.why_not(C, X)


def tiles_in_order(tiles, band):
    count = tiles * (tiles + 1) // 2
    block = 1 << 16
    i, j, row = (torch.zeros(-(-count // block) * block, dtype=torch.int32) for _ in range(3))
    for start in range(0, count, block):
        decode[(1,)](i, j, row, start, tiles, band, block)
    return i[:count], j[:count], row[:count]


def triangle_rows(t):
    out = torch.zeros_like(t)
    rows_of[(1,)](t, out, t.shape[0])
    return out


def far(values, stride, sum_stride):
    """Keys and a sum whose last rows lie beyond what 32 bits can address; None without the space.

    The space is asked for and hardly touched, so it is address space and not memory.
    """
    n, d = values.shape
    try:
        X = torch.empty((n - 1) * stride + d, dtype=values.dtype).as_strided((n, d), (stride, 1))
        C = torch.empty((d - 1) * sum_stride + d).as_strided((d, d), (sum_stride, 1))
    except RuntimeError:
        return None
    results = []
    X.copy_(values)
    for mask in (None, torch.ones(n, dtype=torch.bool)):
        C.copy_(torch.zeros(d, d))
        kernel.launch(C, X, mask, 1.0, kernel.Config(16, 16, 4, 1, 1), tma=False)
        results.append(C.clone().contiguous())
    return results


TASKS = {f.__name__: f for f in (launch, public, refusal, tiles_in_order, triangle_rows, far)}

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get between the answers
    torch.set_num_threads(1)
    while True:
        try:
            task, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = (True, TASKS[task](*arguments))
        except Exception as error:
            answer = (False, repr(error))
        pickle.dump(answer, answers)
        answers.flush()
