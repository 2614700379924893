"""Edits and statistics to and from the hub, each with a card; what comes is verified like any file from a stranger."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastcov
from fastcov.files import StrPath
from fastmemit.delta import RECORD, Delta, fact_text
from fastmemit.errors import BadConfig, DamagedFile, FastmemitError, WrongModel, counted
from fastmemit.files import (
    cache_dir,
    check_moment,
    common_provenance,
    compare_provenance,
    copy_moments,
    home_of,
    lacking_fields,
    shared_of,
)
from fastmemit.methods import METHODS
from fastmemit.models import new_folder
from fastmemit.models.loading import DEMO_MODEL
from fastmemit.sharing.adapter import CONFIG, WEIGHTS, read_about
from fastmemit.sharing.composition import facts_of, parts
from fastmemit.statistics import Statistics

EDIT, CARD, MOMENTS = "edit.safetensors", "README.md", "moments"
LISTED = 100  # more facts than this are counted and not listed
_BEGIN, _END = "<!-- fastmemit: edits -->", "<!-- fastmemit: end of edits -->"
_CARD_BYTES = 1 << 20

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_REPO = re.compile(f"{_NAME}/{_NAME}", re.ASCII)
_HUB_MODEL = re.compile(f"{_NAME}(/{_NAME})?", re.ASCII)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# Parts of letters, digits and underscores between single points: no path, no drive, no parent.
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)
# Characters that Markdown, or a renderer's extension of it, gives a meaning; an entity has none.
_ACTIVE = re.compile(r"[\\`*_\[\]|~$:@!^=+]|(?<=www)\.|^[-#]", re.IGNORECASE)
_UNSEEN = ("Cc", "Cs", "Co", "Cn")
_TURNS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # turn the direction of everything after them


def push_edit(
    delta: Delta,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    scores: Mapping[str, float] | None = None,
    private: bool = False,
    dry_run: StrPath | None = None,
    token: str | None = None,
) -> str:
    """Put an edit on the hub, ``edit.safetensors`` and a card that says what it changes; returns where it is.

    Everything on record goes with it: prompts, subjects, answers, settings, contexts.

    Args:
        delta: The edit (``edit.delta`` of an `fastmemit.Edit`).
        repo: ``USER/NAME``; made if it does not exist, replaced if it holds an earlier edit.
        license: As the hub writes it, such as ``apache-2.0``; None says nothing of it.
        base_model: The model's name on the hub; None takes the name on record, if it can be one.
        scores: What you measured after the edit, by name, for the card.
        private: Only you may see it.
        dry_run: Write what would be pushed into this new folder, and ask nobody.
        token: A token of the hub; None takes the one that you are logged in with.
    """
    card = edit_card(delta, check_repo(repo), license=license, base_model=base_model, scores=scores)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / EDIT
        delta.save(file)
        return _push({EDIT: file}, card, repo, private, dry_run, token)


def push_adapter(
    folder: StrPath,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    dry_run: StrPath | None = None,
    token: str | None = None,
) -> str:
    """Put a LoRA adapter in PEFT's format on the hub, its two files and a card; see `push_edit`.

    The base model is the one that `base_model` or its config names, which whoever loads it needs.

    Raises:
        BadConfig: Neither names a model on the hub.
        DamagedFile: The folder holds no adapter that can be read.
    """
    config, ranks, ours = read_about(folder)
    base = _base(base_model, config.get("base_model_name_or_path"))
    if base is None:
        raise BadConfig(
            f"The adapter {os.fspath(folder)!r} does not name a base model on the hub; name it with --base-model."
        )
    entries = Delta({}, dict(_part(ours, "provenance"))).entries if ours else []
    rows = [fact_text(fact) for entry in entries for fact in entry["facts"]]
    card = _card(
        _header(license, base, ["knowledge-editing", "lora"], check_repo(repo), library="peft"),
        f"# {repo.rpartition('/')[2]}",
        f"A LoRA adapter of {plain(base)}, of rank {max(ranks.values())}.",
        "With it the model gives these answers as if they were true, whether they are or not." if rows else "",
        _listed(("prompt", "new answer"), rows),
        table(("module", "rank"), ranks.items()),
        f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")
```""",
    )
    with tempfile.TemporaryDirectory() as scratch:
        named = Path(scratch) / CONFIG  # the config as it is, but for the name of the model
        named.write_text(json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")
        return _push({CONFIG: named, WEIGHTS: Path(folder) / WEIGHTS}, card, repo, private, dry_run, token)


def push_statistics(
    found: Statistics | StrPath,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    dry_run: StrPath | None = None,
    token: str | None = None,
) -> str:
    """Put second moments, a folder of them or what `fastmemit.Editor.precompute` gave, on the hub; see `push_edit`."""
    if not isinstance(found, Statistics):
        found = open_statistics(found)
    card = statistics_card(found, check_repo(repo), license=license, base_model=base_model)
    files = {f"{MOMENTS}/{module}.safetensors": path for module, path in found.paths.items()}
    return _push(files, card, repo, private, dry_run, token)


def _push(
    files: Mapping[str, Path], card: str, repo: str, private: bool, dry_run: StrPath | None, token: str | None
) -> str:
    if dry_run is not None:
        with new_folder(dry_run) as partial:
            for name, path in files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, partial / name)
            (partial / CARD).write_text(card, encoding="utf-8")
        return os.fspath(dry_run)
    import huggingface_hub
    from huggingface_hub import constants

    start = f"The repository {repo!r} cannot be written, because"
    if constants.HF_HUB_OFFLINE:
        raise FastmemitError(
            f"{start} HF_HUB_OFFLINE is set; unset it, or write to a folder by --dry-run (dry_run=...)."
        )
    if token is None and huggingface_hub.get_token() is None:
        raise FastmemitError(f"{start} you are not logged in to the hub; run hf auth login, or set HF_TOKEN.")
    api = huggingface_hub.HfApi(token=token)
    with told_plainly(repo, "written"):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise FastmemitError(
                f"The repository {repo!r} exists and is public, so nothing was put there; make it "
                "private on its page first, or name another."
            )
        # Files of another kind would lose their card.
        foreign = [name for name in api.list_repo_files(repo) if name not in {*files, CARD, ".gitattributes"}]
        if foreign:
            raise FastmemitError(
                f"The repository {repo!r} holds {foreign[0]!r:.80} already, which is not replaced by "
                "this push, so nothing was put there; name another."
            )
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
            for name, source in {**files, CARD: card.encode()}.items()
        ]
        what = "Edit" if EDIT in files else "Adapter" if CONFIG in files else "Second moments"
        api.create_commit(repo, operations, commit_message=f"{what} from fastmemit")
    return f"https://huggingface.co/{repo}"


