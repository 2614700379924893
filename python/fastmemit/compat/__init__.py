"""What other editing codebases call and read: their functions, their hyper-parameters, their files of statistics.

The functions have their signatures and work on statistics made here, ``memit_main.get_cov = fastmemit.compat.get_cov``.
See docs/guide/other-codebases.md.
"""

from fastmemit.compat import efficient
from fastmemit.compat.drop_in import (
    LayerMoment,
    Settings,
    apply_alphaedit_to_model,
    apply_emmet_to_model,
    apply_memit_to_model,
    apply_r_rome_to_model,
    apply_rome_to_model,
    configure,
    forget,
    get_cov,
    get_inv_cov,
    layer_stats,
)
from fastmemit.compat.easyeditor import compute_z, install_easyeditor
from fastmemit.compat.hparams import Hparams, load_hparams, open_hparams, read_hparams
from fastmemit.compat.npz_files import (
    LAYOUTS,
    SAMPLE_SIZE,
    StatsPlace,
    export_null_space,
    export_statistics,
    files_of,
    import_statistics,
    module_of,
)

__all__ = [
    "LAYOUTS", "SAMPLE_SIZE", "Hparams", "LayerMoment", "Settings", "StatsPlace", "apply_alphaedit_to_model",
    "apply_emmet_to_model", "apply_memit_to_model", "apply_r_rome_to_model", "apply_rome_to_model", "compute_z",
    "configure", "efficient", "export_null_space", "export_statistics", "files_of", "forget", "get_cov",
    "get_inv_cov", "import_statistics", "install_easyeditor", "layer_stats", "load_hparams", "module_of",
    "open_hparams", "read_hparams",
]  # fmt: skip
