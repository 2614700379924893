"""What edits draw on: statistics, contexts, target vectors and factors, each made once and kept."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

import fastcov
from fastcov import CholeskyFactor, NullSpace
from fastcov.moments import SHRINKAGES
from fastcov.sizing import LIMIT, StoppingRule, checkpoints
from fastcov.throughput import Throughput
from fastmemit import statistics
from fastmemit.data.corpora import Corpus
from fastmemit.edits import EditStack
from fastmemit.errors import BadConfig, WrongModel
from fastmemit.methods import AlphaEditConfig, CovarianceConfig, EditConfig, PreservedKeys, ReadCache, Workspace
from fastmemit.methods.config import Config
from fastmemit.models import ModelAdapter, tokenizer_fingerprint
from fastmemit.outcomes import Reply, ask
from fastmemit.progress import bar
from fastmemit.provenance import common, copied, provenance_of, stored
from fastmemit.request import EditRequest
from fastmemit.sampling import Contexts
from fastmemit.statistics import Statistics
from fastmemit.targets import Target, TargetStore, stored_or_optimised

log = logging.getLogger(__name__)


REMEMBERED = 10_000  # replies of the unedited model
CAPACITY = 8 << 30  # bytes; GPT-J's six layers in float64 are 13 GB, so big models factor again


# The layer, and all settings that A depends on.
_Key = tuple[int, float, float, float, str]
_SpaceKey = tuple[int, float, float | None]


def resolved(adapter: ModelAdapter, used: Statistics, config: Config) -> Config:
    """The settings with the relative ridge that they come to, one for all layers.

    Layers of unlike widths may have unlike multipliers where the corpus ended early: the widest one has fewest keys for
    its width and decides.
    """
    widest = max(adapter.d_k(layer) for layer in config.layers)
    return config.resolved(used.multiplier_of(widest))


class FactorCache:
    """Factors of ``A = w C + ridge I`` and null spaces of C, by all that they are made with.

    The least recently used go first.

    Args:
        capacity: Bytes to hold at most; one of them is always held.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._held: OrderedDict[_Key | _SpaceKey, CholeskyFactor | NullSpace] = OrderedDict()

    def clear(self) -> None:
        """Forget all; to be called when the statistics change."""
        self._held.clear()

    def get(self, adapter: ModelAdapter, used: Statistics, config: CovarianceConfig, layer: int) -> CholeskyFactor:
        """The factor of a layer's ``A = w C + ridge I`` in float64, on the weight's device.

        C is shrunk first where the settings say so, and the relative ridge joins the ridge.

        Raises:
            fastcov.NotPositiveDefinite: No jitter was enough.
            fastcov.BadInput: The file is older than what Ledoit-Wolf needs.
            fastcov.StoreDamaged: The second moment's file is not what was written.
        """
        weight = float(adapter.d_k(layer)) if config.weight is None else config.weight
        relative = resolved(adapter, used, config).relative_ridge or 0.0
        key = (layer, weight, config.ridge, relative, config.shrinkage)
        found = self._held.get(key)
        if not isinstance(found, CholeskyFactor):
            moment = used.moment(adapter.projection_name(layer))
            matrix = fastcov.regularised(
                moment.second_moment.to(_place(adapter, layer)),
                weight,
                config.ridge,
                relative_ridge=relative,
                shrinkage=SHRINKAGES[config.shrinkage](moment),
            )
            del moment  # its sum is not held beside the factorisation
            if relative and config.relative_ridge is None:
                log.info(
                    "C of layer %d has few keys (%s) and gets a ridge of %g of its mean diagonal; "
                    "relative_ridge=0 leaves it as it is",
                    layer,
                    used.describe(),
                    relative,
                )
            found = fastcov.factorize(matrix, in_place=True)
        self._hold(key, found)
        return found

    def null_space(self, adapter: ModelAdapter, used: Statistics, config: AlphaEditConfig, layer: int) -> NullSpace:
        """The null space of a layer's C in float64, on the weight's device, for AlphaEdit.

        A symmetric eigenproblem of the key width: about a second at 1,536 on one core, and the time grows with the cube
        of the width. It takes four to five matrices of float64 while it is made, and after that the basis, at most one
        matrix.

        Raises:
            fastcov.StoreDamaged: The second moment's file is not what was written.
        """
        relative = config.null_relative
        key = (layer, config.null_threshold if relative is None else 0.0, relative)
        found = self._held.get(key)
        if not isinstance(found, NullSpace):
            C = used.moment(adapter.projection_name(layer)).second_moment
            found = fastcov.null_space(C.to(_place(adapter, layer)), threshold=config.null_threshold, relative=relative)
            d_k = found.basis.shape[0]
            say = log.warning if found.rank == d_k else log.info
            say(
                "%d of %d directions of C of layer %d are below %g and count as its null space%s",
                found.rank,
                d_k,
                layer,
                found.threshold,
                ": edits preserve nothing" if found.rank == d_k else "",
            )
        self._hold(key, found)
        return found

    def _hold(self, key: _Key | _SpaceKey, found: CholeskyFactor | NullSpace) -> None:
        self._held[key] = found
        self._held.move_to_end(key)
        while len(self._held) > 1 and self._bytes() > self._capacity:
            self._held.popitem(last=False)

    def _bytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())


