"""Files of hyper-parameters: JSON of the ROME family, YAML of EasyEdit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastmemit.compat.hparams import METHODS, Hparams, has_names, read_hparams
from fastmemit.data.reading import check_file, decode, parse_json
from fastmemit.editors import EditConfig
from fastmemit.errors import BadConfig

MAX_BYTES = 1 << 16  # a file of hyper-parameters has one or two thousand
_DEEPEST = 8


def open_hparams(path: str | os.PathLike[str], method: str | None = None) -> Hparams:
    """Read a file of hyper-parameters: JSON (ROME, MEMIT, EMMET) or YAML (EasyEdit).

    Args:
        path: A .json, .yaml or .yml file.
        method: Which method they are for; None takes ``alg_name``, else the folder's name
            (``hparams/MEMIT/gpt2-xl.json``), else what the fields tell.

    Raises:
        BadConfig: The file is not there, too large, or not an object of names and values, or for what `read_hparams`
            says.
    """
    path = Path(path)
    check_file(path, BadConfig)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise BadConfig(f"{path} has {size} bytes, which is no file of hyper-parameters.")
    text = decode(path.read_bytes(), path, 0, BadConfig)
    yaml = path.suffix.lower() in (".yaml", ".yml")
    values = _parse_yaml(text, path) if yaml else parse_json(text, str(path), BadConfig)
    if not has_names(values):
        raise BadConfig(f"{path} holds no names with values; give a file of hyper-parameters.")
    folder = path.resolve().parent.name.lower()
    if method is None and values.get("alg_name") is None and folder in METHODS:
        method = folder
    return read_hparams(values, method, path.name)


def load_hparams(path: str | os.PathLike[str], method: str | None = None) -> EditConfig:
    """The settings in a file of hyper-parameters; see `open_hparams`."""
    return open_hparams(path, method).config


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # An alias may stand for a list of aliases, and so on: a small text of a large value.
            if isinstance(event, yaml.AliasEvent):
                raise BadConfig(f"{path} uses YAML aliases, which are not read; write values out.")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise BadConfig(f"{path} is nested too deep for hyper-parameters.")
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), path)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, BadConfig):
            raise
        said = " ".join(str(error).split())
        raise BadConfig(f"{path} is not YAML ({said:.160}); correct it.") from error


def _refuse_twice(node: Any, path: Path) -> None:
    """Refuse a name that is there twice in one place, of which YAML takes the last."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(item, path)
    elif isinstance(node, yaml.MappingNode):
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise BadConfig(f"{path} has {name!r:.80} twice in one place; keep one of the two.")
        for _, value in node.value:
            _refuse_twice(value, path)
