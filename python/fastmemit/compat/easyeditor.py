"""EasyEdit on our statistics, target vectors and edits: what `install_easyeditor` puts into its modules."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.hooks import isolated
from fastmemit.compat import drop_in
from fastmemit.compat.drop_in import live
from fastmemit.compat.hparams import fields_of, target_settings, whole_numbers
from fastmemit.errors import BadConfig
from fastmemit.request import EditRequest, Fact, check_batch
from fastmemit.targets import stored_or_optimised

log = logging.getLogger(__name__)

_MODELS = "easyeditor.models."
#: Where its ``get_cov`` is.
_WITH_COV = (
    "memit.memit_main", "emmet.emmet_main", "memit_FE.memit_FE_main", "pmet.pmet_main", "eamet.eamet_main",
    "core.core_main", "alphaedit.AlphaEdit_main", "SPHERE.SPHERE_main",
)  # fmt: skip
_WITH_INVERSE = ("rome.compute_u", "r_rome.compute_u")
#: Whose target vectors are MEMIT's, and the function that asks for them one by one; the others have their own losses.
_WITH_TARGETS = {
    "memit.memit_main": "execute_memit",
    "emmet.emmet_main": "execute_emmet",
    "alphaedit.AlphaEdit_main": "execute_AlphaEdit",
    "SPHERE.SPHERE_main": "execute_AlphaEdit",
}
_EDITORS: dict[str, Callable[..., Any]] = {
    "ROME": drop_in.apply_rome_to_model,
    "R-ROME": drop_in.apply_r_rome_to_model,
    "MEMIT": drop_in.apply_memit_to_model,
    "EMMET": drop_in.apply_emmet_to_model,
    "AlphaEdit": drop_in.apply_alphaedit_to_model,
}

#: The target vectors of the batch that is being written; see `_name`.
_ahead: dict[tuple[int, int, str, str, str], Tensor] = {}


def install_easyeditor(*, statistics: bool = True, targets: bool = True, editors: bool = True) -> list[str]:
    """Let EasyEdit use what is made here, in this process: its own scripts go on as they are.

    To be called once, before its ``BaseEditor`` is made; ``fastmemit.compat.configure`` says which text C is of. What
    is not there in an older version of it is left out.

    Args:
        statistics: Put `get_cov` into its MEMIT, EMMET, MEMIT-FE, PMET, EAMET, CORE, AlphaEdit and SPHERE, and
            `get_inv_cov` into its ROME and R-ROME.
        targets: Put `compute_z` into its MEMIT, EMMET, AlphaEdit and SPHERE; the vectors of a batch are optimised
            together when the first is asked for.
        editors: Put our whole editors in the place of its ROME, R-ROME, MEMIT, EMMET and AlphaEdit (``ALG_DICT``).

    Returns:
        What was replaced, such as ``"memit.memit_main.get_cov"``.

    Raises:
        BadConfig: EasyEdit cannot be imported, or nothing of it is where it should be.
    """
    try:
        importlib.import_module("easyeditor")
    except ImportError as error:
        raise BadConfig(
            f"EasyEdit cannot be imported ({error}); run from its folder, or add that to PYTHONPATH, with what its "
            "requirements.txt names installed."
        ) from error
    done: list[str] = []

    def put(place: str, name: str, ours: Callable[..., Any]) -> None:
        module = _module(_MODELS + place)
        if hasattr(module, name):
            setattr(module, name, ours)
            done.append(f"{place}.{name}")

    if statistics:
        for place in _WITH_COV:
            put(place, "get_cov", drop_in.get_cov)
        for place in _WITH_INVERSE:
            put(place, "get_inv_cov", drop_in.get_inv_cov)
    if targets:
        for place, name in _WITH_TARGETS.items():
            put(place, "compute_z", compute_z)
            module = _module(_MODELS + place)
            execute = getattr(module, name, None)
            if module is not None and execute is not None and not hasattr(execute, "__wrapped__"):
                put(place, name, _together(execute, module))
    if editors:
        table = getattr(_module("easyeditor.util.alg_dict"), "ALG_DICT", {})
        for name, ours in _EDITORS.items():
            if name in table:
                table[name] = ours
                done.append(f"ALG_DICT[{name!r}]")
    if not done:
        raise BadConfig("Nothing of EasyEdit is where it should be, so nothing was replaced; use its version of 2026.")
    log.info("replaced in EasyEdit: %s", ", ".join(done))
    return done


def _module(name: str) -> ModuleType | None:
    """A module of EasyEdit's, None where this version has none of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None
        raise