def _place(adapter: ModelAdapter, layer: int) -> torch.device:
    """Where a layer's statistics are worked on: with its weight, but Apple's GPUs lack float64."""
    device = adapter.weight(layer).device
    return torch.device("cpu") if device.type == "mps" else device


class Sources:
    """The parts that an edit is made of, for one model.

    Args:
        adapter: The model.
        tokenizer: Its tokenizer.
        stack: The edits that are in its weights.
        folder: Where statistics and targets are kept.
        name: What to call the model in files.
        seed: Of contexts and of the corpus's order.
        batch_tokens: Bound on the padded tokens of target vectors optimised together; None takes few on a CPU, where
            little padding is worth more than large products, else many.
        progress: Show a bar for each long step.
        contexts: Where contexts come from; None has the unedited model write them.

    Attributes:
        checkpoint_seconds: Between two checkpoints of a precompute, see `fastcov.Checkpoint`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        tokenizer: Any,
        stack: EditStack,
        folder: Path,
        *,
        name: str,
        seed: int,
        batch_tokens: int | None,
        progress: bool,
        contexts: Contexts | None = None,
    ) -> None:
        self._adapter, self._tokenizer, self._stack = adapter, tokenizer, stack
        self._folder, self._name, self.seed = folder, name, seed
        self._batch_tokens = batch_tokens or (1024 if adapter.device.type == "cpu" else 16384)
        self._progress = progress
        self.checkpoint_seconds: float | None = None
        self._tokenizer_is = tokenizer_fingerprint(tokenizer)
        self._targets = TargetStore(folder / "targets")
        self._contexts = contexts or Contexts(adapter.model, tokenizer, seed, lambda: bool(stack.edits))
        self._factors = FactorCache()
        self._statistics: Statistics | None = None
        self._replies: tuple[str, dict[EditRequest, Reply]] = ("", {})  # of which unedited model, and what they are
        #: The keys of the edits that are in the weights, for methods to which they belong.
        self.preserved = PreservedKeys()

    def identity(self) -> dict[str, Any]:
        """What tells this model and its tokenizer from others, for provenance."""
        return {"model": self._stack.fingerprint, "model_name": self._name, "tokenizer": self._tokenizer_is}

    def largest_budget(self, layers: Sequence[int], multiplier: float) -> int:
        """How many keys the widest of some layers needs, if they can be collected now.

        Raises:
            WrongModel: Edits are in the weights.
            BadConfig: There is no layer.
            BadLayer: A layer does not exist.
            BadInput: The multiplier is not above 0.
        """
        if self._stack.edits:
            raise WrongModel(
                f"{len(self._stack.edits)} edits are in the weights, and statistics belong to the "
                "unedited model; undo them first."
            )
        if not layers:
            raise BadConfig("There is no layer to precompute; name at least one.")
        for layer in layers:
            self._adapter.check_layer(layer)
        return max(fastcov.budget(multiplier, self._adapter.d_k(layer)) for layer in layers)

    def widest(self, layers: Sequence[int]) -> int:
        """The largest key width of some layers."""
        return max(self._adapter.d_k(layer) for layer in layers)

    def precompute(
        self,
        corpus: Corpus,
        layers: Sequence[int],
        multiplier: float,
        allow_fewer: bool,
        max_length: int | None,
        bos: bool = True,
        after: Statistics | None = None,
        seed: int | None = None,
        aside: bool = False,
    ) -> Statistics:
        """Collect statistics or find them, and use them; see `Editor.precompute`.

        Args:
            corpus: Where the text comes from.
            layers: Whose keys.
            multiplier: d_m.
            allow_fewer: Take a corpus that ends early for what it has.
            max_length: Cut documents at so many tokens.
            bos: See `fastmemit.statistics.precompute`.
            after: See there.
            seed: Of the order of the corpus; None takes the editor's.
            aside: Keep them where `find` does not look: an experiment with few keys must not become what the next edit
                uses.
        """
        total = self.largest_budget(layers, multiplier)
        throughput = Throughput() if self._progress else None
        with bar("tokens read", total, self._progress) as reading, bar("keys", total, self._progress) as keys:

            def progress(done: int) -> None:
                if throughput is not None:
                    keys.note(throughput.rate())
                keys(done)

            found = statistics.precompute(
                self._adapter,
                self._tokenizer,
                corpus,
                self._folder / ("snapshots" if aside else "statistics"),
                self.identity(),
                layers=layers,
                multiplier=multiplier,
                seed=self.seed if seed is None else seed,
                allow_fewer=allow_fewer,
                max_length=max_length,
                bos=bos,
                after=after,
                progress=progress,
                reading=reading,
                throughput=throughput,
                checkpoint_seconds=self.checkpoint_seconds,
            )
        self.use(found)
        return found

    def keep(self, found: Statistics) -> Statistics:
        """Put statistics that lie aside where edits find them, and use them."""
        folder = self._folder / "statistics" / self._stack.fingerprint[:16]
        kept = Statistics(copied(found.paths, found.provenance, folder), found.provenance, found.throughput)
        self.use(kept)
        return kept

    def take_over(
        self, shared: dict[str, Any], moments: Mapping[str, tuple[fastcov.SecondMoment, dict[str, Any]]]
    ) -> Statistics:
        """Keep moments that were not collected here as the newest, and use them.

        Args:
            shared: What all of them are of, `identity` included.
            moments: Module name -> moment, and what it alone is of.
        """
        folder = self._folder / "statistics" / self._stack.fingerprint[:16]
        paths = stored(folder, shared, moments)
        found = Statistics(paths, common([provenance_of(path) for path in paths.values()]))
        self.use(found)
        return found

    def use(self, found: Statistics) -> None:
        """Take these statistics from now on; see `Editor.use`."""
        if found is self._statistics:
            return
        if found.provenance.get("model") != self._stack.fingerprint:
            raise WrongModel(
                f"The statistics are of the model {found.provenance.get('model')!s:.16} but this "
                f"one is {self._stack.fingerprint:.16}; precompute them for this model."
            )
        self._statistics = found
        self._factors.clear()

    def find(self, layers: Sequence[int] | None, multiplier: float | None) -> Statistics | None:
        """The newest kept statistics for these layers; see `Editor.find_statistics`."""
        modules = None if layers is None else [*map(self._adapter.projection_name, layers)]
        folder = self._folder / "statistics"
        model = self._stack.fingerprint
        return statistics.find(folder, model, modules, multiplier, self._tokenizer_is)

    def statistics_for(self, layers: Sequence[int]) -> Statistics:
        """The statistics in use if they cover these layers, else the newest kept ones that do.

        Raises:
            fastcov.StoreMissing: There are none.
        """
        names = {self._adapter.projection_name(layer) for layer in layers}
        if self._statistics is None or not names <= self._statistics.paths.keys():
            found = self.find(layers, None)
            if found is None:
                raise fastcov.StoreMissing(
                    f"There are no second moments of the layers {list(layers)} of {self._name}; "
                    "call precompute first (fastmemit precompute)."
                )
            self.use(found)
        assert self._statistics is not None
        return self._statistics

    def contexts(self, method: str) -> tuple[str, ...]:
        """The texts put before prompts; see `Editor.contexts`."""
        _ = self._stack.fingerprint  # those of another model would be none of this one's
        return self._contexts.of(method)

    def targets(
        self, requests: Sequence[EditRequest], config: EditConfig, *, keep: bool = True, together: bool = False
    ) -> list[Target]:
        """Target vectors on the model as it is.

        Args:
            requests: The facts.
            config: The settings.
            keep: Whether stored vectors may serve and new ones be stored.  Not so between two
                writes of one batch, when the weights are in a state that no key can name.
            together: See `fastmemit.targets.stored_or_optimised`.
        """
        with bar("target steps", len(requests) * config.steps, self._progress) as progress:
            return stored_or_optimised(
                self._targets if keep else TargetStore(None),
                f"{self._stack.state()}/{self._tokenizer_is}" if keep else "",
                self._adapter,
                self._tokenizer,
                requests,
                self.contexts(config.method),
                config.targets(),
                batch_tokens=self._batch_tokens,
                together=together,
                progress=progress,
            )

    def ask(self, requests: Sequence[EditRequest], *, remember: bool = False) -> list[Reply]:
        """What the model, as it is now, makes of facts; see `fastmemit.outcomes.ask`.

        Args:
            requests: The facts.
            remember: Take what the unedited model replied earlier, and keep what it replies now.
        """
        if not remember or self._stack.edits:
            return ask(self._adapter, self._tokenizer, requests)
        model = self._stack.live_fingerprint
        if self._replies[0] != model or len(self._replies[1]) > REMEMBERED:
            self._replies = (model, {})
        known = self._replies[1]
        new = [request for request in dict.fromkeys(requests) if request not in known]
        if new:
            known.update(zip(new, ask(self._adapter, self._tokenizer, new), strict=True))
        return [known[request] for request in requests]

    def factor(self, config: CovarianceConfig, layer: int) -> fastcov.CholeskyFactor:
        """The factor of a layer's ``A``, made where it is not held."""
        return self._factors.get(self._adapter, self.statistics_for(config.layers), config, layer)

    def prepare(self, config: EditConfig) -> dict[int, float]:
        """Make what the layers' solves need; layer -> the jitter of its factor, if there is one."""
        if isinstance(config, AlphaEditConfig):
            used = self.statistics_for(config.layers)
            for layer in config.layers:
                self._factors.null_space(self._adapter, used, config, layer)
            return {}
        solved = cast(CovarianceConfig, config)
        return {layer: self.factor(solved, layer).jitter for layer in config.layers}

    def workspace(
        self, config: EditConfig, preserved: PreservedKeys | None = None, reads: ReadCache | None = None
    ) -> Workspace:
        """What a method needs to plan a batch; see `Editor.plan`.

        Raises:
            QuantisedWeight: A weight is not in floating point, which is said before any work.
            OffloadedWeight: A weight is not in memory.
        """
        for layer in config.layers:
            self._adapter.weight(layer)
        used = self.statistics_for(config.layers)
        made_of: Any = config  # a method asks for what its own settings are of
        return Workspace(
            self._adapter,
            self._tokenizer,
            config,
            self.contexts(config.method),
            factor=lambda layer: self._factors.get(self._adapter, used, made_of, layer),
            null_space=lambda layer: self._factors.null_space(self._adapter, used, made_of, layer),
            targets=lambda requests, keep: self.targets(requests, config, keep=keep),
            stack=self._stack,
            preserved=preserved,
            reads=None if self._stack.edits else reads,
            state=f"{self._stack.fingerprint}/{self._tokenizer_is}",
        )


