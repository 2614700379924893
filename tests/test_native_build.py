"""How the native module is built, or not: what setup.py and CMakeLists.txt promise."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(command, cwd, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTCOV_") and k != "CXX"}
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture
def sources(tmp_path):
    """A copy of what a source distribution has; builds leave their traces there."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "_native*")
    for name in ("csrc", "fastcov", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def pure_wheel(sources, **environment):
    """Build a wheel; its only name must say that it is pure Python."""
    done = run([sys.executable, "setup.py", "bdist_wheel"], sources, **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    return wheel, done.stderr


def test_skipping_the_native_module_makes_a_pure_wheel_and_says_so(sources):
    wheel, said = pure_wheel(sources, FASTCOV_SKIP_NATIVE="1")
    assert "FASTCOV_SKIP_NATIVE is set" in said
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastcov/kernels/measured.json", "fastcov/bench/__main__.py"} <= names
    assert not [name for name in names if name.startswith(("benchmarks", "tests"))]
    assert not [name for name in names if "_native" in name or name.startswith("csrc")]


def test_without_a_compiler_the_wheel_is_pure_and_says_so(sources, tmp_path):
    empty = tmp_path / "nothing"
    empty.mkdir()
    _, said = pure_wheel(sources, PATH=str(empty))
    assert "no C++ compiler was found" in said


def test_the_source_distribution_has_all_that_an_installation_needs(sources, tmp_path):
    shutil.copy(ROOT / "MANIFEST.in", sources)
    shutil.copy(ROOT / "constraints.txt", sources)
    assert run([sys.executable, "setup.py", "sdist"], sources).returncode == 0
    (archive,) = (sources / "dist").glob("*.tar.gz")
    unpacked, empty = tmp_path / "unpacked", tmp_path / "nothing"
    empty.mkdir()
    shutil.unpack_archive(archive, unpacked)
    (folder,) = unpacked.iterdir()
    native = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert native == {path.relative_to(folder) for path in (folder / "csrc").rglob("*") if path.is_file()}
    assert (folder / "CMakeLists.txt").is_file()
    wheel, said = pure_wheel(folder, PATH=str(empty))  # on a machine without a compiler
    assert "no C++ compiler was found" in said
    assert "fastmemit/data/facts.jsonl" in zipfile.ZipFile(wheel).namelist()


def test_a_pure_installation_says_once_at_its_first_use_that_it_is_one():
    code = (
        "import sys, logging; sys.modules['fastcov._native'] = None; logging.basicConfig(format='%(message)s')\n"
        "import torch, fastcov\n"
        "for _ in range(3): fastcov.rank_k_update(torch.zeros(2, 2), torch.ones(3, 2))\n"
        "fastcov.rank_k_update(torch.zeros(2, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64))\n"
    )
    done = run([sys.executable, "-c", code], ROOT)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastcov sums keys through torch here, more slowly: ") and "python -m fastcov" in line


def test_a_compiler_that_fails_is_an_error_with_its_mend(sources):
    pytest.importorskip("pybind11", reason="pybind11 is not installed (make lint installs it)")
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("no cmake or no C++ compiler")
    (sources / "csrc" / "cpu" / "dispatch.cpp").write_text("this is no C++\n")
    done = run([sys.executable, "setup.py", "build_ext"], sources, FASTCOV_CUDA="OFF")
    assert done.returncode != 0
    assert "FASTCOV_SKIP_NATIVE=1" in done.stderr


@pytest.mark.parametrize(
    ("setting", "words"), [("MAYBE", "must be AUTO, ON or OFF but is 'MAYBE'"), ("ON", "no working nvcc was found")]
)
def test_what_cuda_setting_cannot_be_kept_to_is_an_error(sources, tmp_path, setting, words):
    pytest.importorskip("pybind11", reason="pybind11 is not installed (make lint installs it)")
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("no cmake or no C++ compiler")
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = run([sys.executable, "setup.py", "build_ext"], sources, FASTCOV_CUDA=setting, CUDACXX=str(broken))
    assert done.returncode != 0
    assert words in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("asked", "version", "wanted"),
    [
        ({}, "cuda: Optional[str] = None", "OFF"),
        ({}, "cuda: Optional[str] = '12.8'", "AUTO"),
        ({}, "cuda = '11.8'", "AUTO"),
        ({}, None, "OFF"),
        ({"FASTCOV_CUDA": ""}, None, "OFF"),
        ({"FASTCOV_CUDA": "ON"}, None, "ON"),
        ({"FASTCOV_CUDA": "off"}, "cuda = '12.8'", "off"),
        ({"FASTCOV_CUDA": "MAYBE"}, None, "MAYBE"),  # CMake refuses it
    ],
)
def test_cuda_is_compiled_where_torch_has_it_or_where_asked_for(tmp_path, monkeypatch, capsys, asked, version, wanted):
    (tmp_path / "torch").mkdir()
    if version is not None:
        (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{version}\nhip: Optional[str] = '6.0'\n")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = importlib.util.spec_from_file_location("fastcov_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    assert setup.cuda_setting(asked, tmp_path) == wanted
    silent = bool(asked.get("FASTCOV_CUDA")) or wanted == "AUTO"
    assert ("FASTCOV_CUDA=ON asks for it" in capsys.readouterr().out) is not silent


def test_the_module_of_this_installation_is_of_these_sources():
    if importlib.util.find_spec("fastcov._native") is None:
        pytest.skip("no native module is installed")
    from fastcov.kernels import cpu
    from fastcov.kernels.cpu import native

    build = dict(native().build())
    assert build is not None and build["compiler"]
    names = [name for name, _ in native().cpu_variants()]
    known = [kernel.name for kernel in (*cpu.FAST, cpu.PORTABLE)]
    assert names == [name for name in known if name in names] and "portable" in names
