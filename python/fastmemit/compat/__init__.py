"""Functions that other editing codebases call, with their signatures, on statistics made here.

    from fastmemit import compat compat.configure(corpus="articles.jsonl") memit.memit_main.get_cov = compat.get_cov

See docs/other-codebases.md.
"""

from __future__ import annotations

from fastmemit.compat.applying import apply_emmet_to_model, apply_memit_to_model, apply_rome_to_model
from fastmemit.compat.covariance import LayerMoment, LayerStats, get_cov, get_inv_cov, layer_stats
from fastmemit.compat.files import load_hparams, open_hparams
from fastmemit.compat.hparams import Hparams, read_hparams
from fastmemit.compat.live import forget
from fastmemit.compat.settings import Settings, configure

__all__ = [
    "Hparams",
    "LayerMoment",
    "LayerStats",
    "Settings",
    "apply_emmet_to_model",
    "apply_memit_to_model",
    "apply_rome_to_model",
    "configure",
    "forget",
    "get_cov",
    "get_inv_cov",
    "layer_stats",
    "load_hparams",
    "open_hparams",
    "read_hparams",
]
