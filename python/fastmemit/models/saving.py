"""A model as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastcov.files import StrPath
from fastcov.hooks import isolated
from fastmemit.errors import WrongModel


@isolated()
def save_model(model: Any, tokenizer: Any, folder: StrPath, beside: Mapping[str, bytes] | None = None) -> Path:
    """Write a model and its tokenizer, if it is not None, to `folder`, which must not exist or be empty.

    `beside` are further files, by name.

    Everything is written to a temporary folder beside it, which is renamed when it is complete: a full disk or an
    interruption leaves nothing under the final name.

    Raises:
        FileExistsError: `folder` holds something already, or is a file.
        WrongModel: The weights are in a quantised form that has no file format.
        OSError: The disk refused.
    """  # noqa: DOC501 (by _disk_error)
    target = Path(folder)
    try:
        with new_folder(target) as partial:
            with _as_plain(model), _without_check(model, partial):
                model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            for name, content in (beside or {}).items():
                (partial / name).write_bytes(content)
            # The safetensors library makes files that only their owner may read; models are shared.
            mode = (partial / "config.json").stat().st_mode
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(mode)
    except BaseException as error:
        if type(error).__name__ == "SafetensorError":
            raise _disk_error(error, target) from error
        raise
    return target


@contextlib.contextmanager
def new_folder(folder: StrPath) -> Iterator[Path]:
    """A folder to write into that takes its name, where nothing is yet, only when the block ends well.

    Raises:
        FileExistsError: `folder` holds something already, or is a file.
        OSError: The disk refused; nothing is left of the attempt.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already and is not an empty folder; name another place.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp, whose folders only their owner may read.
    partial = target.parent / f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _to_disk(file)
        if target.is_dir() and os.name == "nt":
            target.rmdir()  # only POSIX renames over an empty folder
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _to_disk(file: Path) -> None:
    """See that a file is on the disk, so that no power cut leaves an empty one under its name."""
    opened = os.open(file, os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _disk_error(error: BaseException, folder: Path) -> OSError:
    """What the disk said, which the safetensors library hands on as text in an error of its own."""
    code = re.search(r"os error (\d+)", str(error))
    if code is None:
        return OSError(f"The weights could not be written to {folder} ({error}).")
    number = int(code.group(1))
    return OSError(number, os.strerror(number), str(folder))


@contextlib.contextmanager
def _as_plain(model: Any) -> Iterator[None]:
    """Hide from transformers that weights which are plain by now were read from GGUF: it would not save them."""
    quantizer, config = getattr(model, "hf_quantizer", None), model.config
    hidden = []
    if _expanded(model):
        places = [(model, name) for name in ("hf_quantizer", "is_quantized", "quantization_method")]
        places.append((config, "quantization_config"))
        hidden = [(owner, name, vars(owner).pop(name)) for owner, name in places if name in vars(owner)]
    elif quantizer is not None and not _can_be_saved(quantizer):
        raise WrongModel(
            f"{type(model).__name__} holds quantised weights that cannot be saved; load the "
            "model in floating point to save it."
        )
    try:
        yield
    finally:
        for owner, name, value in hidden:
            setattr(owner, name, value)


def _can_be_saved(quantizer: Any) -> bool:
    serializable = getattr(quantizer, "is_serializable", False)
    try:
        return bool(serializable() if callable(serializable) else serializable)
    except TypeError:  # transformers 4 asked with an argument
        return True


@contextlib.contextmanager
def _without_check(model: Any, folder: Path) -> Iterator[None]:
    """Write the model's generation settings as they are, whatever transformers thinks of them.

    A temperature beside do_sample=False is only useless, but no model with it would be saved.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    own.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def _expanded(model: Any) -> bool:
    """Whether all weights are plain floating-point tensors although they were quantised once."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if str(getattr(method, "value", method)) != "gguf":
        return False
    return all(type(parameter) is nn.Parameter and parameter.is_floating_point() for parameter in model.parameters())
