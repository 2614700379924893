"""The README.md that goes to the hub with an edit or with statistics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import fastcov
from fastmemit.delta import Delta
from fastmemit.editors import METHODS
from fastmemit.errors import BadConfig
from fastmemit.request import EditRequest
from fastmemit.sharing.composition import parts
from fastmemit.sharing.facts import facts_of
from fastmemit.sharing.markdown import plain, table, yaml_header
from fastmemit.statistics import Statistics

#: More facts than this are counted and not listed.
LISTED = 100
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_PROJECT = "fastmemit"


def edit_card(delta: Delta, repo: str, *, license: str | None = None, base_model: str | None = None) -> str:
    """The card of an edit: what it changes, how it was made, how to load it.

    Everything on record is shown as plain text, whatever characters it holds.

    Args:
        delta: The edit.
        repo: Where it will be, ``USER/NAME``.
        license: Its licence as the hub writes it, such as ``apache-2.0``; the caller decides.
        base_model: The model's name on the hub; None takes the name on record, if it can be one.

    Raises:
        BadConfig: The licence or the name of the base model is none.
        BadData: The facts on record are no facts.
    """
    about = delta.provenance
    method = str(about.get("method", "unknown"))
    base = _base(base_model, about.get("model_name"))
    tags = ["knowledge-editing", "model-editing", *_tag(method)]
    facts = facts_of(delta)
    counted = f"{len(facts)} facts" if len(facts) != 1 else "1 fact"
    name = repo.rpartition("/")[2]
    model = base or "MODEL"
    sections = [
        _header(license, base, tags),
        f"# {name}",
        f"An edit of {plain(base or about.get('model_name') or 'a language model')}: {counted}, "
        f"written by {plain(method)} as a change of low rank. The edited model gives the new "
        "answers as if they were true, whether they are or not.",
        "## What it changes",
        _facts(facts),
        table(("weight", "shape", "rank"), _weights(delta)),
        *_composed(delta),
        "## How it was made",
        table(("what", "value"), _how(delta)),
        "## How to use it",
        f"""```python
from fastmemit import Editor
from fastmemit.sharing import pull_edit

editor = Editor.from_pretrained("{model}")
pull_edit("{repo}", model=editor.fingerprint).save("edit.safetensors")
edit = editor.load("edit.safetensors").apply()
edit.undo()  # bit for bit
```""",
        f"""On the command line:

    fastmemit pull --repo {repo} --save edit.safetensors
    fastmemit apply --model {model} --edit edit.safetensors --prompt "..." """.rstrip(),
        "`edit.safetensors` holds factors and JSON, and nothing that runs. It is refused by any "
        "model but the one whose fingerprint it bears.",
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def statistics_card(found: Statistics, repo: str, *, license: str | None = None, base_model: str | None = None) -> str:
    """The card of second moments: of which model, on which text, from how many keys.

    Args and errors are those of `edit_card`.
    """
    about = found.provenance
    base = _base(base_model, about.get("model_name"))
    model = base or "MODEL"
    corpus = about.get("corpus")
    corpus = corpus if isinstance(corpus, Mapping) else {}
    rows = []
    for module in found.paths:
        moment = found.moment(module)
        rows.append((module, moment.d, moment.count, str(moment.lower.dtype).rpartition(".")[2]))
    made = fastcov.read_provenance(next(iter(found.paths.values())))
    sections = [
        _header(license, base, ["knowledge-editing", "model-editing", "covariance"]),
        f"# {repo.rpartition('/')[2]}",
        f"Second moments of the keys of {plain(base or about.get('model_name') or 'a model')}, "
        "which ROME, EMMET, MEMIT and their relatives need: collected once, for every later edit.",
        "## What they are of",
        table(
            ("what", "value"),
            [
                ("model", about.get("model_name", "")),
                ("model fingerprint", about.get("model", "")),
                ("tokenizer fingerprint", about.get("tokenizer", "")),
                ("corpus", corpus.get("name", "")),
                ("corpus fingerprint", corpus.get("fingerprint", "")),
                ("multiplier (keys per width)", _shown(about.get("multiplier"))),
                ("documents cut at", about.get("context", "unknown")),
                ("first positions", "counted" if about.get("bos", True) else "left out"),
                ("seed", "unknown" if about.get("seed") is None else about["seed"]),
                ("versions", _versions(made)),
            ],
        ),
        table(("module", "width d_k", "keys", "dtype of the sum"), rows),
        "## How to use them",
        f"""```python
from fastmemit import Editor
from fastmemit.sharing import pull_statistics

editor = Editor.from_pretrained("{model}")
editor.use(pull_statistics("{repo}", model=editor.fingerprint))
```""",
        f"""On the command line, after which `fastmemit edit --model {model}` finds them:

    fastmemit pull --repo {repo} --model {model}""",
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def _header(license: str | None, base: str | None, tags: list[str]) -> str:
    if license is not None and not _LICENSE.fullmatch(license):
        raise BadConfig(f"{license!r:.80} is no licence's short name; write one as apache-2.0.")
    header = {"library_name": _PROJECT, "base_model": base, "license": license, "tags": tags}
    return yaml_header(header)


def _base(asked: str | None, on_record: Any) -> str | None:
    """A name that the hub accepts for the base model, or None."""
    if asked is not None:
        if not _HUB_NAME.fullmatch(asked):
            raise BadConfig(f"{asked!r:.80} is no name of a model on the hub; write USER/NAME.")
        return asked
    return on_record if isinstance(on_record, str) and _HUB_NAME.fullmatch(on_record) else None


def _tag(method: str) -> list[str]:
    return [method] if method in (*METHODS, "lora") else []


def _facts(facts: list[EditRequest]) -> str:
    if not facts:
        return ""
    rows = [(f.text, f.target.strip(), (f.target_true or "").strip()) for f in facts[:LISTED]]
    shown = table(("prompt", "new answer", "former answer"), rows)
    more = len(facts) - LISTED
    return shown if more <= 0 else f"{shown}\n\nAnd {more} more, in the file's provenance."


def _weights(delta: Delta) -> list[tuple[str, str, int]]:
    return [
        (name, f"{left.shape[0]} x {right.shape[0]}", left.shape[1]) for name, (left, right) in delta.factors.items()
    ]


def _composed(delta: Delta) -> Iterable[str]:
    """The parts of a composition, oldest first."""
    found = parts(delta)
    if len(found) < 2:
        return ()
    rows = [
        (place + 1, part.digest()[:16], part.provenance.get("method", ""), len(facts_of(part)))
        for place, part in enumerate(found)
    ]
    return ("It is composed of:", table(("", "digest", "method", "facts"), rows))


def _how(delta: Delta) -> list[tuple[str, object]]:
    about = delta.provenance
    rows: list[tuple[str, object]] = [
        ("model", about.get("model_name", "")),
        ("model fingerprint", about.get("model", "")),
        ("method", about.get("method", "")),
    ]
    settings = about.get("settings")
    if isinstance(settings, Mapping):
        rows += [(f"setting {k}", _shown(v)) for k, v in settings.items() if k != "method"]
    statistics = about.get("statistics")
    if isinstance(statistics, Mapping):
        corpus = statistics.get("corpus")
        rows.append(("corpus", corpus.get("name", "") if isinstance(corpus, Mapping) else ""))
        rows.append(("multiplier", _shown(statistics.get("multiplier"))))
        rows.append(("keys per layer", statistics.get("keys", statistics.get("budget", ""))))
    if about.get("on_top_of"):
        rows.append(("computed on top of", about["on_top_of"]))
    rows += [("versions", _versions(about)), ("digest", delta.digest())]
    return rows


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):  # a tuple comes back from a file as a list
        return ", ".join(map(str, value))
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else value


def _versions(about: Mapping[str, Any]) -> str:
    found = about.get("versions")
    items = found.items() if isinstance(found, Mapping) else ()
    return ", ".join(f"{name} {version}" for name, version in items)
