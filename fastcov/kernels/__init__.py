"""Implementations of the rank-k update, between which `fastcov.ops` chooses, and the native module of two of them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

# torch first: the native module then shares the OpenMP runtime that torch has loaded, and with it torch's threads.
import torch  # noqa: F401


@functools.cache
def native() -> Any | None:
    """The module ``fastcov._native``, or None where it is not there or does not load."""
    return None if native_missing() else importlib.import_module("fastcov._native")


@functools.cache
def native_missing() -> str | None:
    """Why there is no native module, as a clause; None where there is one."""
    try:
        importlib.import_module("fastcov._native")
    except ModuleNotFoundError:
        return "the native module is not installed (there was no C++ compiler, or FASTCOV_SKIP_NATIVE was set)"
    except ImportError as error:
        return f"the native module does not load ({error})"
    return None
