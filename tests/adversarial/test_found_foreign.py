"""What the fuzz found in files of other codebases."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.fuzz_readers import npy_of, npz_of
from fastcov import StoreDamaged
from fastcov.bench.measure import peak_beyond
from fastcov.npz import load_npz


@pytest.mark.parametrize("text", ["{", "(" * 500, "{'descr': '<f4', 'shape': ("])
def test_a_header_that_is_not_python(tmp_path: Path, text: str) -> None:
    path = tmp_path / "b.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in npz_of(tmp_path).items():
            archive.writestr(name, npy_of(text, b"") if name == "mom2.mom2.npy" else data)
    with pytest.raises(StoreDamaged, match=r"is not a readable \.npz file"):
        load_npz(path)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("member", ["mom2.count.npy", "mom2.mom2.npy", "sample_size.npy"])
def test_an_archive_that_expands_takes_no_memory(tmp_path: Path, packing: int, member: str) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, data in npz_of(tmp_path).items():
            archive.writestr(name, data + bytes(1 << 26) if name == member else data)
    path = tmp_path / "b.npz"
    path.write_bytes(file.getvalue())

    def read() -> None:
        with pytest.raises(StoreDamaged):
            load_npz(path)

    read()
    peak = peak_beyond(read, torch.device("cpu"))
    assert peak is None or peak < 1 << 24