AUTO = "auto"


def precompute_auto(
    sources: Sources,
    corpus: Corpus,
    layers: Sequence[int],
    limit: float = LIMIT,
    allow_fewer: bool = False,
    max_length: int | None = None,
) -> Statistics:
    """Collect until the stopping rule of every layer says that it is enough.

    The sum is stored at every look, so an interrupted pass goes on at the last one, and the looks are the same the next
    time. See `fastcov.sizing` for what is looked at.

    Args:
        sources: Of the unedited model.
        corpus: Where the text comes from.
        layers: Whose keys.
        limit: The multiplier at which it is enough in any case.
        allow_fewer: Take a corpus that ends early for what it has.
        max_length: Cut documents at so many tokens.

    Raises:
        BudgetNotMet: The corpus ended before, and `allow_fewer` is not set.
    """
    rules: dict[str, StoppingRule] = {}
    before: Statistics | None = None
    d_k = sources.widest(layers)
    for keys in checkpoints(d_k, limit):
        after = sources.precompute(corpus, list(layers), keys / d_k, allow_fewer, max_length, after=before, aside=True)
        if not rules:
            rules = {name: StoppingRule(limit=limit) for name in after.paths}
        enough = [rule.update(after.moment(name)) for name, rule in rules.items()]
        before = after
        if all(enough) or after.exhausted:
            break
    assert before is not None
    for name, rule in rules.items():
        if not rule.settled:
            log.warning(
                "with %d keys an edit of %s still disturbs about %.2f times more than it must; a "
                "multiplier above %g, or more and shorter documents, would settle it",
                before.keys,
                name,
                rule.looks[-1].excess,
                limit,
            )
    return sources.keep(before)
