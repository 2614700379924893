"""Moments in other codebases' files: written as theirs, read as a stranger's."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcov import BadInput, FastcovError, NonFinite, SecondMoment, StoreDamaged
from fastcov.npz import load_npz, save_npz

KEYS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
SUM = [[1.0, 2.0, 3.0], [2.0, 5.0, 5.0], [3.0, 5.0, 10.0]]  # by hand


def arrays(**changed: Any) -> dict[str, Any]:
    """What their file has; a name with "_" for "." is replaced, None leaves it out."""
    found: dict[str, Any] = {
        "mom2.constructor": np.asarray("util.runningstats.SecondMoment()"),
        "mom2.count": np.asarray(2),
        "mom2.mom2": np.asarray(SUM, dtype=np.float32),
        "sample_size": np.asarray(100000),
    }
    for name, value in changed.items():
        found[name if name == "sample_size" else name.replace("_", ".", 1)] = value
    return {name: value for name, value in found.items() if value is not None}


def written(path: Path, **changed: Any) -> Path:
    np.savez(path, **arrays(**changed))
    return path


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "deep" / "a.npz"
    save_npz(path, SecondMoment(3).update(KEYS), sample_size=100000, dtype=dtype)
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {"mom2.count", "mom2.mom2", "sample_size"}
        assert (file["mom2.count"].dtype, file["mom2.count"].shape) == (np.dtype("int64"), ())
        assert int(file["mom2.count"]) == 2 and int(file["sample_size"]) == 100000
        assert str(file["mom2.mom2"].dtype) == str(dtype).removeprefix("torch.")
        assert file["mom2.mom2"].tolist() == SUM
    first = path.read_bytes()
    save_npz(path, SecondMoment(3).update(KEYS), sample_size=100000, dtype=dtype)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


def test_above_the_diagonal_is_mirrored_and_not_read(tmp_path: Path) -> None:
    moment = SecondMoment(3).update(KEYS)
    moment.lower[0, 2] = torch.nan
    save_npz(tmp_path / "a.npz", moment, sample_size=1)
    assert np.load(tmp_path / "a.npz")["mom2.mom2"].tolist() == SUM


def test_a_sum_too_large_for_float32_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    moment = SecondMoment(3, dtype=torch.float64).update(KEYS.double() * 1e19)
    with pytest.raises(NonFinite, match=r"a\.npz'.* row 1, column 1; collect") as caught:
        save_npz(tmp_path / "a.npz", moment, sample_size=1)
    assert (caught.value.entries, caught.value.where) == (4, (1, 1))
    assert list(tmp_path.iterdir()) == []
    save_npz(tmp_path / "a.npz", moment, sample_size=1, dtype=torch.float64)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    moment, path = SecondMoment(3).update(KEYS), tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"float32 or float64 but not as torch\.float16"):
        save_npz(path, moment, sample_size=9, dtype=torch.float16)
    for size in (0, True, 1e5):
        with pytest.raises(ValueError, match=f"above 0 but is {size}"):
            save_npz(path, moment, sample_size=size)  # type: ignore[arg-type]  # wrong kinds are what is refused
    with pytest.raises(ValueError, match="has seen no key"):
        save_npz(path, SecondMoment(3), sample_size=9)
    assert not path.exists()


@pytest.mark.parametrize("width", [3, None])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mom2_mom2": np.asarray(SUM)},  # float64
        {"mom2_mom2": np.asarray(SUM, dtype=">f4")},
        {"mom2_mom2": np.asfortranarray(np.asarray(SUM, dtype=np.float32))},
        {"mom2_count": np.asarray([2])},
        {"mom2_count": np.asarray(2.0)},
        {"mom2_constructor": None, "mean_mean": np.zeros(3)},
    ],
)
def test_what_is_read(tmp_path: Path, width: int | None, changed: dict[str, Any]) -> None:
    found = load_npz(written(tmp_path / "a.npz", **changed), width=width)
    assert found.moment.sum.tolist() == SUM
    assert (found.moment.count, found.sample_size) == (2, 100000)
    assert found.moment.quartic is None
    wide = changed.get("mom2_mom2", np.zeros(1, np.float32)).dtype.itemsize == 8
    assert found.moment.dtype == (torch.float64 if wide else torch.float32)


def test_a_file_without_a_sample_size_and_a_compressed_one(tmp_path: Path) -> None:
    assert load_npz(written(tmp_path / "a.npz", sample_size=None)).sample_size is None
    np.savez_compressed(tmp_path / "b.npz", **arrays())
    assert load_npz(tmp_path / "b.npz").moment.sum.tolist() == SUM


def test_a_sum_is_read_as_it_was_written(tmp_path: Path) -> None:
    moment = SecondMoment(40).update(torch.randn(500, 40))
    save_npz(tmp_path / "a.npz", moment, sample_size=100)
    found = load_npz(tmp_path / "a.npz", width=40)
    assert torch.equal(found.moment.second_moment, moment.second_moment)
    assert (found.moment.count, found.sample_size) == (500, 100)


class Exploding:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


def objects(value: Any) -> Any:
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def test_a_constructor_that_needs_unpickling_is_never_looked_at(tmp_path: Path) -> None:
    bad = pickle.dumps(Exploding())
    path = written(tmp_path / "a.npz", mom2_constructor=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("mom2.constructor.npy", npy(objects("x"))[:128] + bad)
    assert load_npz(path, width=3).moment.count == 2


@pytest.mark.parametrize("name", ["mom2_count", "mom2_mom2", "sample_size"])
def test_objects_where_numbers_belong_are_not_unpickled(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "a.npz", **{name: objects(2)})
    with pytest.raises(StoreDamaged, match=r"a\.npz' holds Python objects as .*; get it again"):
        load_npz(path, width=3)


def changed_sum(place: tuple[int, int], value: float) -> Any:
    array = np.asarray(SUM, dtype=np.float32)
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"mom2_mom2": None}, r"has no mom2\.mom2 \(it holds mom2\.constructor, mom2\.count, sa"),
        ({"mom2_count": None}, r"has no mom2\.count"),
        ({"mom2_count": np.asarray(0)}, "counts 0 keys"),
        ({"mom2_count": np.asarray(-2)}, "counts -2 keys"),
        ({"mom2_count": np.asarray(1.5)}, "of 1.5, which is not a whole number"),
        ({"mom2_count": np.asarray(np.nan)}, "of nan, which is not a whole number"),
        ({"mom2_count": np.asarray([1, 2])}, r"int64 of shape \(2,\), not a whole number"),
        ({"mom2_count": np.asarray("2")}, "not a whole number"),
        ({"sample_size": np.zeros((9, 9))}, "not a whole number"),
        ({"mom2_mom2": np.zeros((3, 3))}, "for its diagonal is zero"),
        ({"mom2_mom2": np.ones((3, 3), np.float16)}, "of float16, not of float32 or float64"),
        ({"mom2_mom2": np.ones((3, 3), np.int32)}, "of int32"),
        ({"mom2_mom2": np.ones((3, 3), np.longdouble)}, "not of float32 or float64"),
        ({"mom2_mom2": np.ones((3, 4), np.float32)}, r"shape \(3, 4\), not a square"),
        ({"mom2_mom2": np.ones(9, np.float32)}, r"shape \(9,\), not a square"),
        ({"mom2_mom2": np.ones((0, 0), np.float32)}, r"shape \(0, 0\), not a square"),
        ({"mom2_mom2": changed_sum((1, 1), -5)}, "for place 1 of its diagonal is -5"),
        ({"mom2_mom2": changed_sum((0, 2), 3.1)}, "for it is not symmetric in row 0, column 2"),
        ({"mom2_mom2": changed_sum((2, 2), 1)}, "for row 0, column 2 is larger than its diagonal"),
    ],
)
def test_what_is_no_moment(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    path = written(tmp_path / "a.npz", **changed)
    with pytest.raises(StoreDamaged, match=rf"a\.npz'.*{match}.*; get it again, or precompute"):
        load_npz(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite(tmp_path: Path, value: float) -> None:
    path = written(tmp_path / "a.npz", mom2_mom2=changed_sum((2, 1), value))
    with pytest.raises(NonFinite, match=r"a\.npz' holds NaN .* row 2, column 1") as caught:
        load_npz(path)
    assert caught.value.entries == 1


def test_keys_of_another_width(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.npz' is of keys of width 3 .* have 4; take the"):
        load_npz(written(tmp_path / "a.npz"), width=4)


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (117 - len(text)) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


COUNT = {"mom2.count.npy": npy(np.asarray(2))}


def test_a_header_that_claims_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.lib.format, "read_array", None)  # to call it would raise TypeError
    path = zipped(tmp_path / "a.npz", {"mom2.mom2.npy": header((60000, 60000)), **COUNT})
    with pytest.raises(StoreDamaged, match=r"has 128 bytes for a sum of shape \(60000, 60000\)"):
        load_npz(path)
    with pytest.raises(BadInput, match=r"width 60000 .* have 3"):
        load_npz(path, width=3)
    path = zipped(tmp_path / "b.npz", {"mom2.mom2.npy": header((10**9, 10**9)), **COUNT})
    with pytest.raises(BadInput, match="width 1000000000, beyond 65536"):
        load_npz(path)
    path = zipped(tmp_path / "c.npz", {"mom2.mom2.npy": header((3, 3)) + bytes(36),
                                       "mom2.count.npy": header((10**12,), "<i8")})  # fmt: skip
    with pytest.raises(StoreDamaged, match=r"mom2\.count that is int64 of shape \(1000000000000,"):
        load_npz(path)


def test_a_member_that_expands_out_of_all_proportion(tmp_path: Path) -> None:
    data = header((2200, 2200)) + bytes(4 * 2200**2)
    path = zipped(tmp_path / "a.npz", {"mom2.mom2.npy": data, **COUNT}, zipfile.ZIP_DEFLATED)
    with pytest.raises(StoreDamaged, match=r"expands \d+ bytes to 19360128"):
        load_npz(path, width=2200)


def test_a_file_larger_than_its_width_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZipFile", None)  # its list of contents is not read
    with open(tmp_path / "a.npz", "wb") as file:
        file.truncate((1 << 26) + 73)
    with pytest.raises(StoreDamaged, match="is larger than any moment of width 3"):
        load_npz(tmp_path / "a.npz", width=3)


def holding(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def lying_size(path: Path) -> Path:
    """A compressed member whose true size is larger than what the archive says."""
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    place = data.rindex(b"mom2.mom2.npy") - 46  # its entry in the list of contents
    assert data[place : place + 4] == b"PK\x01\x02"
    data[place + 24 : place + 28] = (128 + 32).to_bytes(4, "little")
    return holding(path, bytes(data))


def flipped(path: Path) -> Path:
    data = bytearray(written(path).read_bytes())
    place = data.index(np.asarray(SUM, dtype=np.float32).tobytes())
    data[place] ^= 1
    return holding(path, bytes(data))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: holding(p, b""),
        lambda p: holding(p, b"no archive at all"),
        lambda p: holding(p, written(p).read_bytes()[:-300]),
        lambda p: zipped(p, {"mom2.mom2.npy": b"no array", **COUNT}),
        lambda p: zipped(p, {"mom2.mom2.npy": header((3, 3))[:20], **COUNT}),
        lambda p: zipped(p, {"mom2.mom2.npy": header((3, 3), "nonsense") + bytes(36), **COUNT}),
        lambda p: zipped(p, {"mom2.mom2.npy": b"\x93NUMPY\x07\x00" + bytes(99), **COUNT}),
        flipped,
        lying_size,
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "a.npz")
    with pytest.raises(StoreDamaged, match=r"a\.npz' .*; get it again, or precompute"):
        load_npz(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(FastcovError, match="There is no file"):
            load_npz(path)
