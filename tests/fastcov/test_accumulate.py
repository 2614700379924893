"""Keys go from the hook to the kernel as they are, and no device is waited for on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcov import NonFinite, bucket, collect_moments, collecting, ops, take
from fastcov.collecting import Accumulator
from fastcov.kernels import cpu
from fastcov.ops import Kernel
from reference import closed_form as literal
from reference.tiny import Tiny, keys_of, paths
from tiny_checkpoints import launches
from tiny_kernels import offer

D = 16


class Direct(nn.Module):
    """Its keys are its input: whatever is allocated in a pass, the collecting allocates."""

    def __init__(self, view=lambda x: x):
        super().__init__()
        self.down = nn.Linear(D, 2)
        self.view = view

    def forward(self, x, attention_mask=None):
        return self.down(self.view(x))


class Recorder:
    """A kernel that takes all and remembers what it was given, and rows that were copied for it."""

    def __init__(self, monkeypatch):
        self.calls, self.rows = [], []
        offer(monkeypatch, Kernel("recorder", self.update, lambda C=None, X=None: None))

    def update(self, C, X, mask, alpha):
        assert alpha == 1
        self.calls.append((X.data_ptr(), tuple(X.shape), X.dtype, mask))
        if mask is None:
            self.rows.append(X.clone())

    @property
    def kept(self):
        return [shape[0] if mask is None else int(mask.sum()) for _, shape, _, mask in self.calls]


class Allocations(TorchDispatchMode):
    """The sizes of all storages that operators make, in numbers of their dtype."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(values):
            return {v.untyped_storage().data_ptr(): v for v in tree_leaves(values)
                    if isinstance(v, torch.Tensor)}  # fmt: skip

        before = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for place, value in storages(out).items():
            if place not in before:
                self.sizes.append(value.untyped_storage().nbytes() // value.element_size())
        return out


def padded(batch=6, length=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, length, D, generator=generator).to(dtype)
    mask = torch.arange(length) < torch.tensor([20, 18, 11, 20, 5, 1])[:batch, None]
    return {"x": x, "attention_mask": mask.long()}


def test_the_count_of_allocations_sees_a_copy():
    x = torch.randn(6, 20, D)
    for copy in (x.double, x.clone, lambda: x[x[..., 0] > -9], lambda: x[:, 1:].reshape(-1, D)):
        with Allocations() as made:
            copy()
        assert max(made.sizes) >= 6 * 19 * D
    with Allocations() as made:
        x.view(-1, D).permute(1, 0)[1:].add_(1)
    assert made.sizes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("masked", [True, False])
def test_the_kernel_gets_the_keys_themselves(monkeypatch, dtype, budget, masked):
    batch = padded(dtype=dtype)
    if not masked:
        del batch["attention_mask"]
    kernel = Recorder(monkeypatch)
    with Allocations() as made:
        got = collect_moments(Direct(), ["down"], [batch], budget)["down"]
    ((place, shape, given, mask),) = kernel.calls
    assert place == batch["x"].data_ptr() and shape == (120, D) and given == dtype
    assert made.sizes and max(made.sizes) < 120 * D
    kept = batch["attention_mask"].bool().flatten() if masked else torch.ones(120).bool()
    wanted = kept & (kept.cumsum(0) <= (budget or 120))
    assert got.count == int(wanted.sum())
    assert mask is None if wanted.all() else torch.equal(mask, wanted)


@pytest.mark.parametrize(
    ("view", "pieces"),
    [
        (lambda x: x[:, 1:], 6),  # no view as a matrix: one sequence at a time
        (lambda x: x[:, :, :].transpose(0, 1), 1),
        (lambda x: x.flatten(0, 1), 1),
        (lambda x: x[:, ::2], 1),
    ],
)
def test_keys_of_other_strides_are_not_copied_either(monkeypatch, view, pieces):
    x = padded()["x"]
    tokens = view(x).shape[:-1]
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) < 0.8
    kernel = Recorder(monkeypatch)
    with Allocations() as made:
        got = collect_moments(Direct(view), ["down"], [{"x": x, "attention_mask": mask}], None)["down"]
    assert len(kernel.calls) == pieces and sum(kernel.kept) == got.count == int(mask.sum())
    assert max(made.sizes) < mask.numel() * D
    end = x.data_ptr() + x.nbytes
    assert all(x.data_ptr() <= place < end for place, *_ in kernel.calls)