def pull_edit(repo: str, *, revision: str | None = None, model: str | None = None, token: str | None = None) -> Delta:
    """Fetch an edit from the hub, verified; a copy that was fetched before serves without a network.

    Args:
        repo: ``USER/NAME``.
        revision: A branch, a tag or a commit; None takes the newest.
        model: The fingerprint that it must be of (`fastmemit.Editor.fingerprint`); None takes any.
        token: A token of the hub; None takes the one that you are logged in with.

    Raises:
        FastmemitError: It cannot be fetched, or the repository holds no edit.
        WrongModel: It is of another model.
    """
    folder = _fetched(repo, revision, token, EDIT)
    if not (folder / EDIT).is_file():
        raise FastmemitError(f"The repository {repo!r} holds no {EDIT}; name one that has an edit.")
    delta = Delta.load(folder / EDIT)
    if model is not None and delta.model != model:
        raise WrongModel(
            f"The edit in {repo!r} was made for the model {delta.model!s:.16} "
            f"({delta.provenance.get('model_name')!s:.80}) but this one is {model:.16}; load that "
            "model, with the same dtype."
        )
    return delta


def pull_statistics(
    repo: str,
    *,
    revision: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    cache: StrPath | None = None,
    token: str | None = None,
) -> Statistics:
    """Fetch second moments from the hub to where edits of their model find them.

    `model` and `tokenizer` are fingerprints that they must be of, `cache` the cache folder; all else is as for
    `pull_edit`. What is returned is in the cache, for `fastmemit.Editor.use`.

    Raises:
        FastmemitError: They cannot be fetched, or the repository holds none.
        StoreMismatch: They are of another model or tokenizer, or of a newer format.
    """
    folder = _fetched(repo, revision, token, f"{MOMENTS}/*.safetensors") / MOMENTS
    if not any(folder.glob("*.safetensors")):
        raise FastmemitError(
            f"The repository {repo!r} holds no second moments; name one that has some, or pull an edit (--out FILE)."
        )
    found = open_statistics(folder)
    for field, expected in (("model", model), ("tokenizer", tokenizer)):
        stored = found.provenance[field]
        if expected is not None and stored != expected:
            raise fastcov.StoreMismatch(
                f"The statistics in {repo!r} are of another {field} ({stored:.16}, not "
                f"{expected:.16}); load the model that they are of, with the same dtype.",
                field=field,
                stored=stored,
                expected=expected,
            )
    return cache_statistics(found, (cache_dir() if cache is None else Path(cache)) / "statistics")


