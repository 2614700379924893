from __future__ import annotations

import builtins
import errno
import json
import os
import stat

import pytest
import torch

from fastcov import (
    FastcovError,
    SecondMoment,
    StoreDamaged,
    StoreMismatch,
    files,
    load_moment,
    read_provenance,
    save_moment,
    store,
)

PROVENANCE = {"model": "tiny", "module": "layers.4.down_proj", "seed": 3, "corpus": {"name": "w"}}


def moment(d=5, dtype=torch.float32, seed=0):
    X = torch.randn(20, d, generator=torch.Generator().manual_seed(seed))
    return SecondMoment(d, dtype=dtype, quartic=True).update(X)


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def with_header(data, change):
    length, header = header_of(data)
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 37])
def test_what_is_loaded_is_what_was_saved(tmp_path, dtype, d):
    saved = moment(d, dtype)
    path = tmp_path / "deep" / "er" / "m.safetensors"
    save_moment(path, saved, PROVENANCE)
    loaded, provenance = load_moment(path)
    assert (loaded.d, loaded.count, loaded.dtype) == (d, 20, dtype)
    assert torch.equal(loaded.sum, saved.sum)
    assert torch.equal(loaded.quartic, saved.quartic) and loaded.quartic > 0
    assert provenance == PROVENANCE == read_provenance(path)
    assert [file.name for file in path.parent.iterdir()] == ["m.safetensors"]
    loaded.update(torch.ones(1, d))
    assert loaded.count == 21