def test_the_sum_of_keys_of_other_strides_is_right():
    x = padded(dtype=torch.float64)["x"]
    mask = torch.rand(6, 19) < 0.7
    model = Direct(lambda x: x[:, 1:])
    batch = {"x": x, "attention_mask": mask}
    got = collect_moments(model, ["down"], [batch], 31, dtype=torch.float64)["down"]
    rows = x[:, 1:][mask][:31]
    assert got.count == 31
    torch.testing.assert_close(got.sum, rows.T @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_native_kernel_allocates_no_copy_inside_either(dtype):
    best = next(iter(name for name, reason in ops.kernels().items() if reason is None))
    if best not in [one.name for one in cpu.FAST]:
        pytest.skip(f"no native kernel here: the best is {best}")
    batch = padded(dtype=dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        collect_moments(Direct(), ["down"], [batch], 40)
    taken = [event.cpu_memory_usage for event in profile.events() if "fastcov::" in event.name]
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert taken and largest < 120 * D * batch["x"].element_size()


@pytest.mark.parametrize("launch_rows", [1, 7, 64, 10_000])
def test_small_batches_wait_for_each_other_and_the_sum_is_the_same(monkeypatch, launch_rows):
    model = Tiny()
    documents = [list(range(1, 2 + n)) for n in (3, 9, 1, 14, 6, 2, 30, 8, 5)]
    batches = list(bucket(documents, 16, max_padding=0.9, window=2))
    wanted = {paths(0)[0]: 50, paths(2)[0]: None}
    with launches(launch_rows):
        got = collect_moments(model, list(wanted), batches, wanted, dtype=torch.float64)
    direct = collect_moments(model, list(wanted), batches, wanted, dtype=torch.float64)
    for name, moment in direct.items():
        assert got[name].count == moment.count == (wanted[name] or sum(map(len, documents)))
        torch.testing.assert_close(got[name].sum, moment.sum, rtol=1e-12, atol=1e-12)
    kernel = Recorder(monkeypatch)
    with launches(launch_rows):
        collect_moments(model, paths(1), batches, 60)
    assert sum(kernel.kept) == 60
    if launch_rows > 1:  # all launches but those at the end have their rows
        assert all(kept >= launch_rows for kept in kernel.kept[:-1])
    if launch_rows == 7:  # what was large enough was not copied: it came with its mask
        assert max(kernel.kept) > 7


def test_batches_that_are_large_enough_bypass_the_ring_without_a_copy(monkeypatch):
    kernel = Recorder(monkeypatch)
    large, small = padded(), padded(batch=2)
    with launches(60), Allocations() as made:
        collect_moments(Direct(), ["down"], [large, small, large], None)
    assert kernel.kept == [75, 75, 38]
    assert [call[0] for call in kernel.calls[:2]] == [large["x"].data_ptr()] * 2
    assert sum(size >= 60 * D for size in made.sizes) == 1  # the ring itself, once


def test_the_buffer_is_given_back_when_the_budget_is_met():
    with launches(1000):
        sums = Accumulator(Direct(), {"down": 40}, torch.float32)
        sums.start(None)
        sums.take("down", torch.ones(30, D))
        assert (sums.found("down"), sums.moments["down"].count) == (30, 0)
        sums.take("down", torch.ones(30, D))
        assert sums.moments["down"].count == 40 and sums.done()
        assert sums._modules["down"].buffer is None


def waited(kernel, size, batches):
    """The rows of each launch of at least `size` of them, and where they lay."""
    with launches(size):
        sums = Accumulator(nn.ModuleDict({"a": nn.Identity()}), {"a": None}, torch.float32)
        for x, mask in batches:
            sums.start(mask)
            sums.take("a", x)
        held = sums._modules["a"].held
        sums.finish()
    assert kernel.kept == [len(rows) for rows in kernel.rows]
    return kernel.rows, {call[0] for call in kernel.calls}, held


def test_rows_that_wait_are_handed_on_by_as_many_as_the_buffer_holds(monkeypatch):
    X = torch.arange(22.0).reshape(11, 2)
    parts = X.split([1, 2, 0, 3, 3, 2])
    rows, places, held = waited(Recorder(monkeypatch), 4, [(part, None) for part in parts])
    assert [len(part) for part in rows] == [4, 4, 3] and held == 3
    assert torch.equal(torch.cat(rows), X)
    assert len(places) == 1  # one buffer, filled from its start again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_kept_rows_wait_and_in_order(monkeypatch, dtype):
    X = torch.randn(40, 3).to(dtype)
    mask = torch.rand(40) < 0.4
    rows, _, _ = waited(Recorder(monkeypatch), 10, list(zip(X.split(9), mask.split(9), strict=True)))
    assert all(len(part) == 10 for part in rows[:-1])
    got = torch.cat(rows)
    assert got.dtype == dtype and torch.equal(got, X[mask])


def test_rows_of_any_strides_wait(monkeypatch):
    base = torch.randn(3, 20)
    batches = [(base.T[::2], torch.tensor([True, False] * 5)), (base.T[:2], None)]
    rows, _, _ = waited(Recorder(monkeypatch), 11, batches)
    assert torch.equal(torch.cat(rows), torch.cat([base.T[::4], base.T[:2]]))


def test_keys_of_another_dtype_begin_another_buffer(monkeypatch):
    batches = [(torch.ones(3, 2), None), (torch.ones(2, 2, dtype=torch.bfloat16), None)]
    rows, _, _ = waited(Recorder(monkeypatch), 4, batches)
    shapes = [(tuple(part.shape), part.dtype) for part in rows]
    assert shapes == [((3, 2), torch.float32), ((2, 2), torch.bfloat16)]


def test_nothing_waits_for_the_device(monkeypatch):
    # A tensor on the device "meta" has no numbers: to ask for one raises.
    kernel = Recorder(monkeypatch)
    for launch_rows in (None, 4):
        sums = Accumulator(Direct(), {"down": 150}, torch.float32)
        for _ in range(3):
            batch = padded()
            with launches(launch_rows):
                sums.start(batch["attention_mask"])
                sums.take("down", batch["x"].to("meta"))
        assert sums.done() and sums.found("down") == 150
        assert sums.took() == {"down": 0}
    kernel.calls.clear()
    with pytest.raises((RuntimeError, NotImplementedError)):
        sums.finish()  # this does look
    with pytest.raises((RuntimeError, NotImplementedError)):
        int(torch.ones(3, device="meta").sum())


def test_a_look_now_and_then_still_names_the_batch(monkeypatch):
    monkeypatch.setattr(collecting, "CPU_LOOK_EVERY", 4)

    def run(launch_rows, batches, bad_in, value=float("nan")):
        sums = Accumulator(Direct(), {"down": None}, torch.float32)
        with launches(launch_rows):
            for i in range(batches):
                sums.start(None)
                x = torch.ones(1, 5, D)
                if i == bad_in:
                    x[0, 2, 3] = value
                sums.take("down", x)
            sums.finish()

    for bad_in in range(6):  # seen at the fourth batch, or at the end
        with pytest.raises(NonFinite, match=rf"'down' hold NaN.* in batch {bad_in};.*bfloat"):
            run(1, 6, bad_in)
    with pytest.raises(NonFinite, match=r"one of the batches 2 to 4;"):
        run(12, 9, 3)  # 12 rows: the batches 0 to 2, 2 to 4, 4 to 7
    with pytest.raises(NonFinite, match=r"overflow torch.float32, in batch 5; .*float64"):
        run(1, 6, 5, 1e30)


def test_the_first_bad_module_is_named_when_several_are(monkeypatch):
    monkeypatch.setattr(collecting, "CPU_LOOK_EVERY", 3)
    model = nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()})
    sums = Accumulator(model, {"a": None, "b": None}, torch.float32)
    sums.start(None)
    sums.take("a", torch.ones(2, 3))
    sums.take("b", torch.full((2, 3), float("inf")))
    sums.start(None)
    sums.take("a", torch.full((2, 3), float("inf")))
    with pytest.raises(NonFinite, match=r"'b'.* in batch 0;"):
        sums.finish()


