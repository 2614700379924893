"""Edits on a model: applied, undone bit for bit, and refused where an undo would not be one."""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastcov.files import StrPath
from fastcov.hooks import isolated
from fastmemit.answers import Outcome, Reply
from fastmemit.delta import Delta, add_low_rank, restore
from fastmemit.display import Described
from fastmemit.errors import BadRequest, BadUndo, WrongModel, counted
from fastmemit.models import Watch, checksum, checksums, fingerprint
from fastmemit.request import EditRequest

log = logging.getLogger(__name__)


#: Copies of a weight beside the one without edits.
COPIES = 3
#: Further copies of bits that adding again does not give.
PINNED = 8

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Link:
    """One delta on the weight, the checksum with it, and what the addition may depend on."""

    owner: object
    factors: Factors
    checksum: str
    device: torch.device
    threads: int


class Chain:
    """The deltas on one weight, which is unedited when the chain is made: its bits below each, without a copy for each.

    The bits without any edit are held once. Those between two edits come from adding the deltas again in their order,
    to the copy that is nearest below, and a checksum that was taken when they were in the weight decides whether these
    are they. A few copies are held in between, so that going back through many edits does not begin at the bottom every
    time.
    """

    def __init__(self, weight: Tensor) -> None:
        self._links: list[_Link] = []
        self._copies: dict[int, Tensor] = {0: weight.detach().clone()}  # below how many links
        self._pinned: set[int] = set()

    def __len__(self) -> int:
        """How many deltas there are."""
        return len(self._links)

    @property
    def checksum(self) -> str:
        """The checksum of the weight as it is to be now."""
        return self._links[-1].checksum if self._links else checksum(self._copies[0])

    def covered(self, weight: Tensor) -> Tensor:
        """A copy of the weight's bits, which another delta is about to cover; BadUndo if they cannot be had again."""
        place = len(self._links)
        if place in self._copies:
            return self._copies[place]
        copy = weight.detach().clone()
        below = self._copies.get(place - 1)
        if below is not None and not torch.equal(self._added(place - 1, below), copy):
            if len(self._pinned) >= PINNED:
                raise BadUndo(
                    f"Adding a delta to a weight on {weight.device} does not give the same bits "
                    f"twice, and {PINNED} copies are kept for that already; undo an edit first."
                )
            self._pinned.add(place)
        self._keep(place, copy)
        return copy

    def add(self, owner: object, factors: Factors, weight: Tensor, checksum: str) -> None:
        """Note a delta that was added to the weight, which has this checksum with it."""
        self._links.append(_Link(owner, factors, checksum, weight.device, torch.get_num_threads()))

    def cut(self, owner: object) -> None:
        """Forget the last delta if it is this owner's, and copies of bits that nothing covers."""
        if self._links and self._links[-1].owner is owner:
            self._links.pop()
        for place in [place for place in self._copies if place >= max(len(self._links), 1)]:
            del self._copies[place]
            self._pinned.discard(place)

    def before(self) -> Tensor:
        """The bits below the last delta, not to be written to; BadUndo where adding again does not give them."""
        place = len(self._links) - 1
        start = max(below for below in self._copies if below <= place)
        if start == place:
            return self._copies[place]
        wanted = self._links[place - 1].checksum
        for recorded in (False, True):
            found = self._replayed(start, place, recorded=recorded)
            if checksum(found) == wanted:
                return found
        raise BadUndo(
            "The weights below this edit cannot be computed again bit for bit, because torch adds otherwise now than "
            "when the edits were applied (another device or library); load the model again to be rid of its edits."
        )

    def _replayed(self, start: int, place: int, *, recorded: bool) -> Tensor:
        bits = self._copies[start].clone()
        halfway = start + (place - start + 1) // 2
        for each in range(start, place):
            bits = self._added(each, bits, recorded=recorded, in_place=True)
            # Half of the way, then half of the rest: whoever goes back further will begin there.
            if each + 1 == halfway < place:
                halfway += (place - halfway + 1) // 2
                if checksum(bits) == self._links[each].checksum:
                    self._keep(each + 1, bits.clone())
        return bits

    def _added(self, place: int, bits: Tensor, *, recorded: bool = False, in_place: bool = False) -> Tensor:
        """The bits with the delta at a place on them."""
        link = self._links[place]
        bits = bits if in_place else bits.clone()
        if not recorded:
            add_low_rank(bits, *link.factors)
            return bits
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(link.threads)
            there = bits.to(link.device)
            add_low_rank(there, *link.factors)
            return there.to(bits.device)
        finally:
            torch.set_num_threads(threads)

    def _keep(self, place: int, copy: Tensor) -> None:
        """Keep a copy; where there are too many, drop the one whose neighbours are nearest, as seen from the top."""
        self._copies[place] = copy
        free = sorted(self._copies.keys() - self._pinned - {0})
        if len(free) > COPIES:
            places = [*sorted(self._copies), len(self._links) + 1]

            def missed(one: int) -> float:
                at = places.index(one)
                return (places[at + 1] - places[at - 1]) / (places[-1] - one + 1)

            with suppress(KeyError):
                del self._copies[min(free[:-1], key=missed)]