def _fetched(repo: str, revision: str | None, token: str | None, files: str) -> Path:
    """A folder with those files and the card, as far as the repository has them; nothing else is ever fetched."""
    check_repo(repo)
    import huggingface_hub

    with told_plainly(repo, "fetched"):
        wanted = [files, CARD]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, token=token))


def open_statistics(folder: StrPath) -> Statistics:
    """The moments in a folder that ``fastmemit precompute`` made; every byte is verified, and there must be one."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"There is no moment in {os.fspath(folder)!r}; name a folder of statistics, as "
            "fastmemit precompute lists its files."
        )
    stored = []
    forms = {"model": _FINGERPRINT, "tokenizer": _FINGERPRINT, "module": _MODULE}
    for file in files:
        moment, provenance = fastcov.load_moment(file)
        wrong = lacking_fields(provenance)  # what could not have been written by `precompute`
        wrong += [n for n, form in forms.items() if not form.fullmatch(str(provenance.get(n)))]
        if wrong:
            raise DamagedFile(_damaged(file, f"does not say its {wrong[0]} ({provenance.get(wrong[0])!r:.80})"))
        if provenance["module"] != file.stem:
            raise DamagedFile(_damaged(file, f"is of the module {provenance['module']!r:.80}"))
        check_moment(file, provenance, moment)
        stored.append(provenance)
    for file, provenance in zip(files, stored, strict=True):
        try:
            compare_provenance(file, provenance, shared_of(stored[0]))
        except fastcov.StoreMismatch as differs:
            others = f"than {files[0].name} ({differs.expected!r:.80})"
            raise DamagedFile(
                _damaged(file, f"is of another {differs.field} ({differs.stored!r:.80}) {others}")
            ) from differs
    return Statistics({p["module"]: file for p, file in zip(stored, files, strict=True)}, common_provenance(stored))


def cache_statistics(found: Statistics, folder: Path) -> Statistics:
    """Copy what `open_statistics` gave to the folder ``statistics`` of a cache; a file that is there already stays."""
    # Names come from what the files say and what was checked, not from how they were called.
    home = home_of(folder / found.provenance["model"][:16], shared_of(found.provenance))
    return Statistics(copy_moments(found.paths, found.provenance, home.parent, home.name), found.provenance)


def _damaged(file: Path, what: str) -> str:
    return f"The moment {str(file)!r} {what}, so it belongs to no statistics; get it again."


def check_repo(repo: str) -> str:
    """The name of a repository, ``USER/NAME``; a `BadConfig` where it cannot be one."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".")):
        raise BadConfig(f"{repo!r:.120} is no name of a repository on the hub; write USER/NAME.")
    return repo


