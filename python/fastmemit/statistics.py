"""Second moments of a model's keys: collected once, stored on disk, found by what they are of, factored for edits."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import transformers
from torch import Tensor

import fastcov
from fastcov import CholeskyFactor, NullSpace
from fastcov.files import StrPath
from fastcov.hooks import isolated
from fastcov.kernels.cpu import why_no_bfloat
from fastcov.linalg import FactorCache, place_of_float64
from fastcov.moments import SHRINKAGES
from fastcov.sizing import LIMIT, StoppingRule, checkpoints
from fastcov.throughput import Throughput
from fastmemit import parallel
from fastmemit.data.corpora import Corpus, corpus_batches, open_corpus, tokens_per_batch
from fastmemit.display import Described, bar
from fastmemit.edits import EditStack
from fastmemit.errors import BadConfig, UnknownArchitecture, WrongModel, counted
from fastmemit.files import (
    CHECKPOINTS,
    alone,
    check_moment,
    common_provenance,
    compare_provenance,
    copy_moments,
    essence,
    home_of,
    is_stored,
    lock_of,
    provenance_of,
    provenances_in,
    remove_leftovers,
    remove_stale,
    shared_folder,
    shared_of,
    stored_modules,
    told_apart,
    write_moments,
)
from fastmemit.models import ModelAdapter, tokenizer_fingerprint

if TYPE_CHECKING:
    from fastmemit.methods.config import AlphaEditConfig, Config, CovarianceConfig, EditConfig

log = logging.getLogger(__name__)

AUTO = "auto"


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import fastmemit

    return {
        "fastmemit": fastmemit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Collection:
    """What is collected: the keys of which layers, how many, of which text.

    Attributes:
        corpus: ``"wikipedia"`` (from the hub), ``"builtin"``, ``"self"`` (text that the model writes), a text or JSON
            file, ``"hub:NAME[:CONFIG][@SPLIT]"``, or a `Corpus`.
        layers: The layers whose keys are wanted.
        multiplier: d_m: each layer gets exactly ``round(d_m * d_k)`` keys. ``"auto"`` collects until an edit's solution
            is near its limit, at most 10 (see `fastcov.sizing`).
        allow_fewer: Take a corpus that ends early for what it has.
        max_length: Cut documents at so many tokens; None takes the model's context (at most 2048).
        field: Where the text is in a JSON corpus.
        bos: Whether the first position of a document is a key. In most models it draws attention that has nowhere else
            to go, and its key is unlike all others.
        seed: Seed for the order of the documents; None takes that of the store.
        quartic: Whether to sum ``||k||^4`` too, which ``shrinkage="ledoit-wolf"`` needs; 0.4 to 1.6 % of summing.
        forward: ``"bfloat16"`` multiplies in bfloat16 as the model runs, on processors that do so faster; sums are as
            they are. None runs the model in its own dtype.

    Raises:
        BadConfig: The multiplier is a text but ``"auto"``; `max_length` or the seed is no whole number; or `forward` is
            something else.
    """

    corpus: StrPath | Corpus
    layers: Sequence[int]
    multiplier: float | Literal["auto"] = 10.0
    allow_fewer: bool = False
    max_length: int | None = None
    field: str = "text"
    bos: bool = True
    seed: int | None = None
    quartic: bool = False
    forward: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.multiplier, str) and self.multiplier != AUTO:
            raise BadConfig(f"The multiplier {self.multiplier!r} is no number; give one, or 'auto'.")
        if self.forward not in (None, "bfloat16"):
            raise BadConfig(
                f"forward must be 'bfloat16' but is {self.forward!r}; leave it out for the model's own dtype."
            )
        for name in ("allow_fewer", "bos", "quartic"):
            object.__setattr__(self, name, bool(getattr(self, name)))  # as files have it
        for name in ("max_length", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise BadConfig(f"{name} must be a whole number but is {value!r}.")
            object.__setattr__(self, name, None if value is None else int(value))


@dataclass(frozen=True, repr=False)
class Statistics(Described):
    """Stored second moments of one model on one corpus.

    Attributes:
        paths: Module name -> file.
        provenance: What all of them share: model, corpus, seed, multiplier, budget, keys, context.
        throughput: How fast they were collected, where that was just now and it was to be measured.
    """

    paths: dict[str, Path]
    provenance: dict[str, Any]
    throughput: Throughput | None = dataclasses.field(default=None, compare=False, repr=False)

    def second_moment(self, module: str) -> Tensor:
        """C of one module, (d_k, d_k) in the dtype of its sum; errors are those of `moment`."""
        return self.moment(module).second_moment

    def moment(self, module: str) -> fastcov.SecondMoment:
        """The moment of one module, on the CPU, every byte of the file verified.

        Raises:
            FastcovError: It was not precomputed for this module.
            StoreDamaged: The file is not what was written.
            StoreMismatch: The file is of something else than it was when it was found.
        """
        if module not in self.paths:
            raise fastcov.FastcovError(
                f"There is no second moment of {module} among the precomputed "
                f"({', '.join(self.paths)}); precompute its layer too."
            )
        path = self.paths[module]
        said = provenance_of(path)
        compare_provenance(path, said, {**shared_of(self.provenance), "module": module})
        moment, _ = fastcov.load_moment(path, said)
        check_moment(path, said, moment)
        return moment

    @property
    def keys(self) -> int:
        """How many keys a module has, the widest if they differ."""
        return int(self.provenance.get("keys", self.provenance["budget"]))

    def multiplier_of(self, d_k: int) -> float:
        """How many keys there are, as a multiple of a width."""
        return min(fastcov.budget(float(self.provenance["multiplier"]), d_k), self.keys) / d_k

    def resolved(self, adapter: ModelAdapter, config: Config) -> Config:
        """The settings with the relative ridge that they come to, one for all layers.

        Layers of unlike widths may have unlike multipliers where the corpus ended early: the widest one has fewest keys
        for its width and decides.
        """
        if not config.needs_statistics:
            return config.resolved(float("inf"))
        return config.resolved(self.multiplier_of(max(map(adapter.d_k, config.layers))))

    @property
    def exhausted(self) -> bool:
        """Whether the corpus ended before the budget was met."""
        return self.keys < int(self.provenance["budget"])

    def describe(self) -> str:
        """One line for people: corpus, multiplier, keys."""
        p = self.provenance
        fewer = f" of the {p['budget']} wanted" if self.exhausted else ""
        first = "" if p.get("bos", True) else ", no first positions"
        narrow = f", {p['forward']} forward passes" if "forward" in p else ""
        return f"corpus {p['corpus']['name']}, multiplier {p['multiplier']:g}, {self.keys} keys{fewer}{first}{narrow}"


class StatisticsStore:
    """The second moments of one model in a folder, those in use, and the factors that edits solve with.

    Its folder has ``statistics`` and ``snapshots`` in it; the name there identifies nothing. The seed is for the order
    of documents where a collection has none.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: Any,
        stack: EditStack,
        folder: StrPath,
        *,
        name: str = "model",
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self._adapter, self._tokenizer, self._stack = adapter, tokenizer, stack
        self._folder, self._name, self._seed, self._progress = Path(folder), name, seed, progress
        self._tokenizer_is = tokenizer_fingerprint(tokenizer)
        self._held = FactorCache()
        self.current: Statistics | None = None  # in use, if any are
        self.checkpoint_seconds: float | None = None  # between two of a pass, see `fastcov.Checkpoint`

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model and its tokenizer from others, for provenance."""
        return {"model": self._stack.fingerprint, "model_name": self._name, "tokenizer": self._tokenizer_is}

    @property
    def _home(self) -> Path:
        return self._folder / "statistics" / self._stack.fingerprint[:16]

    # -- collecting -------------------------------------------------------------------------------

    @isolated()
    def collect(self, spec: Collection, *, after: Statistics | None = None, aside: bool = False) -> Statistics:
        """Collect the second moments of several layers in one pass, unless they are stored already, and use them.

        A pass that was killed resumes at its last checkpoint, to the same bits. Of two processes that want the same
        statistics one collects and the other waits. Inside `fastmemit.parallel.together` the batches are divided.

        Args:
            spec: What is collected.
            after: Statistics of the same text, with a smaller multiplier: only the keys beyond theirs are collected,
                and added to them. How the sum was reached is part of what it is, because it decides on the last bits.
            aside: Store them where `find` does not look: an experiment with few keys must not become what the next edit
                uses.

        Raises:
            WrongModel: The model is edited; statistics belong to the unedited one.
            UnknownArchitecture: Padding changes the model's keys.
            fastcov.BadInput: The multiplier is not above 0, or the corpus has no token.
            BadConfig: There is no layer, `max_length` is below 1 or above the model's context, `after` has as large
                a multiplier, or `forward` cannot serve this model or would be slower here.
            BadLayer: A layer does not exist.
            BudgetNotMet: The corpus is too short, and `allow_fewer` is not set.
            BadCorpus: The corpus cannot be read.
            StoreDamaged: A stored file's header is not what was written.
            StoreMismatch: A stored file is of something else than its folder says.
            fastcov.FastcovError: An activation is NaN or infinite, or another process failed.
            OSError: A file cannot be written; those that were written are whole.
        """
        budgets = self.budgets(spec)
        model, fingerprint = self._adapter.model, self._stack.fingerprint
        corpus = open_corpus(spec.corpus, model, self._tokenizer, fingerprint, spec.field)
        spec = dataclasses.replace(spec, corpus=corpus)
        if spec.multiplier == AUTO:
            return self._collect_auto(spec)
        shared: dict[str, Any] = {
            **self.identity,
            "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
            "seed": self._seed if spec.seed is None else spec.seed,
            "multiplier": float(spec.multiplier),
            "context": self._context(spec.max_length),
            "allow_fewer": spec.allow_fewer,
            **({} if spec.bos else {"bos": False}),
            **({"quartic": True} if spec.quartic else {}),
            **({} if spec.forward is None else {"forward": spec.forward}),
            **({} if after is None else {"snapshots": _snapshots(after, float(spec.multiplier))}),
        }
        home = home_of(self._folder / ("snapshots" if aside else "statistics") / fingerprint[:16], shared)
        paths = {name: home / f"{name}.safetensors" for name in budgets}
        throughput: Throughput | None = None
        if parallel.CURRENT.get() is None and all(is_stored(path, shared, n, budgets[n]) for n, path in paths.items()):
            remove_leftovers(home)
        else:
            if spec.forward is not None:
                _check_forward(self._adapter)
            throughput = self._fill(home, shared, budgets, corpus, after)
        said = [provenance_of(path) for path in paths.values()]
        for (name, path), about in zip(paths.items(), said, strict=True):
            compare_provenance(path, about, {**shared, "module": name, "budget": budgets[name]})
        found = Statistics(paths, common_provenance(said), throughput)
        self.use(found)
        return found

    def budgets(self, spec: Collection) -> dict[str, int]:
        """Module -> how many keys it gets at most, if they can be collected now; errors are those of `collect`."""
        if self._stack.edits:
            raise WrongModel(
                f"{counted(len(self._stack.edits), 'edit is', 'edits are')} in the weights, and statistics "
                "belong to the unedited model; undo them first."
            )
        if not spec.layers:
            raise BadConfig("There is no layer to precompute; name at least one.")
        most, adapter = LIMIT if isinstance(spec.multiplier, str) else spec.multiplier, self._adapter
        for layer in spec.layers:
            adapter.check_layer(layer)
        return {adapter.projection_name(each): fastcov.budget(most, adapter.d_k(each)) for each in spec.layers}

    def _context(self, max_length: int | None) -> int:
        limit = self._adapter.max_context
        if max_length is None:
            return limit
        if not 1 <= max_length <= limit:
            raise BadConfig(f"max_length must be from 1 to the model's context of {limit} tokens but is {max_length}.")
        return max_length

    def _fill(
        self, home: Path, shared: dict[str, Any], budgets: dict[str, int], corpus: Corpus, after: Statistics | None
    ) -> Throughput | None:
        """Collect what a folder of statistics lacks; how fast it went, if that was measured."""
        processes = parallel.CURRENT.get()
        first = processes is None or processes.first
        paths = {name: home / f"{name}.safetensors" for name in budgets}
        with alone(lock_of(home), "collecting the same statistics") if first else nullcontext(False) as ours:
            shared_folder(home)
            if ours:
                remove_stale(home)
            # Whoever was waited for may have made some of them.
            missing = [name for name, path in paths.items() if not is_stored(path, shared, name, budgets[name])]
            made, part, save = versions(), {}, fastcov.save_moment
            if processes is not None:
                missing = parallel.agreed(processes, {**essence(shared), "modules": list(paths)}, missing)
                made["processes"] = str(processes.size)  # which decides on last bits
                # Each keeps its own part; it does not matter how far the others were.
                part["process"], save = f"{processes.rank} of {processes.size}", partial(parallel.save_once, processes)
            held = {} if after is None else {name: after.moment(name) for name in missing}
            text = {  # of all modules: the batches do not depend on which are there already
                "tokens": max(budgets.values()),
                "start": max((moment.count for moment in held.values()), default=0),
            }
            digest = hashlib.sha256("\n".join([*sorted(budgets), *part.values()]).encode()).hexdigest()[:12]
            checkpoint = fastcov.Checkpoint(
                home / CHECKPOINTS.replace("*", digest),
                identity={
                    **essence(shared),
                    "versions": made,
                    **part,
                    **text,
                    "batch_tokens": tokens_per_batch(self._adapter.device),
                    "device": str(self._adapter.device),
                },
                seconds=self.checkpoint_seconds,
            )
            throughput = Throughput() if self._progress and missing else None
            if missing and (after is None or not after.exhausted):
                log.info("collecting the second moments of %s", ", ".join(missing))
                wanted = {n: budgets[n] - (held[n].count if n in held else 0) for n in missing}
                more = self._collected(wanted, corpus, shared, text, checkpoint, throughput)
                held.update({n: held[n].merge(m) if n in held else m for n, m in more.items()})
                if throughput is not None:
                    log.info("%s", throughput)
            for name, moment in held.items():
                own = {**shared, "module": name, "budget": budgets[name], "keys": moment.count, "versions": made}
                save(paths[name], moment, own)
            checkpoint.remove()
            if ours:
                remove_stale(home, useless_too=True)
        return throughput

    def _collected(
        self,
        budgets: dict[str, int],
        corpus: Corpus,
        shared: dict[str, Any],
        text: dict[str, int],
        checkpoint: fastcov.Checkpoint,
        throughput: Throughput | None,
    ) -> dict[str, fastcov.SecondMoment]:
        """Module -> moment of so many keys; nothing where the corpus ends just where the keys do that are held."""
        adapter, allow_fewer = self._adapter, shared["allow_fewer"]
        adapter.look()
        if adapter.traits.right_padding == "none":
            raise UnknownArchitecture(
                f"{type(adapter.model).__name__} gives a text other keys where it stands beside longer ones in a "
                "batch, so its statistics cannot be collected in batches."
            )
        causal = adapter.traits.causal and adapter.traits.right_padding == "unmasked"
        forward = torch.bfloat16 if "forward" in shared else None
        if throughput is not None:
            throughput.measure(adapter.model, adapter.device, forward)  # before a thread begins to read
        total, shown = text["tokens"], throughput is not None
        for attempt in (1, 2):
            try:
                with (
                    bar("keys", total, True) if shown else nullcontext() as keys,
                    bar("tokens read", total, True) if shown else nullcontext() as reading,
                    _counted_from(text["start"], corpus, allow_fewer),
                    corpus_batches(
                        corpus,
                        self._tokenizer,
                        adapter.device,
                        context=shared["context"],
                        seed=shared["seed"],
                        skip=int(not shared.get("bos", True)),
                        reading=reading,
                        **text,
                    ) as batches,
                ):

                    def progress(done: int) -> None:
                        if keys is not None and throughput is not None:
                            keys.note(throughput.rate())
                            keys(done)

                    return fastcov.collect_moments(
                        adapter.model,
                        list(budgets),
                        batches,
                        budgets,
                        allow_fewer=allow_fewer,
                        quartic=shared.get("quartic", False),
                        progress=progress,
                        throughput=throughput,
                        causal=causal,
                        checkpoint=checkpoint,
                        processes=parallel.CURRENT.get(),
                        forward=forward,
                    )
                return {}  # the corpus ended, which `_counted_from` took
            except (fastcov.FailedElsewhere, fastcov.ProcessLost):  # this process's part is sound
                raise
            except fastcov.StaleCheckpoint as error:
                checkpoint.remove()
                if attempt == 2:
                    raise
                log.warning("%s It is not used, and collecting begins anew.", error)
            except fastcov.FastcovError:  # of the text or the model: to go on would end the same way
                checkpoint.remove()
                raise
        raise AssertionError("unreachable")

    def _collect_auto(self, spec: Collection) -> Statistics:
        """Collect until the stopping rule of every layer says that it is enough, at most `LIMIT` keys a width.

        The sum is stored at every look, so an interrupted pass resumes at the last one, and the looks are the same the
        next time. See `fastcov.sizing` for what is looked at.
        """
        rules: dict[str, StoppingRule] = {}
        before: Statistics | None = None
        d_k = max(map(self._adapter.d_k, spec.layers))
        for keys in checkpoints(d_k, LIMIT):
            step = dataclasses.replace(spec, multiplier=keys / d_k)
            after = self.collect(step, after=before, aside=True)
            rules = rules or {name: StoppingRule(limit=LIMIT) for name in after.paths}
            enough = [rule.update(after.moment(name)) for name, rule in rules.items()]
            before = after
            if all(enough) or after.exhausted:
                break
        assert before is not None
        for name, rule in rules.items():
            if not rule.converged:
                log.warning(
                    "with %d keys an edit of %s still disturbs about %.2f times more than it must; a "
                    "multiplier above %g, or more and shorter documents, would lower that",
                    before.keys, name, rule.looks[-1].excess, LIMIT,
                )  # fmt: skip
        return self.keep(before)

    def keep(self, found: Statistics) -> Statistics:
        """Put statistics that lie aside where edits find them, and use them."""
        kept = Statistics(copy_moments(found.paths, found.provenance, self._home), found.provenance, found.throughput)
        self.use(kept)
        return kept

    def add(
        self, shared: dict[str, Any], moments: Mapping[str, tuple[fastcov.SecondMoment, dict[str, Any]]]
    ) -> Statistics:
        """Store moments made elsewhere, by module with what each alone is of, over former ones, and use them."""
        paths = write_moments(self._home, {**self.identity, **shared}, moments)
        found = Statistics(paths, common_provenance([provenance_of(path) for path in paths.values()]))
        self.use(found)
        return found

    # -- using ------------------------------------------------------------------------------------

    def use(self, found: Statistics) -> None:
        """Take these statistics for edits from now on; a WrongModel if they are of another one."""
        if found is self.current:
            return
        if found.provenance.get("model") != self._stack.fingerprint:
            raise WrongModel(
                f"The statistics are of the model {found.provenance.get('model')!s:.16} but this "
                f"one is {self._stack.fingerprint:.16}; precompute them for this model."
            )
        self.current = found
        self._held.clear()

    @isolated()
    def find(
        self,
        layers: Sequence[int] | None,
        multiplier: float | None = None,
        *,
        corpus: str | None = None,
        context: int | None = None,
        quartic: bool = False,
    ) -> Statistics | None:
        """The newest stored statistics of this model with all these layers (None: whichever), or None.

        Of a multiplier, of a corpus by its fingerprint and of documents cut at `context` tokens, where they are given;
        with `quartic` rather older ones that were collected with fourth powers. Where others would do that are of
        something else, a warning says which are taken.

        Raises:
            StoreDamaged: The header of a file that would be taken is not what was written, or lacks a field.
            StoreMismatch: A file that would be taken is of something else than its place says.
        """
        modules = None if layers is None else [*map(self._adapter.projection_name, layers)]
        wanted = {"multiplier": multiplier, "corpus": corpus, "context": context, "tokenizer": self._tokenizer_is}
        found: list[Statistics] = []
        homes = filter(Path.is_dir, self._home.glob("*"))
        for home in sorted(homes, key=lambda home: home.stat().st_mtime_ns, reverse=True):
            names = stored_modules(home) if modules is None else modules
            paths = {name: home / f"{name}.safetensors" for name in names}
            if not paths or not all(path.is_file() for path in paths.values()):
                continue
            try:
                said = provenances_in(home, names, self._stack.fingerprint)
            except (fastcov.StoreDamaged, fastcov.StoreMismatch):
                if found:  # newer ones are there, and sound
                    continue
                raise
            own = essence(said[0])
            if all(value is None or own.get(name) == value for name, value in wanted.items()):
                found.append(Statistics(paths, common_provenance(said)))
        found.sort(key=lambda each: quartic and not each.provenance.get("quartic"))  # else as they are
        if found and (apart := told_apart([each.provenance for each in found])):
            log.warning(
                "%d stored statistics have these layers; taken are those of %s; to take others, name them "
                "(--corpus, --multiplier, --max-length; in Python by precompute)", len(found), apart,
            )  # fmt: skip
        return found[0] if found else None

    @isolated()
    def covering(self, layers: Sequence[int], *, quartic: bool = False) -> Statistics:
        """Statistics with these layers: those in use, else the newest stored, used from now on, else FastcovError."""
        names = {self._adapter.projection_name(layer) for layer in layers}
        if self.current is None or not names <= self.current.paths.keys():
            found = self.find(layers, quartic=quartic)
            if found is None:
                raise fastcov.FastcovError(
                    f"There are no second moments of the layers {list(layers)} of {self._name}; "
                    "call precompute first (fastmemit precompute)."
                )
            self.use(found)
        assert self.current is not None
        return self.current

    def needed(self, config: EditConfig) -> Statistics:
        """Those that settings solve with: see `covering`; empty ones where nothing is collected."""
        return self.covering(config.layers, quartic=config.quartic) if config.needs_statistics else Statistics({}, {})

    def factor(self, config: CovarianceConfig, layer: int) -> CholeskyFactor:
        """The factor of a layer's ``A = w C + ridge I`` in float64, made where it is not held.

        It is on the weight's device or, where that has no room, on the CPU. C is shrunk first where the settings say
        so, and the relative ridge joins the ridge. Errors are those of `fastcov.factorize`, of the shrinkage and of the
        second moment's file.
        """
        used = self.needed(config)
        d_k = self._adapter.d_k(layer)
        weight = float(d_k) if config.weight is None else config.weight
        relative = used.resolved(self._adapter, config).relative_ridge or 0.0
        kind = (config.weight, config.ridge, relative, config.shrinkage, config.covariance)
        found, place = self._held.get((layer, kind)), self._place(layer)
        if found is None:
            place = self._held.make_room(config.layers, kind, place, d_k, 2)  # beside A a triangle in float32
        if not isinstance(found, CholeskyFactor) and not config.needs_statistics:
            eye = torch.eye(d_k, dtype=torch.float64, device=place)
            scaled = fastcov.regularised(eye, weight, config.ridge, relative_ridge=relative)
            found = CholeskyFactor(scaled.sqrt_(), 0.0)
        elif not isinstance(found, CholeskyFactor):
            moment = used.moment(self._adapter.projection_name(layer))
            shrinkage, moved = SHRINKAGES[config.shrinkage](moment), moment.to(place)
            matrix = fastcov.regularised(moved, weight, config.ridge, relative_ridge=relative, shrinkage=shrinkage)
            del moment, moved  # its sum is not held beside the factorisation
            if relative and config.relative_ridge is None:
                log.info(
                    "C of layer %d has few keys (%s) and gets a ridge of %g of its mean diagonal; "
                    "relative_ridge=0 leaves it as it is",
                    layer, used.describe(), relative,
                )  # fmt: skip
            found = fastcov.factorize(matrix, in_place=True)
        self._held[layer, kind] = found
        self._held.move_to_end((layer, kind))
        return found

    def null_space(self, config: AlphaEditConfig, layer: int) -> NullSpace:
        """The null space of a layer's C in float64, for AlphaEdit: on the weight's device, or as in `factor`.

        A symmetric eigenproblem of the key width: about a second at 1,536 on one core, and in time as the width's cube.
        It takes four to five matrices of float64 while it is made, and after that the basis, at most one.
        """
        used, relative = self.covering(config.layers), config.null_relative
        kind = (config.null_threshold if relative is None else 0.0, relative)
        found = self._held.get((layer, kind))
        if not isinstance(found, NullSpace):
            place = self._held.make_room(config.layers, kind, self._place(layer), self._adapter.d_k(layer), 5)
            C = used.second_moment(self._adapter.projection_name(layer))
            found = fastcov.null_space(C.to(place), threshold=config.null_threshold, relative=relative)
            d_k = found.basis.shape[0]
            say = log.warning if found.rank == d_k else log.info
            say(
                "%d of %d directions of C of layer %d are below %g and count as its null space%s",
                found.rank, d_k, layer, found.threshold, ": edits preserve nothing" if found.rank == d_k else "",
            )  # fmt: skip
        self._held[layer, kind] = found
        self._held.move_to_end((layer, kind))
        return found

    def prepare(self, config: EditConfig) -> dict[int, float]:
        """Make what the layers' solves need; layer -> the jitter of its factor, if there is one."""
        if not hasattr(config, "covariance"):  # no A
            for layer in config.layers if config.needs_statistics else ():
                self.null_space(cast("AlphaEditConfig", config), layer)
            return {}
        return {layer: self.factor(cast("CovarianceConfig", config), layer).jitter for layer in config.layers}

    def _place(self, layer: int) -> torch.device:
        """Where a layer's statistics are worked on: with its weight, where there is float64."""
        return place_of_float64(self._adapter.weight(layer).device)


