"""Our statistics as files that other codebases take for their own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastcov
from fastcov.closed_form import THRESHOLD
from fastcov.hooks import isolated
from fastcov.npz import save_npz
from fastcov.store import atomic_file
from fastmemit.errors import BadConfig
from fastmemit.interop.layouts import StatsPlace
from fastmemit.statistics import Statistics

log = logging.getLogger(__name__)


@isolated()
def export_statistics(
    found: Statistics,
    place: StatsPlace,
    modules: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Path]:
    """Write second moments where another codebase looks for them, so that it collects none.

    Each file has the full symmetric sum of ``k k^T``, the number of keys and the sample size that the codebase is
    configured with. The number of keys is ours, not what that sample would have had: their loaders divide by it, so C
    is the mean over the keys that were collected here.

    Args:
        found: What to write.
        place: Where to.
        modules: Which of them; None takes all.
        overwrite: Replace files that are there. They may be what took somebody days.
        progress: Called after each file with how many it is, 1.

    Returns:
        Module name -> file.

    Raises:
        BadConfig: A file is there already.
        fastcov.StoreMissing: A module was not precomputed.
        fastcov.StoreDamaged: A kept file is not what was written.
        fastcov.NonFiniteMatrix: A sum is too large for float32; ``precision="float64"`` holds it.
        OSError: A file cannot be written; those that were written are whole.
    """
    paths = {name: place.path(name) for name in found.paths if modules is None or name in modules}
    for name in modules or ():
        if name not in found.paths:
            found.moment(name)  # says what there is
    if not overwrite:
        check_new(*paths.values())
    for name, path in paths.items():
        save_npz(path, found.moment(name), sample_size=place.sample_size, dtype=getattr(torch, place.precision))
        if progress is not None:
            progress(1)
    return paths


@isolated()
def export_null_space(
    found: Statistics,
    path: str | os.PathLike[str],
    modules: Sequence[str] | None = None,
    *,
    threshold: float = THRESHOLD,
    relative: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Write AlphaEdit's projectors onto the null space of C (arXiv 2410.02355), layer by layer.

    The file is one float32 tensor (layers, d_k, d_k) of ``P = U U^T``, U the eigenvectors of C with an eigenvalue below
    a threshold, in the order of the modules; ``torch.load`` reads it with ``weights_only=True``.

    Args:
        found: The second moments.
        path: The file, ``null_space_project.pt`` in AlphaEdit as released.
        modules: Which of them and in which order; None takes all as they are.
        threshold: See `fastcov.null_space`.
        relative: See there.
        overwrite: Replace a file that is there.
        progress: Called after each layer with how many it is, 1.

    Returns:
        Module name -> how many directions its null space has. None at all makes AlphaEdit change nothing, and all of
        them make it change everything.

    Raises:
        BadConfig: The file is there already, the layers differ in width, or a threshold is not above 0.
        fastcov.StoreMissing: A module was not precomputed.
        OSError: The file cannot be written; nothing is left of the attempt.
    """
    if not overwrite:
        check_new(Path(path))
    names = list(found.paths if modules is None else modules)
    if not names:
        raise BadConfig("There is no layer to project; name at least one.")
    ranks: dict[str, int] = {}
    stacked = torch.empty(0)
    for place, name in enumerate(names):
        C = found.second_moment(name)  # (d_k, d_k)
        if place == 0:
            stacked = torch.empty(len(names), *C.shape)
        if C.shape != stacked.shape[1:]:
            raise BadConfig(
                f"The keys of {name} are {C.shape[0]} wide but those of {names[0]} are "
                f"{stacked.shape[1]}, and one tensor cannot hold both; name layers of one width."
            )
        try:
            null = fastcov.null_space(C, threshold=threshold, relative=relative)
        except ValueError as error:
            raise BadConfig(str(error)) from error
        stacked[place] = null.projector()
        ranks[name] = null.rank
        if null.rank in (0, C.shape[0]):
            log.warning(
                "%s of the %d directions of %s lie below the threshold %g (eigenvalues from %.2g "
                "to %.2g), so %s; choose another threshold, or a relative one",
                "none" if null.rank == 0 else "all",
                C.shape[0],
                name,
                null.threshold,
                float(null.eigenvalues[0]),
                float(null.eigenvalues[-1]),
                "nothing could be edited" if null.rank == 0 else "nothing would be preserved",
            )
        if progress is not None:
            progress(1)
    with atomic_file(path) as file:
        torch.save(stacked, file)
    return ranks


def check_new(*paths: Path) -> None:
    """Refuse to write over files.

    Raises:
        BadConfig: One of them exists.
    """
    for path in paths:
        if path.exists():
            raise BadConfig(
                f"{str(path)!r} exists and may be the work of days; name another place, or pass "
                "overwrite=True (--overwrite)."
            )