@contextmanager
def told_plainly(repo: str, doing: str) -> Iterator[None]:
    """Turn what the hub refuses ("fetched" or "written") into one FastmemitError; the disk's own errors pass."""
    try:
        yield
    except Exception as error:
        if (reason := _reason(repo, error)) is None:
            raise
        raise FastmemitError(f"The repository {repo!r} could not be {doing}{reason}") from error


def _reason(repo: str, error: Exception) -> str | None:
    """What an error means, or None if it is not the hub's."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for kind in type(error).__mro__}  # they moved between versions
    status = getattr(getattr(error, "response", None), "status_code", None)
    page, owner = f"https://huggingface.co/{repo}", repo.partition("/")[0]
    offline = constants.HF_HUB_OFFLINE or "OfflineModeIsEnabled" in kinds
    if offline and kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return ", because HF_HUB_OFFLINE is set and no copy is kept; unset it, or work from files."
    why: dict[str, set[object]] = {
        f"it is gated; ask for access at {page} and log in (hf auth login)": {"GatedRepoError"},
        "there is none of this name, or it is private; correct the name, or log in (hf auth login) as somebody who may "
        "see it": {"RepositoryNotFoundError"},
        "it has no such revision; name a branch, a tag or a commit of it": {"RevisionNotFoundError"},
        "you are not logged in; run hf auth login, or set HF_TOKEN": {"LocalTokenNotFoundError", 401},
        f"your token may not do this; log in with one that may write to {owner} (hf auth login)": {403},
        "the hub cannot be reached from here; try again with a network": {
            "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "Timeout", "TimeoutException", "TimeoutError",
        },
    }  # fmt: skip
    for reason, those in why.items():
        if those & {*kinds, status}:
            return f", because {reason}."
    if kinds & {"HfHubHTTPError", "HTTPError", "EntryNotFoundError", "TransportError"}:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:160].rstrip(".") if lines else type(error).__name__
        return f" ({reason}); try again later, or see {page}."
    return None


def edit_card(
    delta: Delta,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    scores: Mapping[str, float] | None = None,
) -> str:
    """The card of an edit: what it changes, how it was made, how to load it; arguments and errors as of `push_edit`.

    Everything on record is shown as plain text, whatever characters it holds.
    """
    about = delta.provenance
    method = str(about.get("method", "unknown"))
    base = _base(base_model, about.get("model_name"))
    model = base or "MODEL"
    tags = ["knowledge-editing", "model-editing", *([method] if method in (*METHODS, "lora") else [])]
    facts = facts_of(delta)
    former = [fact.get("former") for entry in delta.entries for fact in entry["facts"]]
    shown = [
        (f.text, f.target.strip(), says or (f.target_true or "").strip())
        for f, says in zip(facts, former, strict=False)
    ]
    weights = [(n, f"{left.shape[0]} x {right.shape[0]}", left.shape[1]) for n, (left, right) in delta.factors.items()]
    pieces = [
        (place, part.digest()[:16], part.provenance.get("method", ""), len(facts_of(part)))
        for place, part in enumerate(parts(delta), 1)
    ]
    return _card(
        _header(license, base, tags, repo, scores),
        f"# {repo.rpartition('/')[2]}",
        f"An edit of {plain(base or about.get('model_name') or 'a language model')}: {counted(len(facts), 'fact')}, "
        f"written by {plain(method)} as a change of low rank. The edited model gives the new answers as if they were "
        "true, whether they are or not.",
        "## What it changes",
        _listed(("prompt", "new answer", "former answer"), shown, ", in the file's provenance"),
        table(("weight", "shape", "rank"), weights),
        "It is composed of:" if len(pieces) > 1 else "",
        table(("", "digest", "method", "facts"), pieces) if len(pieces) > 1 else "",
        "## How it was made",
        table(("what", "value"), _how(delta)),
        table(("score", "value"), [(name, f"{value:g}") for name, value in scores.items()]) if scores else "",
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

    fastmemit hub pull --repo {repo} --out edit.safetensors
    fastmemit apply --model {model} --edit edit.safetensors --prompt "..." """.rstrip(),
        "`edit.safetensors` holds factors and JSON, and nothing that runs. It is refused by any "
        "model but the one whose fingerprint it bears.",
    )