def _check_forward(adapter: ModelAdapter) -> None:
    """Refuse (BadConfig) forward passes in bfloat16 where they cannot serve or would be slower."""
    dtypes = {weight.dtype for weight in adapter.model.parameters() if weight.is_floating_point()}
    if adapter.device.type != "cpu" or dtypes != {torch.float32}:
        held = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise BadConfig(
            f"forward='bfloat16' is for a model in float32 on the CPU and this one is in {held} on {adapter.device}; "
            "leave it out."
        )
    if (reason := why_no_bfloat()) is not None:
        raise BadConfig(f"forward='bfloat16' would be slower here than float32 ({reason}); leave it out.")


def _snapshots(after: Statistics, multiplier: float) -> list[float]:
    """The smaller multipliers at which a sum was stored on the way to this one."""
    smaller = float(after.provenance["multiplier"])
    if smaller >= multiplier:
        raise BadConfig(
            f"Statistics of multiplier {smaller:g} cannot be continued to {multiplier:g}; give a larger multiplier."
        )
    return [*after.provenance.get("snapshots", []), smaller]


@contextmanager
def _counted_from(start: int, corpus: Corpus, allow_fewer: bool) -> Iterator[None]:
    """Say of a corpus that ends how many keys it has in all, not beyond those held already."""
    try:
        yield
    except fastcov.BudgetNotMet as error:
        if start == 0:
            raise
        if allow_fewer:  # it ends just where the keys do that are held
            return
        found = start + getattr(error, "found", 0)
        raise fastcov.BudgetNotMet(
            f"The corpus {corpus.name} has {found} keys a layer, fewer than were wanted; give more "
            "text, smaller multipliers, or allow_fewer=True.",
            found=found,
            wanted=start + getattr(error, "wanted", 1),
        ) from error
