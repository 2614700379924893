"""The editor: a model, its statistics, and edits that come and go."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch

from fastcov.errors import printable_logger
from fastcov.hooks import isolated
from fastcov.sizing import LIMIT
from fastmemit.data.corpora import Corpus, open_corpus
from fastmemit.delta import Delta
from fastmemit.edits import Edit, EditStack
from fastmemit.errors import BadConfig, InferenceWeight, MissedFacts, WrongModel
from fastmemit.files import cache_dir
from fastmemit.methods import METHODS, PLANS, PRESERVING, EditConfig, PreservedKeys, ReadCache, find_config
from fastmemit.methods.base import EditKeys
from fastmemit.models import find_adapter, load_model, save_model
from fastmemit.outcomes import Reply, compare, verdict
from fastmemit.partial_forward import check_targets
from fastmemit.request import EditRequest, check_batch
from fastmemit.sampling import continue_texts
from fastmemit.sources import AUTO, Sources, precompute_auto, resolved
from fastmemit.statistics import Statistics, versions
from fastmemit.targets import Target
from fastmemit.tokens import text_tokenizer

__all__ = ["Edit", "Editor"]

log = printable_logger(__name__)


@isolated()
def plan_edit(
    sources: Sources,
    stack: EditStack,
    requests: Sequence[EditRequest],
    config: EditConfig,
    preserved: PreservedKeys | None = None,
    reads: ReadCache | None = None,
) -> tuple[Delta, EditKeys]:
    """Compute an edit; the weights are the same before and after.

    Args:
        sources: What it draws on.
        stack: The edits that are in the weights.
        requests: The facts, written together.
        config: The settings.
        preserved: Keys of earlier edits that this one shall preserve too; None stands for none, but for those of all
            edits in the weights where they belong to the method.
        reads: Where to keep what the unedited model shows.

    Returns:
        The delta, and the keys that it was written with.

    Raises:
        BadRequest: A request that cannot be carried out, or two that contradict each other.
        WrongModel: The preserved keys are of another editor's edits.
        fastcov.StoreMissing: No statistics of the edited layers were precomputed.
    """
    batch = check_batch(requests)
    if preserved is None and config.method in PRESERVING:
        preserved = sources.preserved
        unknown = len(stack.edits) - len(preserved.edits)
        if unknown:
            log.warning(
                "%d of the %d edits in the weights come from files, which hold no keys: %s does not preserve theirs",
                unknown,
                len(stack.edits),
                config.method,
            )
    earlier = () if preserved is None else preserved.edits
    for edit in earlier:
        stack.check(edit)
    work = sources.workspace(config, preserved, reads)
    used = sources.statistics_for(config.layers)
    factors = work.plan(PLANS[config.method], batch)
    provenance = {
        **sources.identity(),
        "method": config.method,
        "settings": resolved(work.adapter, used, config).as_dict(),
        "requests": [dataclasses.asdict(request) for request in batch],
        "statistics": dict(used.provenance),
        "contexts": list(sources.contexts(config.method)),
        "on_top_of": stack.digests(),
        "seed": sources.seed,
        "versions": versions(),
    }
    if preserved is not None:
        provenance["preserved"] = [edit.delta.digest() for edit in earlier]
    return Delta(factors, provenance), work.keys


@isolated()
def apply_edit(
    sources: Sources,
    stack: EditStack,
    requests: Sequence[EditRequest],
    config: EditConfig,
    preserved: PreservedKeys | None = None,
    reads: ReadCache | None = None,
    *,
    verify: bool = False,
    strict: bool = False,
) -> Edit:
    """Compute an edit and apply it; its keys join the preserved ones.

    Args and errors are those of `plan_edit`; on any of them the weights are as they were. `verify` asks the facts
    before and after (`Edit.outcomes`); `strict` does, too, and takes the edit back where the model does not say one of
    them.

    Raises:
        MissedFacts: That was so.
    """
    batch = check_batch(requests)
    delta, keys = plan_edit(sources, stack, batch, config, preserved, reads)
    before = sources.ask(batch, remember=True) if verify or strict else []
    edit = Edit(delta, stack).apply()
    if before:
        try:
            edit.outcomes = compare(batch, before, sources.ask(batch))
            if strict and not all(outcome.said for outcome in edit.outcomes):
                said = verdict(edit.outcomes).replace("\n", "; ")
                raise MissedFacts(f"{said}; the model is left unedited.")
        except BaseException:
            edit.undo()
            raise
    if preserved is not None:
        preserved.add(edit, keys)
    # In the computer's memory: most edits are never followed by one that asks for their keys.
    kept = {layer: [k.cpu() for k in blocks] for layer, blocks in keys.items()}
    sources.preserved.add(edit, kept)
    return edit


class Editor:
    """Edits the facts of one causal language model.

    Args:
        model: The model, unedited.
        tokenizer: Its tokenizer, or the processor that holds it.
        module: The edited projection with ``{}`` for the layer, where the model's structure leaves doubt.
        seed: Of the contexts that the model writes, and of the corpus's order.
        cache: The folder for statistics and targets; None takes `fastmemit.files.cache_dir`.
        target_batch_tokens: Bound on the padded tokens of target vectors optimised together, and so on the memory; None
            takes 1024 on a CPU, where like lengths count, else 16384.
        progress: Show a progress bar for each long step.
        name: What to call the model in files; it identifies nothing.

    Attributes:
        sources: What its edits draw on: statistics, contexts, target vectors, factors.

    Raises:
        UnknownArchitecture: The model's edited projection cannot be told.
        BadConfig: The tokenizer is none.
        InferenceWeight: The model was made under ``torch.inference_mode``.
    """

    @isolated()
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        module: str | None = None,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        target_batch_tokens: int | None = None,
        progress: bool = False,
        name: str | None = None,
    ) -> None:
        self.adapter = find_adapter(model, module)
        self.model = model = self.adapter.model  # without what is wrapped around it
        for place, parameter in model.named_parameters():
            if parameter.is_inference():
                raise InferenceWeight(
                    f"The weight {place} was made inside torch.inference_mode(), so torch allows "
                    "neither an edit nor a gradient outside of it; load the model before that block"
                    " begins."
                )
        self.tokenizer = tokenizer = text_tokenizer(tokenizer)
        self.seed = seed
        path = name or str(getattr(model.config, "_name_or_path", "") or "model")
        # The name goes into files that people share; folders are nobody else's business.
        self.name = Path(path).resolve().name if Path(path).exists() else path
        self._stack = EditStack.of(model)
        self.sources = Sources(
            self.adapter,
            tokenizer,
            self._stack,
            Path(cache) if cache is not None else cache_dir(),
            name=self.name,
            seed=seed,
            batch_tokens=target_batch_tokens,
            progress=progress,
        )

    @classmethod
    @isolated()
    def from_pretrained(
        cls,
        name: str,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Editor:
        """Load a model by its name and make an editor of it.

        Args:
            name: A hub name, a local folder, or "smollm2".
            device: See `fastmemit.models.load_model`, also for dtype.
            dtype: float32, bfloat16, float16 or auto.
            trust_remote_code: Run code that comes with the model.
            settings: ``device_map`` and ``load_in`` (see there); arguments of `Editor`.

        Raises:
            ModelNotFound: Nothing of this name can be loaded.
        """
        more = {key: settings.pop(key, None) for key in ("device_map", "load_in")}
        more["trust_remote_code"] = trust_remote_code
        model, tokenizer = load_model(name, device=device, dtype=dtype, **more)
        return cls(model, tokenizer, **{"name": name, **settings})

    @property
    def fingerprint(self) -> str:
        """The unedited model's fingerprint, of its weights as they are now.

        Raises:
            WrongModel: Something else has changed weights while edits are in them.
        """
        return self._stack.live_fingerprint

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that are in the weights now, oldest first."""
        return self._stack.edits

    def config(self, method: str | EditConfig = "memit", **overrides: Any) -> EditConfig:
        """The settings that `edit` would use: the model's preset with your overrides.

        Args:
            method: One of `METHODS`; or settings such as `MemitConfig`, which are taken as they are in the place of a
                preset.
            overrides: Settings of the method by name.

        Raises:
            BadConfig: An unknown method, a setting that is not the method's, a value out of range, or one that would
                change nothing.
            BadLayer: A layer that the model does not have.
        """
        return find_config(self.adapter, method, overrides)

    @isolated()
    def precompute(
        self,
        corpus: str | os.PathLike[str] | Corpus = "wikipedia",
        *,
        multiplier: float | Literal["auto"] = 10.0,
        layers: Sequence[int] | None = None,
        method: str | EditConfig | None = None,
        allow_fewer: bool = False,
        max_length: int | None = None,
        field: str = "text",
    ) -> Statistics:
        """Collect the second moments that edits need, or find them where they were kept.

        Args:
            corpus: ``"wikipedia"`` (from the hub), ``"builtin"``, ``"self"`` (text that the model writes), a text or
                JSON file, ``"hub:NAME[:CONFIG][@SPLIT]"``, or a `Corpus`.
            multiplier: d_m: each layer gets ``round(d_m * d_k)`` keys. ``"auto"`` collects until an edit's solution is
                near its limit, at most 10 (see `fastcov.sizing`).
            layers: Which layers; None takes those of the method.
            method: Whose layers, where `layers` is None: see `config`. None: all methods'.
            allow_fewer: Take a corpus that ends early for what it has.
            max_length: Cut documents at so many tokens; None takes the model's context (at most
                2048).  More, shorter documents make keys more independent.
            field: The text's field in a JSON corpus.

        Returns:
            The statistics, which edits of this editor use from now on.

        Raises:
            WrongModel: The model is edited; statistics belong to the unedited one.
            UnknownArchitecture: Edits of these layers could not be computed with them.
            fastcov.FastcovError: See `fastmemit.statistics.precompute`.
            BadCorpus: The corpus cannot be read.
            BadConfig: The multiplier is neither a number nor ``"auto"``, or there are both layers and a method.
        """
        if layers is not None and method is not None:
            raise BadConfig(f"There are layers ({list(layers)}) and a method; leave out one.")
        if layers is None:
            methods = METHODS if method is None else (method,)
            layers = sorted({i for m in methods for i in self.config(m).layers})
        most = LIMIT if isinstance(multiplier, str) else multiplier
        if isinstance(multiplier, str) and multiplier != AUTO:
            raise BadConfig(f"The multiplier {multiplier!r} is no number; give one, or 'auto'.")
        self.sources.largest_budget(layers, most)  # refuses before a corpus is looked for
        check_targets(self.adapter, layers)
        text = open_corpus(corpus, self.model, self.tokenizer, self.fingerprint, field)
        collect = precompute_auto if multiplier == AUTO else Sources.precompute
        return collect(self.sources, text, list(layers), most, allow_fewer, max_length)

    def use(self, found: Statistics) -> None:
        """Take these statistics for edits from now on.

        Raises:
            WrongModel: They are of another model.
        """
        self.sources.use(found)

    @isolated()
    def find_statistics(self, layers: Sequence[int] | None, multiplier: float | None = None) -> Statistics | None:
        """The newest kept statistics of this model for these layers (None: whichever), or None."""
        return self.sources.find(layers, multiplier)

    @isolated()
    def statistics_for(self, layers: Sequence[int]) -> Statistics:
        """The statistics that an edit of these layers would use.

        Raises:
            fastcov.StoreMissing: There are none.
        """
        return self.sources.statistics_for(layers)

    @isolated()
    def contexts(self, method: str) -> tuple[str, ...]:
        """The texts put before prompts, written by the unedited model with the editor's seed.

        Raises:
            WrongModel: They were never written and the model is edited now.
        """
        with self._stack.lock:
            self._stack.settle()
            return self.sources.contexts(method)

    @isolated()
    def targets(self, requests: Sequence[EditRequest], config: EditConfig) -> list[Target]:
        """Target vectors on the model as it is, from the store where they are in it."""
        with self._stack.lock:
            self._stack.settle()
            return self.sources.targets(requests, self.config(config))

    @isolated()
    def plan(
        self,
        requests: Sequence[EditRequest],
        method: str | EditConfig = "memit",
        *,
        preserved: PreservedKeys | None = None,
        reads: ReadCache | None = None,
        **overrides: Any,
    ) -> Delta:
        """Compute an edit and apply nothing; the weights are the same before and after.

        Args:
            requests: The facts, written together.
            method: One of `METHODS`; or settings such as `MemitConfig`, which are taken as they are in the place of the
                model's preset.
            preserved: Keys of earlier edits that this one shall preserve too. None stands for none; for ENCORE and
                AlphaEdit, to which they belong, for those of all edits that are in the weights now, and an empty object
                for none.
            reads: Where to keep what the unedited model shows, for further plans of these facts.
            overrides: Settings of the method that replace the preset's, see `EditConfig`.

        Raises:
            BadConfig: See `config`.
            BadRequest: A request that cannot be carried out, or two that contradict each other.
            WrongModel: The preserved keys are of another editor's edits.
            fastcov.StoreMissing: No statistics of the edited layers were precomputed.
        """
        config = self.config(method, **overrides)
        with self._stack.lock:
            return plan_edit(self.sources, self._stack, requests, config, preserved, reads)[0]

    @isolated()
    def edit(
        self,
        requests: Sequence[EditRequest],
        method: str | EditConfig = "memit",
        *,
        preserved: PreservedKeys | None = None,
        reads: ReadCache | None = None,
        verify: bool = True,
        strict: bool = False,
        **overrides: Any,
    ) -> Edit:
        """Compute an edit and apply it; its keys join the preserved ones.

        Args:
            requests: The facts, written together.
            method: See `plan`, also for preserved, reads and overrides.
            preserved: See `plan`.
            reads: See `plan`.
            verify: Ask each fact before and after, as it is written: the answers are in `Edit.outcomes`, and one that
                is not what the model says is named in a warning. False for loops that score the model themselves.
            strict: Take the edit back if the model does not say all of its facts.
            overrides: See `plan`.

        Raises:
            MissedFacts: `strict`, and a fact is not what the model says.
            FastmemitError: See `plan`; on any error the weights are as they were.
        """
        config = self.config(method, **overrides)
        with self._stack.lock:
            edit = apply_edit(
                self.sources, self._stack, requests, config, preserved, reads, verify=verify, strict=strict
            )
        if not all(outcome.said for outcome in edit.outcomes):
            log.warning("%s", verdict(edit.outcomes))
        return edit

    @isolated()
    def ask(self, requests: Sequence[EditRequest]) -> list[Reply]:
        """What the model, as it is now, makes of facts, and what it says instead; see `Reply`.

        Raises:
            BadRequest: No token stands before an answer, or a prompt is longer than the model's context.
        """
        with self._stack.lock:
            self._stack.settle()
            return self.sources.ask(requests)

    @isolated()
    def load(self, path: str | os.PathLike[str], *, force: bool = False) -> Edit:
        """Read an edit from a file; it is not applied.

        Args:
            path: A file that `Edit.save` wrote.
            force: Take an edit that was made for another model, if its shapes fit.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedFile: The file is not what was written.
            WrongModel: It was made for another model.
        """
        delta = Delta.load(path)
        if not force and delta.model != self.fingerprint:
            raise WrongModel(
                f"The edit {os.fspath(path)!r} was made for the model {delta.model!s:.16} "
                f"({delta.provenance.get('model_name')}) but this one is {self.fingerprint:.16}; "
                "load that model, or pass force=True (--force) if you know that it fits."
            )
        delta.check(self.model)
        return Edit(delta, self._stack)

    def applied(self, edit: Edit) -> AbstractContextManager[Edit]:
        """The model with an edit inside the block, and as before behind it.

        An edit that is applied already stays so inside and is undone behind; of several blocks with one edit the
        outermost undoes it. If something is raised inside, later edits that lie on this one are undone with it. Other
        threads that want to use the model wait until the end of the block.

        Raises:
            WrongModel: The edit belongs to another editor, whose model it would change.
            BadUndo: At the end of the block, a later edit lies on this one.
        """
        return self._stack.block(edit)

    @isolated()
    def generate(self, prompts: Sequence[str], new_tokens: int = 20) -> list[str]:
        """What the model, as it is now, goes on with: its most probable words."""
        with self._stack.lock:
            self._stack.settle()
            return continue_texts(self.model, self.tokenizer, prompts, new_tokens)

    @isolated()
    def save_model(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as it is now into a folder that ``from_pretrained`` loads.

        Raises:
            WrongModel: Something else than edits has changed the model since it was first used.
        """
        with self._stack.lock:
            self._stack.settle()
            _ = self._stack.fingerprint
            save_model(self.model, self.tokenizer, folder)
