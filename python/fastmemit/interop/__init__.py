"""Statistics of other editing codebases: their files from ours, and ours from their files."""

from __future__ import annotations

from fastmemit.interop.exporting import export_null_space, export_statistics
from fastmemit.interop.importing import files_of, import_statistics
from fastmemit.interop.layouts import LAYOUTS, SAMPLE_SIZE, Layout, StatsPlace, module_of

__all__ = [
    "LAYOUTS",
    "SAMPLE_SIZE",
    "Layout",
    "StatsPlace",
    "export_null_space",
    "export_statistics",
    "files_of",
    "import_statistics",
    "module_of",
]
