from __future__ import annotations

import pytest
import torch

from fastcov import BadInput, KernelUnavailable, ops, rank_k_update
from fastcov.kernels import plain
from tiny_kernels import offer

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def expected(C, X, keep=None, alpha=1.0):
    """The whole product in float64, with what was above the diagonal of C."""
    rows = X.reshape(-1, X.shape[-1]).double()
    rows = rows if keep is None else rows[keep]
    return torch.where(torch.ones_like(C, dtype=torch.bool).tril(), C.double() + alpha * rows.T @ rows, C.double())


def lower_error(C, wanted):
    return float((C.double() - wanted).tril().norm() / wanted.tril().norm())


def nan_above(d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(d, d, generator=generator, dtype=torch.float64).to(dtype)
    return C.masked_fill(torch.ones(d, d, dtype=torch.bool).triu(1), float("nan"))


def test_three_by_three_by_hand():
    C = torch.zeros(3, 3)
    rank_k_update(C, torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]]))
    assert C.tolist() == [[1.0, 0.0, 0.0], [2.0, 5.0, 0.0], [3.0, 2.0, 25.0]]
    rank_k_update(C, torch.tensor([[1.0, 1.0, 1.0]]), alpha=-2.0)
    assert C.tolist() == [[-1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 0.0, 23.0]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 5, 256, 300, 777])
def test_every_dtype_and_width_and_nothing_above_the_diagonal(dtype, sum_dtype, d):
    X = torch.randn(2, 33, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    C = nan_above(d, sum_dtype)
    wanted = expected(C, X, alpha=0.5)
    rank_k_update(C, X, alpha=0.5)
    exact = sum_dtype == torch.float64
    assert lower_error(C, wanted) < (1e-14 if exact else 3e-7)
    assert C.triu(1).isnan().sum() == d * (d - 1) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_keeps_what_it_names(dtype, monkeypatch):
    monkeypatch.setattr(plain, "_CHUNK_BYTES", 7 * 300 * 4)  # several chunks of 7 rows
    X = torch.randn(4, 25, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.rand(4, 25, generator=torch.Generator().manual_seed(2)) < 0.6
    X[~mask] = float("nan")  # what is not kept is not even looked at
    C = nan_above(300)
    wanted = expected(C, X, mask.flatten())
    masked, counted = C.clone(), C.clone()
    rank_k_update(masked, X, mask=mask)
    rank_k_update(counted, X, mask=mask.long())
    assert lower_error(masked, wanted) < 3e-7
    assert torch.equal(masked.tril(), counted.tril())


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_keys_and_sums(dtype):
    base = torch.randn(6, 8, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(4)) < 0.5
    cases = [
        (base.transpose(0, 1), mask.T),
        (base[:, 1:], mask[:, 1:]),
        (base[:, ::3], mask[:, ::3]),
        (base[..., ::2], mask),
        (base[..., 3:17], mask),
        (base.permute(2, 0, 1).contiguous().permute(1, 2, 0), mask),
        (base[:1].expand(6, 8, 40), mask),
        (base[0, 0].expand(6, 8, 40), mask),
    ]
    for X, keep in cases:
        d = X.shape[-1]
        C = torch.zeros(d, 2 * d)[:, ::2]
        rank_k_update(C, X, mask=keep)
        rank_k_update(C, X)
        plain = X.contiguous()
        wanted = expected(expected(torch.zeros(d, d), plain, keep.flatten()), plain)
        assert lower_error(C, wanted) < 1e-6


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (1, 4), (4,)])
def test_no_row_and_one_row(shape):
    X = torch.ones(shape)
    C = torch.zeros(4, 4)
    rank_k_update(C, X)
    assert C.tril().equal(torch.ones(4, 4).tril() * (X.numel() // 4))


def test_nothing_kept_changes_nothing():
    C = nan_above(3)
    before = C.clone()
    X = torch.full((5, 3), float("nan"))
    rank_k_update(C, X, mask=torch.zeros(5, dtype=torch.bool))
    assert torch.equal(C.nan_to_num(7.0), before.nan_to_num(7.0))


def test_half_precision_sums_neither_overflow_nor_stall():
    C = torch.zeros(2, 2)
    rank_k_update(C, torch.full((5000, 2), 300.0, dtype=torch.float16))
    assert C[1, 0] == 5000 * 300.0**2  # float16 ends at 65504, bfloat16 stalls at 256 ones
    C.zero_()
    rank_k_update(C, torch.ones(5000, 2, dtype=torch.bfloat16))
    assert C[1, 0] == 5000


def test_conversion_does_not_copy_all_keys_at_once(monkeypatch):
    monkeypatch.setattr(plain, "_CHUNK_BYTES", 16 * 4 * 4)
    X = torch.zeros(100, 4, dtype=torch.bfloat16)
    chunks = list(plain._chunks(torch.zeros(4, 4), X, None))
    assert [len(chunk) for chunk in chunks] == [16] * 6 + [4]
    (whole,) = plain._chunks(torch.zeros(4, 4), (direct := torch.zeros(100, 4)), None)
    assert whole.data_ptr() == direct.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    X = torch.randn(6, 5).to(dtype)
    for mask in (None, torch.rand(6) < 0.5):
        torch.library.opcheck(torch.ops.fastcov.rank_k_update, (torch.zeros(5, 5), X, mask, 0.5, None))


@pytest.mark.parametrize(
    ("C", "X", "more", "error", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 4), {}, BadInput, "square"),
        (torch.zeros(3, 3), torch.zeros(2, 4), {}, BadInput, "width 3"),
        (torch.zeros(3, 3), torch.tensor(1.0), {}, BadInput, "width 3"),
        (torch.zeros(3, 3).half(), torch.zeros(2, 3), {}, ValueError, "float32 or float64"),
        (torch.zeros(3, 3), torch.zeros(2, 3).long(), {}, ValueError, "int64"),
        (torch.zeros(3, 3, device="meta"), torch.zeros(2, 3), {}, ValueError, "meta"),
        (torch.zeros(3, 3), torch.zeros(2, 3), {"mask": torch.ones(3)}, BadInput, "mask"),
    ],
)
def test_bad_arguments_are_named(C, X, more, error, words):
    with pytest.raises(error, match=words):
        rank_k_update(C, X, **more)