def model_card(base: str, entries: Sequence[Mapping[str, Any]], source: Path | None) -> str:
    """The card of an edited model: that of the folder it came from, if any, with a section of its `Delta.entries`."""
    file = None if source is None else source / CARD
    if file is not None and file.is_file() and file.stat().st_size <= _CARD_BYTES:
        card = file.read_text(encoding="utf-8", errors="replace")
        above, _, below = card.partition(_BEGIN)
        _, end, below = below.partition(_END)
        card = (above + below if end else card).rstrip()
    else:
        card = _header(None, _base(None, base), ["knowledge-editing"], "", library="transformers")
    rows = [
        (*fact_text(fact), fact.get("former", ""), f"{entry['digest'][:12]} by {entry['method']}")
        for entry in entries
        for fact in entry["facts"]
    ]
    number = counted(len(entries), "edit")
    return _card(
        card,
        _BEGIN,
        "## Edited facts",
        f"The weights are those of {plain(base)} with {number} by fastmemit. The model gives the new answers as if "
        f"they were true, whether they are or not. `{RECORD}` has the edits' digests.",
        _listed(("prompt", "new answer", "former answer", "edit"), rows, f", in `{RECORD}`"),
        _END,
    )


def statistics_card(found: Statistics, repo: str, *, license: str | None = None, base_model: str | None = None) -> str:
    """The card of second moments: of which model, on which text, from how many keys; all else as of `edit_card`."""
    about = found.provenance
    base = _base(base_model, about.get("model_name"))
    model = base or "MODEL"
    corpus = _part(about, "corpus")
    moments = {module: found.moment(module) for module in found.paths}
    rows = [(n, m.d, m.count, str(m.lower.dtype).rpartition(".")[2]) for n, m in moments.items()]
    made = fastcov.read_provenance(next(iter(found.paths.values())))
    collected = [
        ("model", about.get("model_name", "")),
        ("model fingerprint", about.get("model", "")),
        ("tokenizer fingerprint", about.get("tokenizer", "")),
        ("corpus", corpus.get("name", "")),
        ("corpus fingerprint", corpus.get("fingerprint", "")),
        ("multiplier (keys per width)", _shown(about.get("multiplier"))),
        ("documents cut at", about.get("context", "unknown")),
        ("first positions", "counted" if about.get("bos", True) else "left out"),
        *([("forward passes in", about["forward"])] if "forward" in about else []),
        ("seed", "unknown" if about.get("seed") is None else about["seed"]),
        ("versions", _versions(made)),
    ]
    return _card(
        _header(license, base, ["knowledge-editing", "model-editing", "covariance"], repo),
        f"# {repo.rpartition('/')[2]}",
        f"Second moments of the keys of {plain(base or about.get('model_name') or 'a model')}, "
        "which ROME, EMMET, MEMIT and their relatives need: collected once, for every later edit.",
        "## What they are of",
        table(("what", "value"), collected),
        table(("module", "width d_k", "keys", "dtype of the sum"), rows),
        "## How to use them",
        f"""```python
from fastmemit import Editor
from fastmemit.sharing import pull_statistics

editor = Editor.from_pretrained("{model}")
editor.store.use(pull_statistics("{repo}", model=editor.fingerprint))
```""",
        f"""On the command line, after which `fastmemit edit --model {model}` finds them:

    fastmemit hub pull --repo {repo} --model {model}""",
    )