def test_the_first_keys_of_a_batch_by_hand():
    def first(batch, rows, left):
        sums = Accumulator(Direct(), {"down": None}, torch.float32)
        sums.start(batch)
        return (sums.tokens, *sums.first(rows, left))

    batch = torch.tensor([[1, 0, 2], [1, 1, 0]])
    tokens, mask, count = first(batch, 6, 3)
    assert (tokens, count) == (4, 3) and mask.tolist() == [[True, False, True], [True, False, False]]
    _, mask, count = first(batch, 6, 4)
    assert count == 4 and mask.tolist() == [[True, False, True], [True, True, False]]
    assert first(batch, 6, None)[2] == 4
    assert first(torch.ones(2, 3), 6, None) == (6, None, 6)
    assert first(None, 6, 6) == (None, None, 6)
    _, mask, count = first(None, 6, 2)
    assert count == 2 and mask.tolist() == [True, True, False, False, False, False]


def test_modules_that_see_different_numbers_of_rows_are_cut_each_by_its_own():
    sums = Accumulator(nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()}), {"a": 2, "b": 2}, torch.float32)
    sums.start(None)
    sums.take("a", torch.tensor([[1.0], [2.0], [4.0]]))
    sums.take("b", torch.tensor([[8.0], [16.0], [32.0], [64.0]]))
    sums.finish()
    assert [float(moment.sum) for moment in sums.moments.values()] == [5.0, 320.0]


def test_keys_of_a_bfloat16_model_are_summed_as_they_are():
    model = Tiny(dtype=torch.bfloat16)
    documents = [[1, 2, 3, 4], [5, 6]]
    got = collect_moments(model, paths(0), bucket(documents, 100, max_padding=0.9), 5)[paths(0)[0]]
    first = keys_of(model, list(take(documents, 5, 64)), 0).double().numpy()
    wanted = torch.from_numpy(literal.second_moment(first))
    torch.testing.assert_close(got.second_moment.double(), wanted, rtol=1e-5, atol=1e-6)