class Edit(Described):
    """One edit of one model: a delta, and whether it is in the weights now.

    Made by `fastmemit.Editor`; a file of it holds the delta alone. In a with statement the model has the edit inside,
    and is as before behind: an edit that is applied already stays so inside and is undone behind; of several blocks
    with one edit the outermost undoes it. If something is raised inside, later edits that lie on this one are undone
    with it. Other threads that want to use the model wait until the end of the block; should an interrupt come just as
    it ends, the edit can be in the weights still and the others wait, until `undo`.

    Attributes:
        delta: What it adds to the weights.
        outcomes: What became of each fact when the edit was made, in their order; empty where the model was not asked,
            as for an edit from a file.
    """

    def __init__(self, delta: Delta, stack: EditStack) -> None:
        self.delta = delta
        self.outcomes: tuple[Outcome, ...] = ()
        self._stack = stack
        self._blocks: list[AbstractContextManager[Edit]] = []  # that are open now, the innermost last

    @property
    def applied(self) -> bool:
        """Whether the edit is in the weights now."""
        return self._stack.holds(self)

    def apply(self) -> Edit:
        """Put the edit into the weights.

        Raises:
            BadUndo: It is in them already, as this object, from another file, or since the model was saved with it.
            WrongModel: The model lacks a weight, or has it in another shape, not in floating point or not in memory.
        """
        self._stack.push(self)
        return self

    def undo(self) -> None:
        """Give the weights the bits that they had before this edit.

        Raises:
            BadUndo: The edit is not applied; a later edit of the same weights still is; or something else has changed
                the weights since.
        """
        self._stack.pop(self)
        while self._blocks:  # also one whose end an interrupt has stopped: it would hold the lock for ever
            self._blocks.pop().__exit__(None, None, None)

    def __enter__(self) -> Edit:
        block = self._stack.block(self)
        with self._stack.lock:
            try:
                self._blocks.append(block)
                return block.__enter__()
            except BaseException as error:
                self._blocks = [each for each in self._blocks if each is not block]
                block.__exit__(type(error), error, error.__traceback__)
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._blocks:
            self._blocks.pop().__exit__(kind, error, trace)
            return
        with self._stack.lock:  # it was undone inside, which ended its blocks, and perhaps applied again
            self._stack.close(self, raised=error is not None)

    def remember(self, former: Sequence[Reply]) -> None:
        """Put on record what the model said of each fact without the edit, so that its file says it too."""
        about = {**self.delta.provenance, "former": [reply.says for reply in former]}
        self.delta = replace(self.delta, provenance=about)

    def save(self, path: StrPath) -> None:
        """Write the delta to a safetensors file.

        Raises:
            OSError: The file cannot be written; a former file stays as it was.
        """
        self.delta.save(path)

    def save_adapter(self, folder: StrPath, **settings: Any) -> Path:
        """Write the edit as a LoRA adapter for PEFT; see `fastmemit.sharing.save_adapter`, also for the settings."""
        from fastmemit.sharing import save_adapter

        return save_adapter(self.delta, self._stack.model, folder, **settings)

    def push_to_hub(self, repo: str, **settings: Any) -> str:
        """Put the edit on the hub with a card; see `fastmemit.sharing.push_edit`, also for the settings."""
        from fastmemit.sharing import push_edit

        return push_edit(self.delta, repo, **settings)

    def describe(self) -> str:
        """One line for people: how many facts, by which method, whether they took and whether they are applied."""
        method = self.delta.provenance.get("method", "unknown method")
        state = "applied" if self.applied else "not applied"
        said = f", {sum(o.said for o in self.outcomes)} of them said" if self.outcomes else ""
        return f"{counted(len(self.delta.requests), 'fact')} by {method!s:.20}{said}, {state}"

    def rows(self) -> list[dict[str, Any]]:
        """What became of each fact, or the facts alone where the model was not asked."""
        if not self.outcomes:
            return [{"fact": _fact(each)} for each in self.delta.requests]
        return [
            {
                "fact": o.request.text + o.request.target,
                "before": o.before.says,
                "after": o.after.says,
                "probability before": o.before.probability,
                "probability after": o.after.probability,
            }
            for o in self.outcomes
        ]