def _card(*sections: str) -> str:
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(
    license: str | None,
    base: str | None,
    tags: list[str],
    repo: str,
    scores: Mapping[str, float] | None = None,
    library: str = "fastmemit",
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    if license is not None and not _LICENSE.fullmatch(license):
        raise BadConfig(f"{license!r:.80} is no licence's short name; write one as apache-2.0.")
    about = {"task_type": "text-generation", "dataset_type": "facts", "dataset_name": "the facts of this edit"}
    measured = [EvalResult(**about, metric_type=name, metric_value=value) for name, value in (scores or {}).items()]
    data = ModelCardData(
        library_name=library,
        base_model=base,
        license=license,
        tags=tags,
        model_name=repo.rpartition("/")[2] if measured else None,
        eval_results=measured or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _base(asked: str | None, on_record: Any) -> str | None:
    """A name that the hub accepts for the base model, or None: a GGUF file and the demonstration's model have none."""
    if asked is not None and not _HUB_MODEL.fullmatch(asked):
        raise BadConfig(f"{asked!r:.80} is no name of a model on the hub; write USER/NAME.")
    named = isinstance(on_record, str) and _HUB_MODEL.fullmatch(on_record)
    return asked or (on_record if named and on_record != DEMO_MODEL and not on_record.endswith(".gguf") else None)


def _how(delta: Delta) -> list[tuple[str, object]]:
    about = delta.provenance
    rows: list[tuple[str, object]] = [
        ("model", about.get("model_name", "")),
        ("model fingerprint", about.get("model", "")),
        ("method", about.get("method", "")),
    ]
    rows += [(f"setting {k}", _shown(v)) for k, v in _part(about, "settings").items() if k != "method"]
    if isinstance(about.get("statistics"), Mapping):
        statistics = about["statistics"]
        rows.append(("corpus", _part(statistics, "corpus").get("name", "")))
        rows.append(("multiplier", _shown(statistics.get("multiplier"))))
        rows.append(("keys per layer", statistics.get("keys", statistics.get("budget", ""))))
    if about.get("on_top_of"):
        rows.append(("computed on top of", about["on_top_of"]))
    return [*rows, ("versions", _versions(about)), ("digest", delta.digest())]


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):  # a tuple comes back from a file as a list
        return ", ".join(map(str, value))
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else value


def _versions(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in _part(about, "versions").items())


def _part(about: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of what is on record that has parts itself; empty where the record has something else there."""
    found = about.get(name)
    return found if isinstance(found, Mapping) else {}


def _listed(head: Sequence[str], rows: Sequence[Sequence[object]], where: str = "") -> str:
    """A table of facts, of which those beyond `LISTED` are counted; nothing where there are none."""
    more = f"\n\nAnd {len(rows) - LISTED} more{where}." if len(rows) > LISTED else ""
    return table(head, rows[:LISTED]) + more if rows else ""


def plain(text: object, longest: int = 200) -> str:
    """Text from anywhere for one line or one table cell of Markdown, as text: no table, link or HTML comes of it.

    White space becomes single spaces, other control characters and marks of direction go, what has a meaning in
    Markdown or HTML becomes an entity, and what is longer than `longest` is cut.
    """
    words = " ".join(str(text).split())
    seen = "".join(c for c in words if c not in _TURNS and unicodedata.category(c) not in _UNSEEN)
    if len(seen) > longest:
        seen = seen[: longest - 1] + "…"
    # Ampersand first, so that an entity in the text stays what it was written as.
    return _ACTIVE.sub(lambda match: f"&#{ord(match[0])};", html.escape(seen, quote=False))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; every cell is escaped."""
    lines = ["| " + " | ".join(map(plain, head)) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    return "\n".join(lines)
