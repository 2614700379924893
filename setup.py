"""Asks CMake for the native module; pyproject.toml has the metadata, CMakeLists.txt the build.

The environment decides: ``FASTCOV_SKIP_NATIVE=1`` installs pure Python; ``FASTCOV_CUDA`` and ``FASTCOV_CUDA_ARCHS`` go
to CMake, which explains them. Unless asked for, CUDA is left out where torch has none: nvcc takes minutes. Without a
C++ compiler, or on Windows, whose compiler lacks the vector types in use, the package is pure Python and everything
still works, slower; `python -m fastcov` says so.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds the one extension by CMake and puts it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and copy the module."""
        try:
            import pybind11
        except ImportError:
            sys.exit(
                "error: pybind11 is not installed in the environment that builds; install it, let "
                "pip build in an environment of its own (pip install .), or set "
                "FASTCOV_SKIP_NATIVE=1 to install without native kernels."
            )
        folder = Path(self.build_temp).resolve() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'out'}",
        ]
        options.append(f"-DFASTCOV_CUDA={cuda_setting(os.environ, Path(sysconfig.get_path('purelib')))}")
        if os.environ.get("FASTCOV_CUDA_ARCHS"):
            options.append(f"-DFASTCOV_CUDA_ARCHS={os.environ['FASTCOV_CUDA_ARCHS']}")
        if shutil.which("ninja"):
            options += ["-G", "Ninja"]
        # A cache of another environment's compiler or Python would be trusted otherwise.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        try:
            subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True)
            subprocess.run(["cmake", "--build", str(folder), "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(
                f"error: the native module did not build ({error}); see the compiler's message "
                "above, or set FASTCOV_SKIP_NATIVE=1 to install without it."
            )
        (built,) = (folder / "out").glob("_native*")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


def cuda_setting(environment: Mapping[str, str], packages: Path) -> str:
    """What CMake is told about CUDA: what was asked for, else AUTO where the torch of these packages has CUDA.

    Its version is read from its file: pip builds in an environment of its own, from which torch cannot be imported.
    """
    asked = environment.get("FASTCOV_CUDA")
    if asked:
        return asked
    file = packages / "torch" / "version.py"
    found = re.search(r"^cuda\b.*= *['\"]", file.read_text(encoding="utf-8"), re.MULTILINE) if file.is_file() else None
    if found:
        return "AUTO"
    if shutil.which("nvcc"):
        print("fastcov: no torch with CUDA is installed here, so nvcc is not used; FASTCOV_CUDA=ON asks for it.")
    return "OFF"


def why_not() -> str | None:
    """Why no native module is built, or None if one is."""
    if os.environ.get("FASTCOV_SKIP_NATIVE", "0") not in ("", "0"):
        return "FASTCOV_SKIP_NATIVE is set"
    if sys.platform == "win32":
        return "Windows is not supported by the native module"
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler was found"
    return None


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        print(f"fastcov: {reason}, so the package is installed without native kernels.", file=sys.stderr)
    extensions = [] if reason else [Extension("fastcov._native", sources=[])]
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
