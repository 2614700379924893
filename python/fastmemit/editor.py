"""The editor: a model, its statistics, and edits that come and go."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fastcov.files import StrPath, printable_logger
from fastcov.hooks import isolated
from fastmemit.answers import Reply, ask, compare, verdict
from fastmemit.data.corpora import Corpus
from fastmemit.delta import RECORD, Delta, model_record, read_record
from fastmemit.display import Described
from fastmemit.edits import Edit, EditStack
from fastmemit.errors import BadConfig, MissedFacts, WrongModel, counted
from fastmemit.files import cache_dir as _cache_dir
from fastmemit.methods import METHODS, EditConfig, PreservedKeys, PreservedText, ReadCache, Workspace, find_config, run
from fastmemit.models import find_adapter, load_model, save_model
from fastmemit.request import EditRequest, Fact, as_requests, check_batch
from fastmemit.statistics import Collection, Statistics, StatisticsStore
from fastmemit.targets import Target, TargetStore
from fastmemit.text import Contexts, chat_text, continue_texts, text_tokenizer

log = printable_logger(__name__)

REMEMBERED = 10_000  # replies of the unedited model


class Editor(Described):
    """Edits the facts of one causal language model.

    A fact is an `EditRequest`, a dictionary (see `EditRequest.from_dict`), or a triple (prompt, subject, target); where
    facts are asked for, one or many may be given.

    Args:
        model: The model, unedited.
        tokenizer: Its tokenizer, or the processor that holds it.
        module: The edited projection with ``{}`` for the layer, where the model's structure leaves doubt.
        seed: Seed for the contexts that the model writes, and for the order of the corpus.
        cache_dir: The folder for statistics and targets; None takes `fastmemit.files.cache_dir`.
        target_batch_tokens: Bound on the padded tokens of target vectors optimised together, and so on the memory; for
            None see `fastmemit.methods.Workspace`.
        progress: Show a progress bar for each long step.
        name: What to call the model in files; it identifies nothing.

    Attributes:
        adapter: The model as editing sees it.
        store: The model's second moments, see `fastmemit.statistics.StatisticsStore`.
        workspace: What its edits are made of, see `fastmemit.methods.Workspace`.

    Raises:
        UnknownArchitecture: The model's edited projection cannot be told.
        BadConfig: The tokenizer is none.
        WrongModel: The model was made under ``torch.inference_mode``.
        DamagedFile: What its folder says of edits in its weights cannot be read.
    """

    @isolated()
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        module: str | None = None,
        seed: int = 0,
        cache_dir: StrPath | None = None,
        target_batch_tokens: int | None = None,
        progress: bool = False,
        name: str | None = None,
    ) -> None:
        self.adapter = find_adapter(model, module)
        self.model = model = self.adapter.model  # without what is wrapped around it
        for place, parameter in model.named_parameters():
            if parameter.is_inference():
                raise WrongModel(
                    f"The weight {place} was made inside torch.inference_mode(), so torch allows neither an edit nor "
                    "a gradient outside of it; load the model before that block begins."
                )
        self.tokenizer = tokenizer = text_tokenizer(tokenizer)
        origin = str(getattr(model.config, "_name_or_path", "") or "model")
        path = name or origin
        self.name = shared_name(path)
        self.seed = seed
        self._stack = EditStack.of(model)
        self._folder = next((Path(each) for each in (path, origin) if Path(each).is_dir()), None)
        if self._folder is not None and not self._stack.record:
            self._stack.record = read_record(self._folder)
        self._replies: tuple[str, dict[EditRequest, Reply]] = ("", {})  # of which unedited model, and what they are
        folder = Path(cache_dir) if cache_dir is not None else _cache_dir()
        self.store = StatisticsStore(
            self.adapter, tokenizer, self._stack, folder, name=self.name, seed=seed, progress=progress
        )
        self.workspace = Workspace(
            self.adapter,
            tokenizer,
            self._stack,
            self.store,
            TargetStore(folder / "targets"),
            Contexts(model, tokenizer, seed),
            batch_tokens=target_batch_tokens,
            progress=progress,
        )

    @classmethod
    @isolated()
    def from_pretrained(
        cls,
        name: StrPath,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Editor:
        """Load a model by its name and make an editor of it.

        Args:
            name: A hub name, a local folder or ``.gguf`` file, or "smollm2".
            device: See `fastmemit.models.load_model`, also for dtype.
            dtype: float32, bfloat16, float16 or auto.
            trust_remote_code: Run code that comes with the model.
            settings: ``device_map`` and ``load_in`` (see there); arguments of `Editor`.

        Raises:
            ModelNotFound: Nothing of this name can be loaded.
        """
        more = {key: settings.pop(key, None) for key in ("device_map", "load_in")}
        more["trust_remote_code"] = trust_remote_code
        settings = {"name": os.fspath(name), **settings}
        inspect.signature(cls).bind(None, None, **settings)  # a mistyped one is told before the model is loaded
        model, tokenizer = load_model(os.fspath(name), device=device, dtype=dtype, **more)
        return cls(model, tokenizer, **settings)

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

    @property
    def record(self) -> dict[str, Any]:
        """What the folder that the model came from says of edits in its weights; see `fastmemit.delta.read_record`."""
        return self._stack.record

    @property
    def statistics(self) -> Statistics | None:
        """The statistics that edits use now; None before any were collected, found or taken."""
        return self.store.current

    def describe(self) -> str:
        """One line for people: the model, where it is, its statistics and edits."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        found = self.statistics
        statistics = "no statistics yet" if found is None else found.describe()
        edits = f"{counted(len(self.edits), 'edit')} in the weights" if self.edits else "unedited"
        return f"{self.name}, {self.adapter.n_layers} blocks in {dtype} on {self.adapter.device}; {statistics}; {edits}"

    def rows(self) -> list[dict[str, Any]]:
        """The edits in the weights, oldest first."""
        return [{"edit": number, "what": edit.describe()} for number, edit in enumerate(self.edits, 1)]

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
        corpus: StrPath | Corpus = "wikipedia",
        *,
        multiplier: float | Literal["auto"] = 10.0,
        layers: int | Sequence[int] | None = None,
        method: str | EditConfig | None = None,
        **more: Any,
    ) -> Statistics:
        """Collect the second moments that edits need, or find them where they were stored.

        Args:
            corpus: See `fastmemit.statistics.Collection`.
            multiplier: See there.
            layers: Which layers, or which one; None takes those of the method.
            method: Whose layers, where `layers` is None: see `config`. None: all methods'.
            more: Further fields of `Collection`: ``allow_fewer``, ``max_length``, ``field``, ``bos``, ``seed``,
                ``quartic`` (which settings in `method` that need it switch on), ``forward``.

        Returns:
            The statistics, which edits of this editor use from now on.

        Raises:
            WrongModel: The model is edited; statistics belong to the unedited one.
            UnknownArchitecture: Edits of these layers could not be computed with them.
            BadConfig: The multiplier is neither a number nor ``"auto"``, a field is not one of `Collection` or makes no
                sense, there are both layers and a method, or one that needs no statistics.
            FastmemitError: See `fastmemit.statistics.StatisticsStore.collect`.
            fastcov.FastcovError: See there.
        """
        layers = (layers,) if isinstance(layers, int) else layers
        if layers is not None and method is not None:
            raise BadConfig(f"There are layers ({list(layers)}) and a method; leave out one.")
        fields = [each.name for each in dataclasses.fields(Collection)][3:]
        for name in more.keys() - fields:
            near = difflib.get_close_matches(name, fields, 1)
            meant = f"did you mean {near[0]!r}? A collection" if near else "a collection"
            raise BadConfig(f"There is no field {name!r}; {meant} has {', '.join(fields)}.")
        if layers is None:
            configs = [self.config(m) for m in (METHODS if method is None else (method,))]
            layers = sorted({layer for config in configs if config.needs_statistics for layer in config.layers})
            if not layers:
                raise BadConfig(f"{configs[0].method} with these settings needs no statistics; edit at once.")
            more.setdefault("quartic", any(config.quartic for config in configs))
        spec = Collection(corpus, layers, multiplier, **more)
        self.store.budgets(spec)  # refuses before anything runs
        self.adapter.check_targets(layers)
        return self.store.collect(spec)

    @isolated()
    def contexts(self, method: str) -> tuple[str, ...]:
        """The texts put before prompts, written by the unedited model with the editor's seed.

        Raises:
            WrongModel: They were never written and the model is edited now.
        """
        with self._stack.lock:
            self._stack.settle()
            return self.workspace.contexts_of(method)

    @isolated()
    def targets(
        self, facts: Fact | Iterable[Fact], config: str | EditConfig, *, stored: bool = True, together: bool = False
    ) -> list[Target]:
        """Target vectors on the model as it is, from the store where they are in it; see `Workspace.targets`."""
        with self._stack.lock:
            self._stack.settle()
            return self.workspace.targets(as_requests(facts), self.config(config), stored=stored, together=together)

    @isolated()
    def plan(
        self,
        facts: Fact | Iterable[Fact],
        method: str | EditConfig = "memit",
        *,
        preserved: PreservedKeys | None = None,
        reads: ReadCache | None = None,
        targets: Mapping[EditRequest, Target] | None = None,
        preserve: PreservedText | StrPath | Iterable[str] | None = None,
        **overrides: Any,
    ) -> Edit:
        """Compute an edit and apply nothing; the weights are the same before and after.

        Args:
            facts: The facts, written together.
            method: One of `METHODS`; or settings such as `MemitConfig`, which are taken as they are in the place of the
                model's preset.
            preserved: Keys of earlier edits that this one shall preserve too, which those of this one join. None stands
                for none; for ENCORE, RLSEdit and AlphaEdit, to which they belong, for those of the edits in the weights
                that were computed here by one of these, or with such an object, and an empty object for none.
            reads: Where to cache what the unedited model shows, for further plans of these facts.
            targets: Target vectors by fact, in the place of those of the model as it is: those of the unedited model
                serve every method that shares them (`targets`), however many edits lie beneath.
            preserve: Text that this edit shall preserve beside C, such as prompts about neighbours: a file (a text a
                line), or texts, each token of which counts as much as a fact of the edit, and all of them no more than
                C; `PreservedText.from_text(..., weight=...)` for another weight.
            overrides: Settings of the method that replace the preset's, see `EditConfig`.

        Returns:
            The edit, not applied.

        Raises:
            BadConfig: See `config`.
            BadRequest: A request that cannot be carried out, or two that contradict each other.
            BadCorpus: The text to preserve cannot be read, or there is none.
            WrongModel: The preserved keys are of another editor's edits.
            fastcov.FastcovError: No statistics of the edited layers were precomputed.
        """
        config, text = self.config(method, **overrides), _preserved(preserve)
        with self._stack.lock:
            return run(config, self.workspace, check_batch(facts), preserved, reads, targets, text)

    @isolated()
    def edit(
        self,
        facts: Fact | Iterable[Fact],
        method: str | EditConfig = "memit",
        *,
        preserved: PreservedKeys | None = None,
        reads: ReadCache | None = None,
        targets: Mapping[EditRequest, Target] | None = None,
        preserve: PreservedText | StrPath | Iterable[str] | None = None,
        verify: bool = True,
        strict: bool = False,
        **overrides: Any,
    ) -> Edit:
        """Compute an edit and apply it.

        Args:
            facts: The facts, written together.
            method: See `plan`, also for preserved, reads and overrides.
            preserved: See `plan`.
            reads: See `plan`.
            targets: See `plan`.
            preserve: See `plan`.
            verify: Ask each fact before and after, as it is written: the answers are in `Edit.outcomes`, and one that
                is not what the model says is named in a warning. False for loops that score the model themselves.
            strict: Take the edit back if the model does not say all of its facts.
            overrides: See `plan`.

        Raises:
            MissedFacts: `strict`, and a fact is not what the model says.
            FastmemitError: See `plan`; on any error the weights are as they were.
        """
        config, text = self.config(method, **overrides), _preserved(preserve)
        batch = check_batch(facts)
        with self._stack.lock:
            edit = run(config, self.workspace, batch, preserved, reads, targets, text)
            before = self._asked_before(batch) if verify or strict else []
            if before:
                edit.remember(before)
            edit.apply()
            if before:
                try:
                    edit.outcomes = compare(batch, before, ask(self.adapter, self.tokenizer, batch))
                    if strict and not all(outcome.said for outcome in edit.outcomes):
                        said = verdict(edit.outcomes).replace("\n", "; ")
                        raise MissedFacts(f"{said}; the model is left unedited.")
                except BaseException:
                    edit.undo()
                    raise
        if not all(outcome.said for outcome in edit.outcomes):
            log.warning("%s", verdict(edit.outcomes))
        return edit

    @isolated()
    def ask(self, facts: Fact | Iterable[Fact]) -> list[Reply]:
        """What the model, as it is now, makes of facts, and what it says instead; see `Reply`.

        Raises:
            BadRequest: No token stands before an answer, or a prompt is longer than the model's context.
        """
        with self._stack.lock:
            self._stack.settle()
            return ask(self.adapter, self.tokenizer, as_requests(facts))

    def _asked_before(self, requests: list[EditRequest]) -> list[Reply]:
        """As `ask`, but what the unedited model replied earlier serves again."""
        if self._stack.edits:
            return ask(self.adapter, self.tokenizer, requests)
        model = self._stack.live_fingerprint
        if self._replies[0] != model or len(self._replies[1]) > REMEMBERED:
            self._replies = (model, {})
        known = self._replies[1]
        new = [request for request in dict.fromkeys(requests) if request not in known]
        if new:
            known.update(zip(new, ask(self.adapter, self.tokenizer, new), strict=True))
        return [known[request] for request in requests]

    @isolated()
    def load(self, path: StrPath, *, force: bool = False) -> Edit:
        """Read an edit from a file; it is not applied.

        Args:
            path: A file that `Edit.save` wrote.
            force: Take an edit that was made for another model, if its shapes fit.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedFile: The file is not what was written.
            BadUndo: The model was saved with this edit in its weights.
            WrongModel: It was made for another model.
        """
        delta = Delta.load(path)
        if self._stack.record:
            self._stack.check_new(delta)
        if not force and delta.model != self.fingerprint:
            raise WrongModel(
                f"The edit {os.fspath(path)!r} was made for the model {delta.model!s:.16} "
                f"({delta.provenance.get('model_name')}) but this one is {self.fingerprint:.16}; "
                "load that model, or pass force=True (--force) if you know that it fits."
            )
        delta.check(self.model)
        return Edit(delta, self._stack)

    @isolated()
    def generate(self, prompts: str | Sequence[str], new_tokens: int = 20, *, chat: bool = False) -> list[str]:
        """What the model, as it is now, goes on with behind each prompt: its most probable words.

        With `chat` a prompt is a user's turn in the chat template, and the answer ends where the model ends it.

        Raises:
            BadConfig: See `fastmemit.text.chat_text`.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        if chat:
            texts = [chat_text(self.tokenizer, text) for text in texts]
        with self._stack.lock:
            self._stack.settle()
            return continue_texts(self.model, self.tokenizer, texts, new_tokens, stop=chat)

    @isolated()
    def save_pretrained(self, folder: StrPath) -> None:
        """Write the model as it is now into a folder that ``from_pretrained`` loads.

        With an edited model go ``fastmemit.json``, which has the digests and facts of the edits in its weights, and a
        section of them in its card, README.md.

        Raises:
            WrongModel: Something else than edits has changed the model since it was first used.
        """
        from fastmemit.sharing.hub import model_card

        with self._stack.lock:
            self._stack.settle()
            unedited, record = self._stack.fingerprint, self._stack.record
            base = record["base"] if record else {"name": self.name, "fingerprint": unedited}
            entries = [*record.get("edits", ()), *(entry for edit in self.edits for entry in edit.delta.entries)]
            beside = {}
            if entries:
                card = model_card(base["name"], entries, self._folder)
                beside = {RECORD: model_record(base["name"], base["fingerprint"], entries), "README.md": card.encode()}
            save_model(self.model, self.tokenizer, folder, beside)


def _preserved(text: PreservedText | StrPath | Iterable[str] | None) -> PreservedText | None:
    return text if text is None or isinstance(text, PreservedText) else PreservedText.from_text(text)


def shared_name(path: str) -> str:
    """What a model is called in files that people share; folders are nobody else's business."""
    place = Path(path)
    if not place.exists():
        return path
    place = place.resolve()
    cached = re.fullmatch(r"models--(.+)", place.parent.parent.name)  # of the hub's cache, by its revision
    if place.parent.name == "snapshots" and cached:
        return cached[1].replace("--", "/")
    return place.name