def test_kernels_are_chosen_in_order_and_say_why_not(monkeypatch):
    calls = []

    def kernel(name, missing=None, refuses=None):
        def why_not(C=None, X=None):
            return missing or (None if C is None else refuses)

        return ops.Kernel(name, lambda *arguments: calls.append(name), why_not)

    offer(
        monkeypatch,
        kernel("absent", missing="there is no such device"),
        kernel("picky", refuses="it takes bfloat16 keys only"),
        kernel("good"),
    )
    assert ops.kernels() == {"absent": "there is no such device", "picky": None, "good": None, "reference": None}
    C, X = torch.zeros(2, 2), torch.ones(1, 2)
    rank_k_update(C, X)
    assert calls == ["good"]
    rank_k_update(C, X, kernel="reference")
    assert calls == ["good"] and C[1, 0] == 1
    for name, reason in [("absent", "no such device"), ("picky", "bfloat16"), ("x", "no kernel")]:
        with pytest.raises(KernelUnavailable, match=reason):
            rank_k_update(C, X, kernel=name)


def test_no_gradient_is_recorded():
    C = torch.zeros(2, 2)
    rank_k_update(C, torch.ones(3, 2, requires_grad=True))
    assert C[1, 0] == 3 and not C.requires_grad


def test_it_can_be_compiled_over():
    # As a fake tensor sees it: no kernel runs, nothing is returned.
    with torch._subclasses.FakeTensorMode():
        C = torch.zeros(4, 4)
        rank_k_update(C, torch.ones(3, 4, dtype=torch.bfloat16))
        assert C.shape == (4, 4)


def test_keys_without_a_view_as_rows_are_not_copied(monkeypatch):
    seen = []

    def update(C, X, mask, alpha):
        seen.append((X.data_ptr(), tuple(X.shape)))
        plain.reference(C, X, mask, alpha)

    offer(monkeypatch, ops.Kernel("seen", update, lambda C=None, X=None: None))
    base = torch.randn(3, 5, 4)
    C = torch.zeros(4, 4)
    rank_k_update(C, base[:, 1:], kernel="seen")
    assert seen == [(base[i, 1:].data_ptr(), (4, 4)) for i in range(3)]
    assert lower_error(C, expected(torch.zeros(4, 4), base[:, 1:].contiguous())) < 3e-7


def test_the_choice_is_made_once_for_tensors_of_one_kind(monkeypatch):
    asked = []

    def why_not(C=None, X=None):
        asked.append((X.dtype, X.stride(1)))

    offer(monkeypatch, ops.Kernel("asked", lambda *arguments: None, why_not))
    C, wide = torch.zeros(4, 4), torch.ones(3, 8)
    for X in (wide[:, :4], wide[:2, :4], wide[:, :4].bfloat16(), wide[:, ::2], wide[:, ::2]):
        rank_k_update(C, X)
    assert asked == [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 2)]


def test_a_choice_for_keys_beside_the_sum_is_not_one_for_keys_elsewhere(monkeypatch):
    def why_not(C=None, X=None):
        return None if C is None or C.device == X.device else "keys and sum are apart"

    offer(monkeypatch, ops.Kernel("beside", lambda *arguments: None, why_not))
    C, X = torch.zeros(4, 4), torch.ones(3, 4)
    assert ops.chosen(C, X) == "beside"
    assert ops.chosen(C, X.to("meta")) == "reference"
