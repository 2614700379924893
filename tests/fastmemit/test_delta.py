"""Edits as files: the same bits back, or a refusal; added to all weights or to none."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastcov import LowRank, closed_form
from fastmemit import delta as delta_module
from fastmemit.delta import Delta, add_low_rank, compact
from fastmemit.errors import DamagedFile, NonFiniteEdit, WrongModel
from tiny_editors import FACTS, tiny_editor

PROVENANCE = {"model": "f" * 64, "method": "memit", "requests": [{"subject": "Łódź 🙂"}], "n": 0.1}


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3, bias=False, dtype=dtype)  # weight (3, 5)
        self.b = nn.Linear(4, 2, bias=False, dtype=dtype)  # weight (2, 4)


def made() -> Delta:
    # Slices and transposes on purpose: factors come out of solves in any memory layout.
    return Delta(
        {
            "b.weight": (torch.randn(2, 9)[:, ::9], torch.randn(1, 4).T),
            "a.weight": (torch.randn(2, 3).T, torch.randn(5, 2)),
        },
        PROVENANCE,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "edit.safetensors"
    made().save(path)
    return path


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_round_trip_keeps_every_bit_and_the_provenance(tmp_path: Path) -> None:
    delta = made()
    delta.factors["a.weight"][0][0, 0] = -0.0
    delta.factors["a.weight"][0][1, 0] = 1e-42  # subnormal
    delta.save(tmp_path / "deep" / "edit.safetensors")
    found = Delta.load(str(tmp_path / "deep" / "edit.safetensors"))
    assert found.factors.keys() == delta.factors.keys()
    for name, pair in delta.factors.items():
        for mine, read in zip(pair, found.factors[name], strict=True):
            assert torch.equal(mine.contiguous().view(torch.int32), read.view(torch.int32))
    assert found.provenance == PROVENANCE
    assert found.model == "f" * 64
    assert found.digest() == delta.digest()
    assert os.listdir(tmp_path / "deep") == ["edit.safetensors"]


def test_the_digest_tells_names_shapes_and_values_apart() -> None:
    left, right = torch.ones(2, 3), torch.ones(4, 3)
    same_bytes = (torch.ones(3, 2), torch.ones(6, 2))
    other = left.clone()
    other[0, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    deltas = [{"w": (left, right)}, {"v": (left, right)}, {"w": same_bytes}, {"w": (other, right)}]
    assert len({Delta(factors).digest() for factors in deltas}) == 4
    assert Delta({"w": (left, right)}, {"x": 1}).digest() == Delta({"w": (left, right)}).digest()
    assert Delta({"w": (left, right)}).model is None


def test_every_flipped_byte_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 0x04
        saved.write_bytes(broken)
        with pytest.raises(DamagedFile) as caught:
            Delta.load(saved)
        assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(DamagedFile, match=r"get or make the edit again"):
        Delta.load(saved)


def test_bytes_behind_the_end_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0" * 4)
    with pytest.raises(DamagedFile):
        Delta.load(saved)


@pytest.mark.parametrize("content", [b"hello, I am no tensor file", b"\xff" * 64, b"PK\x03\x04zip"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"not a readable safetensors file"):
        Delta.load(path)


def rewritten(path: Path, tensors: dict[str, torch.Tensor], **changes: str | None) -> Path:
    """A file with a right seal but other tensors or metadata."""
    provenance = json.dumps(PROVENANCE, sort_keys=True)
    pairs: dict[str, Any] = {}
    for name in {n.rpartition(":")[0] for n in tensors}:
        left = tensors.get(f"{name}:left", torch.zeros(1, 1))
        pairs[name] = (left, tensors.get(f"{name}:right", torch.zeros(1, 1)))
    metadata = {"format": "fastmemit-delta", "version": "1", "provenance": provenance}
    metadata["sha256"] = delta_module._seal(Delta(pairs).digest(), provenance)
    metadata.update({k: v for k, v in changes.items() if v is not None})
    for name in [k for k, v in changes.items() if v is None]:
        del metadata[name]
    save_file(tensors, path, metadata)
    return path


PAIR = {"w:left": torch.ones(2, 1), "w:right": torch.ones(3, 1)}


def test_the_rewritten_file_of_the_next_tests_is_sound_by_itself(tmp_path: Path) -> None:
    found = Delta.load(rewritten(tmp_path / "e", PAIR))
    assert torch.equal(found.factors["w"][1], torch.ones(3, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "fastmemit-moment"}, "is not an edit file of fastmemit"),
        ({"format": None}, "is not an edit file of fastmemit"),
        ({"version": "2"}, r"has version '2' but this fastmemit reads 1; upgrade"),
        ({"provenance": None}, "has no readable provenance"),
        ({"provenance": "{"}, "has no readable provenance"),
        ({"sha256": None}, "holds other bytes than were written"),
        ({"provenance": "{}"}, "holds other bytes than were written"),
    ],
)
def test_metadata_that_were_not_written_are_refused(
    tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    with pytest.raises(DamagedFile, match=message):
        Delta.load(rewritten(tmp_path / "e", PAIR, **changes))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w:left": torch.ones(2, 1)}, "a left and a right factor for each weight"),
        ({"w:right": torch.ones(2, 1)}, "a left and a right factor for each weight"),
        ({**PAIR, "w:middle": torch.ones(1)}, "a left and a right factor for each weight"),
        ({**PAIR, "stray": torch.ones(1)}, "a left and a right factor for each weight"),
        ({"w:left": torch.ones(2, 1), "w:right": torch.ones(3, 2)}, "do not fit each other"),
        ({"w:left": torch.ones(2), "w:right": torch.ones(3)}, "do not fit each other"),
        ({"w:left": torch.ones(2, 1).double(), "w:right": torch.ones(3, 1)}, "do not fit"),
    ],
)
def test_tensors_that_are_no_pairs_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(DamagedFile, match=message):
        Delta.load(rewritten(tmp_path / "e", tensors))


@pytest.mark.parametrize("name", ["gone.safetensors", "."])
def test_no_file_is_said_as_such(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="There is no edit file"):
        Delta.load(tmp_path / name)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("former", [True, False])
def test_a_full_disk_leaves_the_former_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, former: bool
) -> None:
    path = tmp_path / "edit.safetensors"
    if former:
        made().save(path)
        data = path.read_bytes()
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        Delta({"w": (torch.ones(2, 1), torch.ones(3, 1))}).save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["edit.safetensors"] if former else [])
    if former:
        assert path.read_bytes() == data


def test_a_folder_of_that_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "edit").mkdir()
    with pytest.raises(OSError):
        made().save(tmp_path / "edit")
    assert os.listdir(tmp_path) == ["edit"]


def test_it_adds_left_times_right_by_hand() -> None:
    model = Two()
    with torch.no_grad():
        model.a.weight.copy_(torch.arange(15.0).reshape(3, 5))
    left = torch.tensor([[1.0], [2.0], [0.0]])
    right = torch.tensor([[0.0], [1.0], [0.0], [3.0], [0.0]])
    Delta({"a.weight": (left, right)}).add_to(model)
    assert model.a.weight.tolist() == [[0, 2, 2, 6, 4], [5, 8, 7, 14, 9], [10, 11, 12, 13, 14]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_rounded_once(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 7).to(dtype)
    left, right = torch.randn(6, 3), torch.randn(7, 3)
    exact = weight.double() + left.double() @ right.double().T
    got = weight.clone()
    add_low_rank(got, left, right)
    assert got.dtype == dtype
    # Half a step of the dtype, and the rounding of the sum in float32.
    bound = exact.abs() * (torch.finfo(dtype).eps / 2 + 1e-6) + 1e-6
    assert bool(((got.double() - exact).abs() <= bound).all())
    # Factors that were rounded to the dtype first are worse than that.
    coarse = weight + left.to(dtype) @ right.to(dtype).T
    assert not bool(((coarse.double() - exact).abs() <= bound).all())


def test_a_loaded_delta_gives_the_same_bits(tmp_path: Path) -> None:
    delta = made()
    one, two = Two(), Two()
    two.load_state_dict(one.state_dict())
    delta.add_to(one)
    delta.save(tmp_path / "e")
    Delta.load(tmp_path / "e").add_to(two)
    assert same(two, weights(one))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"c.weight": (torch.ones(3, 1), torch.ones(5, 1))}, r"c\.weight .* no such weight"),
        (
            {"a.weight": (torch.ones(5, 1), torch.ones(3, 1))},
            r"a\.weight of shape \(5, 3\) but this model has it as \(3, 5\)",
        ),
    ],
)
def test_a_model_that_does_not_fit_stays_as_it_was(factors: dict, message: str) -> None:
    model = Two()
    before = weights(model)
    good = {"b.weight": (torch.ones(2, 1), torch.ones(4, 1))}
    with pytest.raises(WrongModel, match=message):
        Delta({**good, **factors}).add_to(model)
    assert same(model, before)


@pytest.mark.parametrize("how", [torch.int8, torch.float8_e4m3fn, "meta"])
def test_weights_without_their_numbers_are_refused(how: Any) -> None:
    before = weights(model := Two())["a.weight"]
    model.b.weight = nn.Parameter(torch.zeros(2, 4).to(how), requires_grad=False)
    said = "not in memory" if how == "meta" else "stored as"
    with pytest.raises(WrongModel, match=f"which is {said}"):
        made().add_to(model)
    assert torch.equal(model.a.weight, before)


def test_an_error_half_way_takes_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two()
    before = weights(model)
    calls = []

    def second_fails(weight: torch.Tensor, *sides: torch.Tensor) -> None:
        calls.append(weight.shape)
        with torch.no_grad():
            weight += 1
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(delta_module, "add_low_rank", second_fails)
    with pytest.raises(KeyboardInterrupt):
        made().add_to(model)
    assert len(calls) == 2 and same(model, before)


# -- numbers that no weight can hold --------------------------------------------------------------


def one(left: list[float], right: list[float]) -> Delta:
    """A change of `Two.b`, of rank 1."""
    return Delta({"b.weight": (torch.tensor(left)[:, None], torch.tensor(right)[:, None])}, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_an_edit_with_nan_or_infinity_is_refused_at_every_door(
    value: float, side: int, tmp_path: Path, saved: Path
) -> None:
    delta = made()
    delta.factors["a.weight"][side][2, 1] = value
    model = Two()
    before = weights(model)
    for refuse in (delta.check, delta.add_to):
        with pytest.raises(NonFiniteEdit, match=r"NaN or infinity in its factors of a\.weight"):
            refuse(model)
    assert same(model, before)
    with pytest.raises(NonFiniteEdit):
        delta.save(saved)
    made_again = Delta.load(saved)  # what was there is whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "_check_finite", lambda *_: None)
        delta.save(tmp_path / "strange.safetensors")  # as a stranger's program would write it
    with pytest.raises(DamagedFile, match=r"NaN or infinity in its factors of a\.weight"):
        Delta.load(tmp_path / "strange.safetensors")
    made_again.check(model)


@pytest.mark.parametrize(
    ("dtype", "start", "left", "right", "fits"),
    [
        # float16 holds up to 65504, and rounds what is below 65520 to that.
        (torch.float16, 0.0, 300.0, 300.0, False),  # 90000
        (torch.float16, 0.0, 256.0, 255.0, True),  # 65280
        (torch.float16, 60000.0, 80.0, 80.0, False),  # the product fits, 66400 does not
        (torch.float16, 60000.0, 50.0, 100.0, True),  # 65000
        (torch.float16, -60000.0, 80.0, 80.0, True),  # -53600; the bound alone does not show it
        (torch.float16, 65504.0, 1.0, 15.0, True),  # 65519
        (torch.float16, 65504.0, 1.0, 16.0, False),  # 65520 is rounded up
        (torch.float32, 0.0, 1e20, 1e20, False),
        (torch.float32, 0.0, 1e19, 1e19, True),
        (torch.float32, 3e38, 1e19, 9e18, False),  # 3.9e38 > 3.4e38
        (torch.bfloat16, 3e38, 1e19, 9e18, False),
        (torch.bfloat16, 0.0, 1e19, 1e19, True),
    ],
)
def test_a_sum_beyond_the_dtype_is_refused_before_a_weight_is_touched(
    dtype: torch.dtype, start: float, left: float, right: float, fits: bool
) -> None:
    model = Two(dtype)
    with torch.no_grad():
        model.b.weight.fill_(start)
    before = weights(model)
    delta = one([0.0, left], [0.0, 0.0, 0.0, right])
    if fits:
        delta.add_to(model)
        assert float(model.b.weight[1, 3]) == pytest.approx(start + left * right, rel=1e-2)
        return
    for refuse in (delta.check, delta.add_to):
        with pytest.raises(NonFiniteEdit, match=r"With the edit b\.weight would hold numbers"):
            refuse(model)
    assert same(model, before)


def test_all_or_none_where_the_second_weight_would_overflow() -> None:
    model = Two(torch.float16)
    before = weights(model)
    factors = {"a.weight": (torch.ones(3, 1), torch.ones(5, 1)),
               "b.weight": (torch.full((2, 1), 500.0), torch.full((4, 1), 500.0))}  # fmt: skip
    with pytest.raises(NonFiniteEdit):
        Delta(factors, {}).add_to(model)
    assert same(model, before)


def test_a_model_that_has_nan_itself_is_told_so() -> None:
    model = Two()
    with torch.no_grad():
        model.b.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteEdit, match=r"The model's own b\.weight holds NaN"):
        one([1.0, 1.0], [1.0] * 4).add_to(model)


def test_the_same_delta_gives_the_same_bytes(tmp_path: Path) -> None:
    import subprocess
    import sys

    torch.manual_seed(0)
    delta = made()
    about = {"b": [1, {"y": 2, "x": 1}], "a": "Łódź"}
    turned = Delta(dict(reversed(delta.factors.items())), dict(reversed(about.items())))
    Delta(delta.factors, about).save(tmp_path / "one")
    turned.save(tmp_path / "two")
    Delta.load(tmp_path / "one").save(tmp_path / "three")
    # The library's own order of metadata differs from process to process.
    script = "import sys; from fastmemit.delta import Delta; Delta.load(sys.argv[1]).save(sys.argv[2])"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "one"), str(tmp_path / "four")], check=True)
    files = {(tmp_path / name).read_bytes() for name in ("one", "two", "three", "four")}
    assert len(files) == 1
    data = files.pop()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    assert list(header) == ["__metadata__", "a.weight:left", "a.weight:right", "b.weight:left",
                            "b.weight:right"]  # fmt: skip
    assert list(header["__metadata__"]) == ["format", "version", "provenance", "sha256"]


def test_an_edit_of_rank_zero_is_written_and_read(tmp_path: Path) -> None:
    nothing = Delta({"b.weight": (torch.zeros(2, 0), torch.zeros(4, 0))}, {})
    nothing.save(tmp_path / "nothing")
    assert Delta.load(tmp_path / "nothing").digest() == nothing.digest()
    model = Two()
    before = weights(model)
    nothing.add_to(model)
    assert same(model, before)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (6, 4), (5, 5)])
def test_more_facts_than_a_side_take_no_more_than_it(rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for facts in (1, min(rows, columns), min(rows, columns) + 1, 40):
        left = torch.randn(rows, facts, generator=draw, dtype=torch.float64)
        right = torch.randn(columns, facts, generator=draw, dtype=torch.float64)
        found = compact(left, right)
        assert found[0].shape[1] == found[1].shape[1] == min(facts, rows, columns)
        assert torch.equal(found[0] @ found[1].T, left @ right.T)


def test_a_batch_of_more_facts_than_the_hidden_size_is_saved_compact(tmp_path: Path) -> None:
    """As the closed form gives it, for 40 facts in a model of hidden size 32 and keys of 64."""
    editor = tiny_editor(tmp_path / "editor", layers=(0, 1))
    facts = [dataclasses.replace(FACTS[0], subject=f"Tower {n}") for n in range(40)]
    given: list[LowRank] = []
    with pytest.MonkeyPatch.context() as patch:
        real = closed_form.memit
        patch.setattr(closed_form, "memit", lambda *args: given.append(real(*args)) or given[-1])
        edit = editor.edit(facts, "memit", layers=(0, 1), steps=1, verify=False)
    for change, layer in zip(given, (0, 1), strict=True):
        left, right = edit.delta.factors[editor.adapter.weight_name(layer)]
        assert change.left.shape[1] == 40 and left.shape[1] == right.shape[1] == 32
        wanted = change.dense().T if editor.adapter.weight_is_transposed(layer) else change.dense()
        torch.testing.assert_close(left @ right.T, wanted.float())
    edit.save(tmp_path / "edit.safetensors")
    again = Delta.load(tmp_path / "edit.safetensors")
    assert again.digest() == edit.delta.digest()


def test_what_a_saved_model_would_say_of_an_edit_whatever_is_on_record() -> None:
    fact = {"prompt": "{} is in", "subject": "x", "target_new": "y"}
    part = {"digest": "a" * 64, "provenance": {"method": "rome", "requests": [fact], "former": ["z"]}}
    whole = Delta({}, {"method": "composition", "parts": [part, {**part, "digest": "b" * 64}], "requests": [fact] * 2})
    assert [entry["digest"] for entry in whole.entries] == ["a" * 64, "b" * 64]
    assert whole.entries[0] == {"digest": "a" * 64, "method": "rome", "facts": [{**fact, "former": "z"}]}
    assert whole.digests == {whole.digest(), "a" * 64, "b" * 64}
    for parts in (3, "text", [3], [part, {"digest": 3}], [{**part, "provenance": []}]):
        (entry,) = Delta({}, {"parts": parts, "requests": [fact, 3], "former": ["z"]}).entries
        assert entry == {"digest": Delta({}).digest(), "method": "unknown", "facts": [fact]}
    assert Delta({}, {"requests": [{"prompt": 3}], "former": [3]}).entries[0]["facts"] == [{}]