def test_the_file_is_plain_safetensors_with_the_packed_triangle(tmp_path):
    from safetensors.torch import load_file

    path = tmp_path / "m.safetensors"
    lower = torch.tensor([[1.0, float("nan"), 9.0], [2.0, 3.0, 9.0], [4.0, 5.0, 6.0]])
    save_moment(path, SecondMoment.from_lower(lower, 7), {})
    assert {name: value.tolist() for name, value in load_file(path).items()} == {"sum": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    _, header = header_of(path.read_bytes())
    metadata = header["__metadata__"]
    assert (metadata["format"], metadata["d"], metadata["count"]) == ("1", "3", "7")
    assert load_moment(path)[0].sum.tolist() == [[1, 2, 4], [2, 3, 5], [4, 5, 6]]


def test_equal_moments_give_equal_files_that_others_may_read(tmp_path):
    save_moment(tmp_path / "a", moment(), {"x": 1, "y": 2})
    save_moment(tmp_path / "b", moment(), {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_expectations_are_compared_field_by_field(tmp_path):
    path = tmp_path / "m"
    save_moment(path, moment(), {**PROVENANCE, "layers": (1, 2)})
    assert load_moment(path, expect={"seed": 3, "layers": (1, 2)})[0].count == 20
    with pytest.raises(StoreMismatch, match=r"its seed is 3 but 4 is expected") as error:
        load_moment(path, expect={"model": "tiny", "seed": 4})
    assert (error.value.field, error.value.stored, error.value.expected) == ("seed", 3, 4)
    with pytest.raises(StoreMismatch, match="dtype is not on record") as error:
        load_moment(path, expect={"dtype": "bfloat16"})
    assert (error.value.field, error.value.stored) == ("dtype", None)


def test_a_field_that_is_null_is_not_one_that_is_absent(tmp_path):
    save_moment(tmp_path / "m", moment(), {"revision": None})
    load_moment(tmp_path / "m", expect={"revision": None})
    with pytest.raises(StoreMismatch, match="not on record"):
        load_moment(tmp_path / "m", expect={"other": None})


def test_every_single_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "m"
    save_moment(path, moment(3), {"model": "tiny"})
    data = path.read_bytes()
    wanted = moment(3).sum
    for i in range(len(data)):
        flip = (0x01, 0x20, 0x80)[i % 3]
        path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        try:
            loaded, provenance = load_moment(path)
        except StoreDamaged as error:
            assert "delete it" in str(error) and str(path) in str(error)
        else:  # a byte of the header that says nothing, such as white space
            assert torch.equal(loaded.sum, wanted) and loaded.count == 20, i
            assert provenance == {"model": "tiny"}, i


def test_a_truncated_or_longer_file_is_refused(tmp_path):
    path = tmp_path / "m"
    save_moment(path, moment(), PROVENANCE)
    data = path.read_bytes()
    for cut in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:cut])
        for read in (load_moment, read_provenance):
            with pytest.raises(StoreDamaged, match="delete it"):
                read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(StoreDamaged):
        load_moment(path)


def resealed(data, **changes):
    """The file with other metadata, and a check that fits them."""

    def change(header):
        metadata = {**header["__metadata__"], **changes}
        metadata["check"] = store._digest(metadata)
        header["__metadata__"] = metadata

    return with_header(data, change)


def test_a_file_without_fourth_powers_is_read_and_none_is_written_that_is_not_known(tmp_path):
    path = tmp_path / "m"
    unknown = SecondMoment.from_lower(moment().lower, 20)
    save_moment(path, unknown, PROVENANCE)  # as files of the first version are
    _, header = header_of(path.read_bytes())
    assert header["__metadata__"].keys() == {
        "format", "d", "count", "dtype", "sha256", "provenance", "check"
    }  # fmt: skip
    loaded, _ = load_moment(path)
    assert loaded.quartic is None and torch.equal(loaded.sum, moment().sum)
    endless = SecondMoment.from_lower(moment().lower, 20, float("inf"))
    save_moment(path, endless, PROVENANCE)
    assert load_moment(path)[0].quartic is None


@pytest.mark.parametrize(
    "changes",
    [
        {"d": "6"},
        {"dtype": "F64"},
        {"sha256": "0" * 64},
        {"provenance": "[1]"},
        {"quartic": "many"},
        {"quartic": "-1.0"},
        {"quartic": "nan"},
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path, changes):
    path = tmp_path / "m"
    save_moment(path, moment(), PROVENANCE)
    path.write_bytes(resealed(path.read_bytes(), **changes))
    with pytest.raises(StoreDamaged):
        load_moment(path)


def test_a_file_of_a_newer_version_is_not_called_damaged(tmp_path):
    path = tmp_path / "m"
    save_moment(path, moment(), PROVENANCE)
    path.write_bytes(resealed(path.read_bytes(), format="2"))
    for read in (load_moment, read_provenance):
        with pytest.raises(StoreMismatch, match=r"format 2.*knows 1.*upgrade"):
            read(path)


def test_other_files_are_not_moments(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "m"
    for data in (b"", b"hello", b"PK\x03\x04" + b"\0" * 100):
        path.write_bytes(data)
        with pytest.raises(StoreDamaged):
            load_moment(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(StoreDamaged):
        load_moment(path)
    with pytest.raises(FastcovError, match="precompute"):
        load_moment(tmp_path / "nothing")


def test_provenance_must_be_json(tmp_path):
    for bad in ({"x": torch.ones(1)}, {"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(ValueError, match="Provenance"):
            save_moment(tmp_path / "m", moment(), bad)
    assert list(tmp_path.iterdir()) == []


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file that takes its first write and then has no room."""

    def __init__(self, file):
        self.file = file
        self.writes = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.writes += 1
        return self.file.write(data) if self.writes < 2 else full()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, existing):
    path = tmp_path / "m"
    if existing:
        save_moment(path, moment(seed=1), {"old": True})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        if where == "write":
            real = builtins.open
            patch.setattr(builtins, "open", lambda *a, **k: FullFile(real(*a, **k)))
        else:
            patch.setattr(os, where, full)
        with pytest.raises(OSError, match="No space left"):
            save_moment(path, moment(seed=2), {"old": False})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_interrupt_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), store.atomic_file(tmp_path / "m") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# -- what lies under the name ---------------------------------------------------------------------


def written(path, data=b"new"):
    with store.atomic_file(path) as file:
        file.write(data)


def test_through_a_link_the_file_behind_it_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "edit").write_bytes(b"old")
    (tmp_path / "latest").symlink_to("real/edit")
    (tmp_path / "twice").symlink_to("latest")
    written(tmp_path / "twice")
    assert (tmp_path / "twice").is_symlink() and (tmp_path / "latest").is_symlink()
    assert (tmp_path / "real" / "edit").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["edit", "latest", "real", "twice"]


def test_a_link_to_nowhere_gets_its_file_and_a_loop_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("made/later")
    written(tmp_path / "link")
    assert (tmp_path / "made" / "later").read_bytes() == b"new" and (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as refused:
        written(tmp_path / "loop")
    assert refused.value.errno == errno.ELOOP and (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o644, 0o400, 0o755])
def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path, mode):
    path = tmp_path / "private"
    path.write_bytes(b"old")
    path.chmod(mode)
    with store.atomic_file(path) as file:
        (beside,) = (p for p in tmp_path.iterdir() if p != path)
        assert stat.S_IMODE(beside.stat().st_mode) == mode  # before anything is in it
        file.write(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"new"


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        written(tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_is_replaced_keeps_its_owner_and_group(tmp_path):
    path = tmp_path / "theirs"
    path.write_bytes(b"old")
    os.chown(path, 1234, 4321)
    path.chmod(0o640)
    written(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 4321, 0o640)


def test_where_the_group_cannot_be_kept_another_gets_no_more_than_anybody(tmp_path, monkeypatch):
    path = tmp_path / "shared"
    path.write_bytes(b"old")
    path.chmod(0o664)

    def refuse(*_):
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "fchown", refuse)
    written(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_pipe_is_written_into_and_stays(tmp_path):
    import threading

    path = tmp_path / "pipe"
    os.mkfifo(path)
    found = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    written(path, b"x" * 200_000)
    reader.join(10)
    assert found == [b"x" * 200_000] and stat.S_ISFIFO(path.stat().st_mode)


def test_a_pipe_that_nobody_reads_is_no_reason_to_wait_for_ever(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "_READER_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    written(tmp_path / "pipe")
    assert "nobody reads the pipe" in caplog.text
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_device_is_written_into_and_stays(tmp_path):
    try:
        os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with open(tmp_path / "null", "wb"):
            pass
    except PermissionError:
        pytest.skip("no device can be made and opened here")
    written(tmp_path / "null")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


@pytest.mark.parametrize(("name", "piped"), [("/dev/stdout", True), ("/dev/stdout", False), ("OUT", False)])
def test_what_goes_to_the_output_comes_in_order_with_what_is_printed(tmp_path, name, piped):
    """Also where the output is a file, which must not be replaced under the printer's hands."""
    import subprocess
    import sys

    out = tmp_path / "out"
    lines = (
        "import sys; from fastcov.files import atomic_file",
        "print('before')",
        "with atomic_file(sys.argv[1]) as file: file.write(b'inside\\n')",
        "print('after')",
    )
    with open(out, "wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines), str(out) if name == "OUT" else name],
            stdout=subprocess.PIPE if piped else file, check=True,
        )  # fmt: skip
    assert (done.stdout or out.read_bytes()) == b"before\ninside\nafter\n"


@pytest.mark.parametrize("name", ["e" * 255, "\u65e5" * 83 + "a.json", "e" * 226])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path, name):
    written(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    written(tmp_path / name, b"again")
    assert (tmp_path / name).read_bytes() == b"again"


def test_a_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        written(tmp_path / "folder")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


def test_a_descriptor_of_the_shell_is_written_into(tmp_path):
    """``3>file`` and ``/dev/fd/3``: the shell's file goes on behind what was written."""
    descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"before ")
    written(f"/dev/fd/{descriptor}")
    os.write(descriptor, b" after")
    os.close(descriptor)
    assert (tmp_path / "out").read_bytes() == b"before new after"
