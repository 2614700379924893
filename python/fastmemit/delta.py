"""The edit as a file: low-rank factors of what each weight gains, with what they were made for.

And what a saved model says of the edits that are in its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.files import StrPath, atomic_file, parse_json, write_safetensors
from fastcov.hooks import isolated
from fastmemit.errors import DamagedFile, NonFiniteEdit, WrongModel

FORMAT = "fastmemit-delta"
VERSION = 1
#: Beside the weights of a saved model: which edits are in them (docs/reference/store-format.md).
RECORD = "fastmemit.json"
_RECORD_FORMAT = "fastmemit-model"
_RECORD_BYTES = 1 << 26
_MOMENTS = ":moments"


@dataclass(frozen=True)
class Delta:
    """What an edit adds to the weights of a model, and the file of it (docs/reference/store-format.md).

    It knows nothing of how it was found. It can be added to the weights it names, saved, and loaded on another machine.

    Attributes:
        factors: Weight name -> (left (rows, r), right (columns, r)), float32 on the CPU, in the weight's own
            orientation: ``W' - W = left @ right^T``, r at most the number of facts and the smaller side.
        provenance: JSON values: the model's fingerprint (``model``), method, settings, requests, versions.
        moments: Of an edit by UltraEdit: weight name -> (2, columns + rows) float32 on the CPU, mean and root mean
            square deviation of what the edit read of its tokens, which later edits are normalised by; how many there
            were is ``provenance["tokens"]``.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        """The fingerprint of the model that the delta was made for, if it is on record."""
        return self.provenance.get("model")

    @property
    def requests(self) -> list[Any]:
        """The facts on record as they were read; none where the record holds no list of them."""
        found = self.provenance.get("requests")
        return found if isinstance(found, list) else []

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What a saved model says of this edit: its digest, method and facts; of a composition those of each part."""
        listed = self.provenance.get("parts")
        parts: list[tuple[str, Mapping[str, Any]]] = []
        for each in listed if isinstance(listed, list) else ():
            digest, about = (each.get("digest"), each.get("provenance")) if isinstance(each, Mapping) else (None, None)
            if not isinstance(digest, str) or not isinstance(about, Mapping):
                parts = []  # a list of something else; `sharing.parts` says what is wrong with it
                break
            parts.append((digest, about))
        return [
            {"digest": digest, "method": str(about.get("method", "unknown")), "facts": _facts(about)}
            for digest, about in parts or [(self.digest(), self.provenance)]
        ]

    @property
    def digests(self) -> frozenset[str]:
        """Its digest, and those of the parts of a composition."""
        return frozenset((self.digest(), *(entry["digest"] for entry in self.entries)))

    def digest(self) -> str:
        """SHA-256 (hex) over names, shapes and bytes of all factors, and of moments where there are any."""
        # Read again only where a factor was written or replaced since; the tensors are held, so that no other one gets
        # their numbers.
        named = [(name, side) for name in sorted(self.factors) for side in self.factors[name]]
        named += [(f"{name}{_MOMENTS}", self.moments[name]) for name in sorted(self.moments)]
        names, sides = [name for name, _ in named], [side for _, side in named]
        marks = _marks(sides)
        known, text, _ = self.__dict__.get("_digest", (None, "", ()))
        if marks is not None and known == (names, marks):
            return str(text)
        digest = hashlib.sha256()
        for name, side in named:
            digest.update(f"{name}{tuple(side.shape)}".encode())
            digest.update(side.contiguous().numpy().tobytes())
        self.__dict__["_digest"] = ((names, marks), digest.hexdigest(), sides)
        return digest.hexdigest()

    def save(self, path: StrPath) -> None:
        """Write the delta as safetensors; a file of this name is replaced only by a whole one.

        The same delta gives the same bytes.

        Raises:
            OSError: The file cannot be written; nothing is left of the attempt.
            NonFiniteEdit: A factor holds NaN or infinity.
            ValueError: The provenance is nested deeper than any reader goes, or has NaN.
        """
        tensors = {}
        for name, (left, right) in sorted(self.factors.items()):
            _check_finite(name, left, right)
            tensors[f"{name}:left"], tensors[f"{name}:right"] = left, right
        tensors |= {f"{name}{_MOMENTS}": moments for name, moments in sorted(self.moments.items())}
        provenance = json.dumps(self.provenance, sort_keys=True)
        parse_json(provenance)  # what `load` would refuse is not written
        about = {"format": FORMAT, "version": str(VERSION), "provenance": provenance}
        with atomic_file(path) as file:
            write_safetensors(file, tensors, {**about, "sha256": _seal(self.digest(), provenance)})

    @classmethod
    def load(cls, path: StrPath) -> Delta:
        """Read a delta, every byte verified.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedFile: It is no delta, was cut short or altered, or is of a newer version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no edit file {os.fspath(path)!r}; give the path that --out wrote.")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DamagedFile(_damaged(path, "is not an edit file of fastmemit"))
                if metadata.get("version", "") != str(VERSION):
                    raise DamagedFile(
                        f"The edit file {os.fspath(path)!r} has version {metadata.get('version', '')!r:.40} but this "
                        f"fastmemit reads {VERSION}; upgrade fastmemit."
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise DamagedFile(_damaged(path, f"is not a readable safetensors file ({error!s:.120})")) from error
        moments = {name.removesuffix(_MOMENTS): tensors.pop(name) for name in [*tensors] if name.endswith(_MOMENTS)}
        factors = _pairs(path, tensors)
        for name, found in moments.items():
            width = sum(side.shape[0] for side in factors.get(name, ()))
            if found.dtype != torch.float32 or tuple(found.shape) != (2, width) or not bool(found.isfinite().all()):
                raise DamagedFile(_damaged(path, f"holds moments of {name:.80} that do not fit its factors"))
        try:
            provenance = parse_json(metadata["provenance"])
        except (KeyError, ValueError) as error:
            raise DamagedFile(_damaged(path, "has no readable provenance")) from error
        delta = cls(factors, provenance if isinstance(provenance, dict) else {}, moments)
        if metadata.get("sha256") != _seal(delta.digest(), metadata["provenance"]):
            raise DamagedFile(_damaged(path, "holds other bytes than were written"))
        for name, pair in factors.items():
            if not all(bool(torch.isfinite(factor).all()) for factor in pair):
                raise DamagedFile(_damaged(path, f"holds NaN or infinity in its factors of {name:.80}"))
        return delta

    def check(self, model: nn.Module) -> None:
        """Refuse what could not be added to a model's weights; nothing is changed.

        Weights that are not in memory or not in floating point are compared by their shape alone.

        Raises:
            WrongModel: The model lacks a weight or has it in another shape; the message names the weight and both
                shapes.
            NonFiniteEdit: A factor holds NaN or infinity, or the weight would with the change: the product of the
                factors, or its sum with the weight, is too large for its dtype.
        """
        weights = dict(model.named_parameters(remove_duplicate=False))
        for name, (left, right) in self.factors.items():
            shape = (left.shape[0], right.shape[0])
            found = tuple(weights[name].shape) if name in weights else None
            if found != shape:
                has = "has no such weight" if found is None else f"has it as {found}"
                raise WrongModel(
                    f"The edit changes {name:.120} of shape {shape} but this model {has}; "
                    "apply it to the model that it was made for."
                )
        for name, (left, right) in self.factors.items():
            _check_finite(name, left, right)
            _check_sum(name, weights[name], left, right)

    @isolated()
    def add_to(self, model: nn.Module) -> None:
        """Add the change to the model's weights, all or none; errors are those of `weights`, and change nothing."""
        weights = self.weights(model)
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            for name, (left, right) in self.factors.items():
                add_low_rank(weights[name], left, right)
        except BaseException:
            for name, weight in weights.items():
                restore(weight, before[name])
            raise

    def check_stored(self, model: nn.Module) -> None:
        """Refuse quantised weights; one that the model lacks is left to `check`.

        Raises:
            WrongModel: One is packed, of whole numbers, or of fewer than 16 bits.
        """
        for name, weight in model.named_parameters(remove_duplicate=False):
            if name in self.factors and not (type(weight) is nn.Parameter and _is_plain(weight)):
                raise WrongModel(
                    f"The edit changes {name}, which is stored as {weight.dtype} "
                    f"({type(weight).__name__}); load the model in floating point."
                )

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that the change can be added to, by name.

        Raises:
            WrongModel: A weight is missing, of another shape, not stored in floating point or not in memory.
            NonFiniteEdit: A weight would hold NaN or infinity.
        """
        self.check_stored(model)
        self.check(model)
        named = dict(model.named_parameters(remove_duplicate=False))
        for name in self.factors:
            if named[name].is_meta:
                raise WrongModel(
                    f"The edit changes {name}, which is not in memory (device meta); load the "
                    "model without offloading it."
                )
        return {name: named[name] for name in self.factors}


def _facts(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The facts of a provenance as texts, each with the model's former answer where it is on record."""
    requests, former = about.get("requests"), about.get("former")
    requests = requests if isinstance(requests, list) else []
    if not isinstance(former, list) or len(former) != len(requests):
        former = [None] * len(requests)
    return [
        {
            **{name: text for name in ("prompt", "subject", "target_new") if isinstance(text := fact.get(name), str)},
            **({"former": says} if isinstance(says, str) else {}),
        }
        for fact, says in zip(requests, former, strict=True)
        if isinstance(fact, Mapping)
    ]


def fact_text(fact: Mapping[str, Any]) -> tuple[str, str]:
    """Of a fact in `Delta.entries` the prompt with its subject in it, and the new answer."""
    return fact.get("prompt", "").replace("{}", fact.get("subject", "")), fact.get("target_new", "").strip()


def model_record(name: str, model: str, entries: list[dict[str, Any]]) -> bytes:
    """The content of a saved model's `RECORD`: its base model's name and fingerprint, and `Delta.entries` in order."""
    base = {"name": name, "fingerprint": model}
    record = {"format": _RECORD_FORMAT, "version": VERSION, "base": base, "edits": entries}
    return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def read_record(folder: StrPath) -> dict[str, Any]:
    """What a saved model's folder says of its edits: ``base`` (name, fingerprint) and ``edits`` (see `Delta.entries`).

    Nothing where the folder has no `RECORD`.

    Raises:
        DamagedFile: The record cannot be read, or is of a newer version.
    """  # noqa: DOC501 (a ValueError is caught here)
    path = Path(folder) / RECORD
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _RECORD_BYTES:
            raise ValueError("it is too large")
        record = parse_json(path.read_bytes())
        if not isinstance(record, dict) or record.get("format") != _RECORD_FORMAT:
            raise ValueError(f"it is not of the format {_RECORD_FORMAT}")
        if record.get("version") != VERSION:
            raise ValueError(f"it has version {record.get('version')!r:.40} and this fastmemit reads {VERSION}")
        base, entries = record.get("base"), record.get("edits")
        if not isinstance(base, dict) or not all(isinstance(base.get(n), str) for n in ("name", "fingerprint")):
            raise ValueError("it does not name the base model")
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ValueError("its list of edits is not one")
    except ValueError as error:
        raise DamagedFile(
            f"{str(path)!r} says which edits are in the model and cannot be read ({error}); get the model again, or "
            "remove that file if it is not known which edits it has."
        ) from error
    return record


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("digest"), str)
        and isinstance(entry.get("method"), str)
        and isinstance(entry.get("facts"), list)
        and all(isinstance(fact, dict) and all(isinstance(v, str) for v in fact.values()) for fact in entry["facts"])
    )


