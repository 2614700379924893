"""The grid of a sweep: which cells there are, what they are called, and in which order they run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastmemit.errors import BadConfig
from fastmemit.experiments.schema import CellPlace
from fastmemit.methods import METHODS, EditConfig

#: How many batches of each size Table 1 of arXiv 2506.04226 edits and scores.
TABLE_1 = {1: 1000, 16: 10, 64: 5, 256: 5, 1024: 3}
MULTIPLIERS: tuple[float | None, ...] = (1.0, 2.0, 3.0, 4.0, 10.0, None)
FULL = "full"


@dataclass(frozen=True)
class Place:
    """One cell of the grid.

    Attributes:
        method: One of `fastmemit.methods.METHODS`.
        batch_size: Records edited together.
        batches: How many such batches, each on the unedited weights.
        multiplier: d_m; None is the full precompute.
        settings: What replaces the method's settings, by name, in the order given.
        bos: Whether the first position of a document is a key.
        seed: Of the order of the corpus.
    """

    method: str
    batch_size: int
    batches: int
    multiplier: float | None
    settings: tuple[tuple[str, Any], ...] = ()
    bos: bool = True
    seed: int = 0

    @property
    def key(self) -> str:
        """The cell's name, such as ``memit/b16x10/x2+relative_ridge=0.001``."""
        size = f"b{self.batch_size}x{self.batches}"
        name = f"{self.method}/{size}/{multiplier_name(self.multiplier)}"
        name += "".join(f"+{setting}={_shown(value)}" for setting, value in self.settings)
        return name + ("" if self.bos else "-bos") + (f"/seed{self.seed}" if self.seed else "")

    def as_dict(self) -> CellPlace:
        """The place as the results file has it."""
        return CellPlace(
            method=self.method,
            batch_size=self.batch_size,
            batches=self.batches,
            multiplier=self.multiplier,
            settings=dict(self.settings),
            bos=self.bos,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Grid:
    """All cells of a sweep.

    Attributes:
        methods: In the order in which they run: names, or settings in the place of a model's preset, one for each
            method.
        batches: Batch size -> how many batches.
        multipliers: None stands for the full precompute.
        variants: Settings that replace the methods' own; each set of them is a cell of its own.
        bos: With the first position of a document among the keys, without it, or both.
        seeds: Of the order of the corpus.
        snapshots: Further multipliers at which sums are stored on the way. Sweeps with the same way share one pass over
            the corpus.
        settings: Method -> settings that replace its own in all of its cells.
    """

    methods: tuple[str | EditConfig, ...] = ("emmet", "memit", "rome")
    batches: Mapping[int, int] = field(default_factory=lambda: dict(TABLE_1))
    multipliers: tuple[float | None, ...] = MULTIPLIERS
    variants: tuple[Mapping[str, Any], ...] = ({},)
    bos: tuple[bool, ...] = (True,)
    seeds: tuple[int, ...] = (0,)
    snapshots: tuple[float | None, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of_model(self, config: Callable[[str | EditConfig], EditConfig]) -> Grid:
        """The grid with names for methods, and what settings change of a model's in `settings`.

        Args:
            config: The model's settings for a method, as `fastmemit.Editor.config` gives them.
        """
        changed = dict(self.settings)
        for given in self.methods:
            if isinstance(given, EditConfig):
                usual = config(given.method).as_dict()
                own = config(given).as_dict()
                own = {name: own[name] for name in given.settings() if own[name] != usual[name]}
                changed[given.method] = {**own, **self.settings.get(given.method, {})}
        return dataclasses.replace(self, methods=tuple(map(_name, self.methods)), settings=changed)

    def way(self, multiplier: float | None) -> list[float | None]:
        """Where sums are stored on the way to a multiplier, itself the last.

        It does not depend on what is finished: the last bits of a sum depend on it.
        """
        stops = {math.inf if m is None else m for m in (*self.multipliers, *self.snapshots)}
        last = math.inf if multiplier is None else multiplier
        return [None if m == math.inf else m for m in sorted(stops) if m <= last]

    def places(self) -> list[Place]:
        """The cells, those that share statistics one after the other, small multipliers first.

        ROME writes one fact at a time, so it has cells of batch size 1 alone.
        """
        return [
            Place(method, size, count, multiplier, self._settings(method, variant), bos, seed)
            for seed in self.seeds
            for bos in self.bos
            for multiplier in self.multipliers
            for variant in self.variants
            for method in map(_name, self.methods)
            for size, count in self.batches.items()
            if method != "rome" or size == 1
        ]

    def _settings(self, method: str, variant: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        return tuple({**self.settings.get(method, {}), **variant}.items())


def _name(method: str | EditConfig) -> str:
    return method.method if isinstance(method, EditConfig) else method


def multiplier_name(multiplier: float | None) -> str:
    """``"x2"``, or ``"full"``."""
    return FULL if multiplier is None else f"x{multiplier:g}"


def parse_multipliers(text: str) -> tuple[float | None, ...]:
    """``"1,2,10,full"`` in ascending order, ``full`` last.

    Raises:
        BadConfig: A part is neither a number above 0 nor ``full``, or there is one twice.
    """
    found: list[float] = []
    for part in _parts(text, "multipliers"):
        try:
            value = math.inf if part == FULL else float(part)
        except ValueError:
            value = math.nan
        if not value > 0 or (value == math.inf and part != FULL):
            raise BadConfig(f"The multiplier {part!r} is neither a number above 0 nor 'full'; write 1,2,10,full.")
        found.append(value)
    _refuse_twice("multiplier", found)
    return tuple(None if value == math.inf else value for value in sorted(found))


def parse_methods(text: str) -> tuple[str, ...]:
    """``"emmet,memit"`` as method names.

    Raises:
        BadConfig: There is no such method, or one twice.
    """
    names = _parts(text, "methods")
    for name in names:
        if name not in METHODS:
            raise BadConfig(f"There is no method {name!r}; choose from {', '.join(METHODS)}.")
    _refuse_twice("method", names)
    return tuple(names)


def parse_batches(sizes: str | None, numbers: str | None) -> dict[int, int]:
    """Batch sizes, and how many batches of each.

    Args:
        sizes: ``"1,16,64"``; None takes those of Table 1.
        numbers: ``"1000,10,5"``, one for each size or one for all; None takes Table 1's.

    Raises:
        BadConfig: A part is not a number above 0, a size is there twice, or how many batches it has is not known.
    """
    wanted = list(TABLE_1) if sizes is None else [_whole(part) for part in _parts(sizes, "batch sizes")]
    _refuse_twice("batch size", wanted)
    if numbers is None:
        for size in wanted:
            if size not in TABLE_1:
                raise BadConfig(f"Table 1 has no batches of {size}; say how many of each size with --num-batches.")
        return {size: TABLE_1[size] for size in wanted}
    counts = [_whole(part) for part in _parts(numbers, "numbers of batches")]
    if len(counts) not in (1, len(wanted)):
        raise BadConfig(
            f"There are {len(counts)} numbers of batches for {len(wanted)} batch sizes; give one for each, or for all."
        )
    return {size: counts[index % len(counts)] for index, size in enumerate(wanted)}


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0,1,2"`` as seeds.

    Raises:
        BadConfig: A part is not a whole number, or there is one twice.
    """
    seeds = []
    for part in _parts(text, "seeds"):
        if not part.isdecimal() or int(part) >= 2**32:
            raise BadConfig(f"The seed {part!r} is not a whole number from 0 on; write 0,1,2.")
        seeds.append(int(part))
    _refuse_twice("seed", seeds)
    return tuple(seeds)


def parse_shard(text: str | None) -> tuple[int, int]:
    """``"2/4"`` as (2, 4); None is the whole, (1, 1).

    Raises:
        BadConfig: It is not such a share.
    """
    if text is None:
        return 1, 1
    number, slash, of = text.partition("/")
    if not slash or not number.isdecimal() or not of.isdecimal() or not 1 <= int(number) <= int(of):
        raise BadConfig(f"The shard {text!r} is not a share such as 1/4 with 1 to 4 of 4.")
    return int(number), int(of)


def _parts(text: str, what: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise BadConfig(f"The {what} {text!r} have an empty part; separate them by single commas.")
    return parts


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise BadConfig(f"{text!r} is not a whole number above 0; write batch sizes, and how many, as 1,16,64.")
    return int(text)


def _refuse_twice(what: str, values: Sequence[Any] | Iterable[Any]) -> None:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise BadConfig(f"The {what} {value} is there twice; name each once.")
        seen.add(value)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