def _fact(request: Any) -> str:
    """A fact on record as a line, whatever the record holds."""
    try:
        fact = EditRequest.from_dict(request)
    except BadRequest:
        return f"{request!s:.80}"
    return fact.text + fact.target


@dataclass
class _Layer:
    """An applied edit."""

    names: tuple[str, ...]  # the weights that it changes
    digest: str  # its delta's
    digests: frozenset[str]  # and its parts'
    state: str  # what identifies the edits up to this one, in their order
    blocks: int = 0  # how many with statements of it are open


@dataclass
class _Journal:
    """What is being written: noted down before, so that what is left of it can be put right."""

    bits: Mapping[str, tuple[Tensor, Tensor]]  # weight name -> the weight, and the bits that it shall have
    edit: Edit | None = None  # that is not in the weights then; None for trial writes
    open: bool = True  # whether whoever writes is at it, as far as one can tell


class EditStack:
    """The edits that are in a model's weights, in the order in which they came; it does not keep the model alive.

    Edits of the same weight are undone last first: a later one was computed on, and rounded onto, what the earlier ones
    left. Edits that share no weight can be undone in any order.

    What is written is noted down first. Whatever is raised in between, an interrupt or the lack of memory, the weights
    are those without the edit, or the edit is on record; where a second interrupt stopped that from being put right,
    the next use of the stack does it.

    Threads that share a model take turns: `lock` is held by whoever reads or writes weights that must not change
    meanwhile. `record` is what the folder of the model says of edits in its weights; see `delta.read_record`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reference = weakref.ref(model)
        self.lock = threading.RLock()
        self.record: dict[str, Any] = {}
        self._watch = Watch()
        self._fingerprint: str | None = None
        self._layers: dict[Edit, _Layer] = {}
        self._chains: dict[str, Chain] = {}
        self._journal: _Journal | None = None

    @classmethod
    def of(cls, model: nn.Module) -> EditStack:
        """The stack of a model: the one that there is, so that editors of one model share it.

        A model whose weights something else has changed since counts as another one, unedited, with a stack of its own.
        """
        found = _stacks.get(model)
        if found is not None:
            changed = found.changed()
            if not changed:
                return found
            if found.edits:
                log.warning(
                    "%s was changed while %d edits were in the weights; they count as part of the "
                    "model now, and cannot be undone",
                    changed[0],
                    len(found.edits),
                )
        with _finding:
            if _stacks.get(model) is found:  # of two threads the first makes it
                _stacks[model] = cls(model)
            return _stacks[model]

    @property
    def model(self) -> nn.Module:
        """The model, for as long as somebody else keeps it alive."""
        model = self._reference()
        if model is None:
            raise WrongModel("The edited model is gone; keep it while its edits are used.")
        return model

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint without any edit of this stack; WrongModel where it cannot be known any more."""
        with self.lock:
            if self._fingerprint is None:
                if self._layers:
                    raise WrongModel("The model was edited before it was identified; undo all edits.")
                self._fingerprint = self._watch.identify(self.model)
            changed = self.changed()
            if changed:
                more = f" and {len(changed) - 1} more were" if len(changed) > 1 else " was"
                raise WrongModel(
                    f"{changed[0]}{more} changed by something else since the model was first used here, so its "
                    "statistics, contexts and targets are those of another model; make a new Editor of it."
                )
            return self._fingerprint

    @property
    def live_fingerprint(self) -> str:
        """As `fingerprint`, but of an unedited model that was changed what it is now."""
        with self.lock:
            if self._fingerprint is not None and not self._layers and self.changed():
                return fingerprint(self.model)
            return self.fingerprint

    def changed(self) -> list[str]:
        """The tensors that something else has changed since the model was identified.

        Between two trial writes nothing is looked at.
        """
        with self.lock:
            if self._journal is not None and not self._journal.open:
                self.settle()
            if self._fingerprint is None or self._journal is not None:
                return []
            model = self.model
            named = dict(model.named_parameters(remove_duplicate=False)) if self._chains else {}
            edited = {name: (named[name], chain.checksum) for name, chain in self._chains.items() if name in named}
            return self._watch.changed(model, edited)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The applied edits, oldest first."""
        return tuple(self._layers)

    def holds(self, edit: Edit) -> bool:
        """Whether an edit is applied."""
        return edit in self._layers

    def check(self, edit: Edit) -> None:
        """Refuse an edit of another model's stack by `WrongModel`."""
        if edit._stack is not self:
            raise WrongModel(f"{edit!r} belongs to another editor; save it there and load it with this one.")

    def check_new(self, delta: Delta) -> None:
        """Refuse a delta that is in the weights already, itself or a part of it, by `BadUndo`."""
        digests = delta.digests
        where = None
        if any(entry["digest"] in digests for entry in self.record.get("edits", ())):
            where = "since before the model was saved (fastmemit show lists its edits)"
        elif any(layer.digests & digests for layer in self._layers.values()):
            where = "among the edits that are applied"
        if where is not None and delta.factors:
            raise BadUndo(
                f"The edit {delta.digest():.12} is in the weights already, {where}; applied again it would change them "
                "by twice what its facts need, so leave it out."
            )

    def digests(self) -> list[str]:
        """The digests of the applied edits' deltas, oldest first."""
        return [layer.digest for layer in self._layers.values()]

    def state(self) -> str:
        """What identifies the weights as they are now: the model, then the edits on it."""
        last = next(reversed(self._layers.values()), None)
        return self.fingerprint if last is None else f"{self.fingerprint}+{last.state}"

    @isolated()
    def push(self, edit: Edit) -> None:
        """Apply an edit; see `Edit.apply`."""
        with self.lock:
            self.settle()
            if edit in self._layers:
                raise BadUndo(f"{edit!r} is in the weights already; undo it before applying it again.")
            self.check_new(edit.delta)
            _ = self.fingerprint  # of weights that are still the model's own
            weights = edit.delta.weights(self.model)
            chains = {name: self._chains.get(name) or Chain(weight) for name, weight in weights.items()}
            before = {name: (weight, chains[name].covered(weight)) for name, weight in weights.items()}
            writing = Writing(self, _Journal(before, edit))
            with writing, writing:
                for name, (left, right) in edit.delta.factors.items():
                    add_low_rank(weights[name], left, right)
                after = checksums(weights.items())
                for name, chain in chains.items():
                    chain.add(edit, edit.delta.factors[name], weights[name], after[name])
                self._chains.update(chains)
                last = next(reversed(self._layers.values()), None)
                digest = edit.delta.digest()
                self._layers[edit] = _Layer(tuple(weights), digest, edit.delta.digests, _joined(last, digest))
                self._journal = None  # from here on the edit is in the weights
            self._watch.trust(weights.values())

    @isolated()
    def pop(self, edit: Edit) -> None:
        """Undo an edit; see `Edit.undo`."""
        with self.lock:
            self.settle()
            if edit not in self._layers:
                raise BadUndo(f"{edit!r} cannot be undone, because it is not in the weights.")
            names = self._layers[edit].names
            for later, shared in self._above(edit).items():
                raise BadUndo(
                    f"{edit!r} cannot be undone while the later {later!r} lies on it in {shared}; "
                    "undo the later one first."
                )
            named = dict(self.model.named_parameters(remove_duplicate=False))
            weights = {name: named[name] for name in names if name in named}
            found = checksums(weights.items())
            for name in names:
                if found.get(name) != self._chains[name].checksum:
                    raise BadUndo(
                        f"{name} was changed by something else since {edit!r} was applied, so undoing it would destroy "
                        "that change; load the model again to be rid of both."
                    )
            bits = {name: (weight, self._chains[name].before()) for name, weight in weights.items()}
            writing = Writing(self, _Journal(bits, edit))
            with writing, writing:
                self.settle()

    @contextmanager
    def block(self, edit: Edit) -> Iterator[Edit]:
        """A context with an edit applied inside; see `Edit`."""
        with self.lock:
            if not self.holds(edit):
                self.push(edit)
            layer = self._layers[edit]
            try:
                layer.blocks += 1
                yield edit
            except BaseException:
                self.close(edit, raised=True)
                raise
            self.close(edit)

    def close(self, edit: Edit, *, raised: bool = False) -> None:
        """The end of a block with an edit: the outermost one undoes it, unless that is done."""
        layer = self._layers.get(edit)
        if layer is None:
            return
        layer.blocks = max(0, layer.blocks - 1)
        if layer.blocks:
            return
        try:
            for later in reversed(self._above(edit) if raised else {}):
                self.pop(later)
            self.pop(edit)
        except BadUndo as refused:
            if not raised:
                raise
            # The caller hears of what went wrong inside, not of what lies on the edit for it.
            log.warning("%s", refused)

    def trial(self, names: Iterable[str]) -> Writing:
        """A context inside which the named weights may be written; afterwards they have their bits back."""
        with self.lock:
            self.settle()
            named = dict(self.model.named_parameters(remove_duplicate=False))
            bits = {name: (named[name], named[name].detach().clone()) for name in names}
            return Writing(self, _Journal(bits))

    def settle(self) -> None:
        """Put right what an interrupted write has left; nothing where there is nothing left."""
        journal = self._journal
        if journal is None:
            return
        with self.lock:
            for weight, saved in journal.bits.values():
                restore(weight, saved)
            edit = journal.edit
            if edit is not None:
                self._forget(edit, journal.bits)
            self._watch.trust(weight for weight, _ in journal.bits.values())
            self._journal = None

    def _forget(self, edit: Edit, names: Mapping[str, object]) -> None:
        """Take an edit off the record, however much of it is there."""
        for name in names:
            chain = self._chains.get(name)
            if chain is not None:
                chain.cut(edit)
                if not chain:
                    del self._chains[name]
        if edit not in self._layers:
            return
        layers = list(self._layers.items())
        place = [each for each, _ in layers].index(edit)
        last = layers[place - 1][1] if place else None
        for _, layer in layers[place + 1 :]:
            layer.state = _joined(last, layer.digest)
            last = layer
        del self._layers[edit]

    def _above(self, edit: Edit) -> dict[Edit, str]:
        """The later edits that lie on this one, or on one that does, and a weight in which."""
        names: set[str] = set()
        found = {}
        for each, layer in self._layers.items():
            shared = sorted(names.intersection(layer.names))
            if each is edit or shared:
                names.update(layer.names)
                if shared:
                    found[each] = shared[0]
        return found


class Writing:
    """Writes to weights, taken back on leaving unless they were put on record.

    It is entered twice in one statement, ``with writing, writing:``. Where an interrupt comes just as the inner one is
    left, before that could do anything, leaving the outer one does it.
    """

    def __init__(self, stack: EditStack, journal: _Journal) -> None:
        self._stack, self._journal = stack, journal
        self._gradients = torch.is_grad_enabled()

    def __enter__(self) -> Writing:
        try:
            self._stack._journal = self._journal
            return self
        except BaseException:  # nothing is written yet
            self._stack._journal = None
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._journal.open = False
            self._stack.settle()
            if error is not None:  # torch.no_grad may have been stopped as it was left
                torch.set_grad_enabled(self._gradients)
        except BaseException:  # an interrupt comes once
            self._stack.settle()
            raise

    def before(self, name: str) -> Tensor:
        """The bits that a weight gets back."""
        return self._journal.bits[name][1]


def _joined(last: _Layer | None, digest: str) -> str:
    """What identifies some edits and one more."""
    before = "" if last is None else last.state
    return hashlib.sha256(f"{before}+{digest}".encode()).hexdigest()


_stacks: WeakKeyDictionary[nn.Module, EditStack] = WeakKeyDictionary()
_finding = threading.Lock()
