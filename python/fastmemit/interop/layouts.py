"""Where other editing codebases look for their statistics.

{stats_dir}/{model_dir}/{dataset}_stats/{module}_{precision}_mom2_{sample_size}.npz
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fastmemit.errors import BadConfig

Layout = Literal["rome", "memit", "easyedit", "alphaedit"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PRECISIONS = ("float32", "float64")

#: How many documents of Wikipedia these codebases ask for, in all of their settings.
SAMPLE_SIZE = 100_000

_STATISTIC = "mom2"
_NAMED = re.compile(rf"(?P<module>.+)_(?P<precision>[a-z0-9]+)_{_STATISTIC}_(?P<size>\d+)\.npz")


@dataclass(frozen=True)
class StatsPlace:
    """The files of one model, data set and setting in a folder of statistics.

    Args:
        stats_dir: The codebase's own folder, ``data/stats`` in all of them as released.
        layout: Whose: ``"rome"``, ``"memit"``, ``"easyedit"`` or ``"alphaedit"``.
        model_name: The name that the codebase loads the model by. ROME and MEMIT write "_" for its "/", EasyEdit and
            AlphaEdit keep what follows the last one.
        dataset: The name of the corpus there (``mom2_dataset``).
        precision: ``mom2_dtype`` there, ``"float32"`` or ``"float64"``.
        sample_size: ``mom2_n_samples`` there. It is part of the name and is compared with what is in the file; it says
            nothing of the number of keys.

    Raises:
        BadConfig: One of them makes no sense, or would leave the folder.
    """

    stats_dir: Path
    layout: Layout
    model_name: str
    dataset: str = "wikipedia"
    precision: str = "float32"
    sample_size: int = SAMPLE_SIZE

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats_dir", Path(self.stats_dir))
        if self.layout not in LAYOUTS:
            raise BadConfig(f"There is no layout {self.layout!r}; choose from {', '.join(LAYOUTS)}.")
        if self.precision not in PRECISIONS:
            raise BadConfig(
                f"Statistics in {self.precision!r} are not exchanged; choose float32 or float64 (mom2_dtype there)."
            )
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.dataset):
            raise BadConfig(f"The data set {self.dataset!r} is no plain name, such as wikipedia.")
        size = self.sample_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadConfig(f"sample_size must be a whole number above 0 but is {size!r}.")
        if self.model_dir in ("", ".", ".."):
            raise BadConfig(
                f"The model name {self.model_name!r} gives no folder's name; name the model as the "
                "other codebase does, with model_name= (--model-name)."
            )

    @property
    def model_dir(self) -> str:
        """The model's folder, by its name alone."""
        name = self.model_name.replace("\\", "/")
        if self.layout in ("rome", "memit"):
            return name.replace("/", "_")
        return name.rstrip("/").rpartition("/")[2]

    @property
    def folder(self) -> Path:
        """Where the files of all modules lie."""
        return self.stats_dir / self.model_dir / f"{self.dataset}_stats"

    def path(self, module: str) -> Path:
        """The file of one module, such as ``transformer.h.17.mlp.c_proj``."""
        return self.folder / f"{module}_{self.precision}_{_STATISTIC}_{self.sample_size}.npz"


def module_of(path: Path) -> str | None:
    """The module that a file's name says it is of, or None for another name."""
    named = _NAMED.fullmatch(path.name)
    return None if named is None else named["module"]


def sample_size_of(path: Path) -> int | None:
    """The sample size that a file's name says, or None for another name."""
    named = _NAMED.fullmatch(path.name)
    return None if named is None or len(named["size"]) > 18 else int(named["size"])
