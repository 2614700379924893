"""What edits draw on: statistics, contexts, target vectors and factors, each made once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import fastcov
from fastcov.throughput import Throughput
from fastmemit import statistics
from fastmemit.applied import EditStack
from fastmemit.contexts import Contexts
from fastmemit.data.corpora import Corpus
from fastmemit.editors import AlphaEditConfig, CovarianceConfig, EditConfig, PreservedKeys, ReadCache, Workspace
from fastmemit.errors import BadConfig, WrongModel
from fastmemit.factors import FactorCache
from fastmemit.kept import common, copied, provenance_of, stored
from fastmemit.models import ModelAdapter, tokenizer_fingerprint
from fastmemit.outcomes import Reply, ask
from fastmemit.progress import bar
from fastmemit.request import EditRequest
from fastmemit.statistics import Statistics
from fastmemit.targets import Target, TargetStore, stored_or_optimised


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
            BadBudget: The multiplier is not above 0.
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

    def ask(self, requests: Sequence[EditRequest]) -> list[Reply]:
        """What the model, as it is now, makes of facts; see `fastmemit.outcomes.ask`."""
        return ask(self._adapter, self._tokenizer, requests)

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