def _together(execute: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    """A function that writes a batch, with the batch's target vectors optimised together before."""

    @functools.wraps(execute)
    def executed(
        model: nn.Module, tok: Any, requests: Sequence[Fact], hparams: Any, cache_template: str | None = None
    ) -> Any:
        if cache_template is not None:  # of which some may lie in files already
            return execute(model, tok, requests, hparams, cache_template=cache_template)
        contexts = module.get_context_templates(model, tok)
        facts, layer = check_batch(requests), whole_numbers(hparams.layers, "hparams")[-1]
        vectors = _vectors(model, tok, facts, hparams, layer, contexts)
        names = [_name(model, layer, fact) for fact in facts]
        _ahead.update(zip(names, vectors, strict=True))
        try:
            return execute(model, tok, requests, hparams)
        finally:
            for name in names:
                _ahead.pop(name, None)

    return executed


def _name(model: nn.Module, layer: int, fact: EditRequest) -> tuple[int, int, str, str, str]:
    """What a vector depends on within one batch: between two of its functions EasyEdit spells a fact in other ways."""
    return (id(model), layer, fact.prompt, fact.subject, fact.target)


@isolated()
def compute_z(
    model: nn.Module,
    tok: Any,
    request: Mapping[str, Any],
    hparams: Any,
    layer: int,
    context_templates: Sequence[Sequence[str]],
) -> Tensor:
    """The target vector (d,) of one fact at a block's output, as MEMIT's function of this name returns it.

    It is the one that our MEMIT has, on the model as it is and with these contexts, from the store where it is there.
    See `fastmemit.targets`.

    Raises:
        BadConfig: A setting or a context that cannot be honoured.
    """
    (fact,) = check_batch([request])
    held = _ahead.get(_name(model, layer, fact))
    vector = _vectors(model, tok, [fact], hparams, layer, context_templates)[0] if held is None else held
    return vector.clone()


@isolated()
def _vectors(
    model: nn.Module,
    tok: Any,
    facts: Sequence[EditRequest],
    hparams: Any,
    layer: int,
    templates: Sequence[Sequence[str]],
) -> list[Tensor]:
    """The target vectors of facts, in the model's dtype on the block's device."""
    fields = fields_of(hparams)
    found = live(model, tok, fields.get("rewrite_module_tmp"))
    settings = target_settings(fields, layer, found.adapter)
    found.stack.look(map(found.adapter.weight_name, {*whole_numbers(fields.get("layers") or layer, "hparams"), layer}))
    made = stored_or_optimised(
        found.workspace.stored_targets,
        f"{found.stack.state()}/{found.store.identity['tokenizer']}",
        found.adapter,
        found.tokenizer,
        facts,
        [_context(template) for kind in templates for template in kind],
        settings,
        batch_tokens=1024 if found.adapter.device.type == "cpu" else 16384,
    )
    place = next(found.adapter.block(layer).parameters())
    dtype = place.dtype if place.dtype.is_floating_point else torch.float32
    return [target.vector.to(place.device, dtype) for target in made]


def _context(template: str) -> str:
    """The text before the prompt in a template of theirs, ``"Text. {}"``."""
    text = template.removesuffix("{}")
    if text == template or "{" in text or "}" in text:
        raise BadConfig(f"The context {template!r:.80} is no text with the prompt, {{}}, at its end; write it so.")
    return text