@isolated()
def add_low_rank(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """``weight += left @ right^T`` in place, factors (rows, B) and (columns, B) float32, rounded once to its dtype.

    The one place where factors meet a weight, so that a delta gives the same bits whether it was just computed or comes
    from a file.
    """
    weight.copy_(_sum(weight, left, right))
    torch.clear_autocast_cache()  # which would go on with a copy of the former weight


@isolated()
def compact(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (rows, B) and (columns, B) of a change as they are, or others of the same change that take less.

    There are less where B is above rows or columns: the change itself beside an identity, which multiplies to the same
    numbers bit for bit.
    """
    rows, columns = left.shape[0], right.shape[0]
    if left.shape[1] <= min(rows, columns):
        return left, right
    change = left @ right.mT
    if rows <= columns:
        return torch.eye(rows, dtype=change.dtype, device=change.device), change.mT
    return change, torch.eye(columns, dtype=change.dtype, device=change.device)


@isolated()
def restore(weight: Tensor, saved: Tensor) -> None:
    """Copy saved bits back into a weight."""
    weight.copy_(saved)
    torch.clear_autocast_cache()


def _sum(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    gain = left.to(weight.device) @ right.to(weight.device).T
    return weight.float().add_(gain) if weight.dtype != torch.float32 else weight + gain


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() >= 2


def _check_finite(name: str, left: Tensor, right: Tensor) -> None:
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NonFiniteEdit(f"The edit holds NaN or infinity in its factors of {name}; get or make it again.")


@isolated()
def _check_sum(name: str, weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse a change after which a weight would hold NaN or infinity."""
    if weight.is_meta or not _is_plain(weight) or not weight.numel():
        return
    largest = torch.finfo(weight.dtype).max
    # No number of the product is beyond the longest row of one factor times that of the other (Cauchy and Schwarz);
    # only where that does not show that all is well is the sum made.
    bound = left.double().norm(dim=1).max() * right.double().norm(dim=1).max()
    low, high = torch.aminmax(weight)
    if float(torch.maximum(-low, high)) + float(bound) < 0.99 * largest:  # NaN is not
        return
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteEdit(f"The model's own {name} holds NaN or infinity before the edit; load the model again.")
    if not bool(torch.isfinite(_sum(weight, left, right).to(weight.dtype)).all()):
        raise NonFiniteEdit(
            f"With the edit {name} would hold numbers beyond {largest:.3g}, the largest of "
            f"{str(weight.dtype).removeprefix('torch.')}; load the model in bfloat16 or float32, "
            "or make a smaller edit."
        )


def _marks(tensors: list[Tensor]) -> list[tuple[int, int]] | None:
    """What differs when one was written or replaced; None where that cannot be told."""
    try:
        return [(id(tensor), tensor._version) for tensor in tensors]
    except RuntimeError:  # a tensor of inference mode has no version
        return None


def _seal(digest: str, provenance: str) -> str:
    return hashlib.sha256(f"{digest}{provenance}".encode()).hexdigest()


def _pairs(path: StrPath, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    names = sorted({name.rpartition(":")[0] for name in tensors})
    factors = {}
    for name in names:
        left, right = tensors.get(f"{name}:left"), tensors.get(f"{name}:right")
        if left is None or right is None or not name or len(tensors) != 2 * len(names):
            raise DamagedFile(_damaged(path, "does not hold a left and a right factor for each weight"))
        sound = all(t.dim() == 2 and t.dtype == torch.float32 for t in (left, right))
        if not sound or left.shape[1] != right.shape[1]:
            raise DamagedFile(_damaged(path, f"holds factors of {name:.80} that do not fit each other"))
        factors[name] = (left, right)
    return factors


def _damaged(path: StrPath, what: str) -> str:
    return f"The file {os.fspath(path)!r} {what}; get or make the edit again."
