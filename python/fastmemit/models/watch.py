"""Whether a model is still the one that was identified, for the price of looking at its tensors.

A tensor that is the same object in the same memory with the same version counter has the content that it had. Only
where one of these differs are the bytes read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastmemit.models.fingerprint import checksums, fingerprint_of
from fastmemit.models.stored import stored_tensors


class Watch:
    """The checksums of a model's stored tensors when it was identified, and where they lay then.

    Writes that no version counter sees (``weight.data``, NumPy arrays of the same memory) are not noticed here; an edit
    looks at the bytes of the weights that it touches as well.
    """

    def __init__(self) -> None:
        self._checksums: dict[str, str] = {}
        self._marks: dict[int, Any] = {}  # id of a tensor -> its mark when its content was known
        # Kept, so that no other storage gets the number of one that is gone.
        self._storages: dict[int, StorageWeakRef] = {}

    def identify(self, model: nn.Module) -> str:
        """Read all tensors; the model is the one to be watched from now on.

        Returns:
            Its fingerprint.

        Raises:
            OffloadedWeight: Some weight is neither in memory nor where accelerate offloads to.
        """
        tensors = _own(model)
        self._checksums = checksums(stored_tensors(model))
        self._note(tensors)
        return fingerprint_of(model, self._checksums)

    def trust(self, tensors: Iterable[Tensor]) -> None:
        """Take it that these of the watched tensors have the content that they shall have."""
        for tensor in tensors:
            if id(tensor) in self._marks:
                self._marks[id(tensor)] = mark = _mark(tensor)
                if mark is not None:
                    self._storages[id(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def _note(self, tensors: list[Tensor]) -> None:
        self._marks, self._storages = {id(tensor): None for tensor in tensors}, {}
        self.trust(tensors)

    def changed(self, model: nn.Module, edited: Mapping[str, tuple[Tensor, str]]) -> list[str]:
        """The tensors that have other content than when the model was identified, by name.

        Args:
            model: The model.
            edited: Parameter -> (itself, the checksum that it shall have instead).
        """
        tensors = _own(model)
        if len(tensors) == len(self._marks) and all(map(self._known, tensors)):
            return []
        stored = dict(stored_tensors(model))
        if stored.keys() != self._checksums.keys():
            return sorted(stored.keys() ^ self._checksums.keys())
        # An edited parameter may be stored under the name of another that shares its memory.
        instead = {weight.data_ptr(): wanted for weight, wanted in edited.values()}
        found = checksums((name, t) for name, t in stored.items() if not self._known(t))
        wanted = {name: instead.get(stored[name].data_ptr(), self._checksums[name]) for name in found}
        differ = sorted(name for name in found if found[name] != wanted[name])
        if not differ:
            self._note(tensors)
        return differ

    def _known(self, tensor: Tensor) -> bool:
        mark = self._marks.get(id(tensor))
        return mark is not None and mark == _mark(tensor)


def _own(model: nn.Module) -> list[Tensor]:
    """The tensors of a model, each once: parameters and persistent buffers."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                found[id(tensor)] = tensor
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[id(buffer)] = buffer
    return list(found.values())


def _mark(tensor: Tensor) -> Any:
    """What differs when a tensor was written or replaced; None where that cannot be told."""
    try:
        storage = tensor.untyped_storage()
        where = (storage._cdata, storage.data_ptr(), tensor.storage_offset(), tensor.device)
        return (*where, tensor._version, tensor.dtype, tensor.shape, tensor.stride())
    except (RuntimeError, NotImplementedError):  # of inference mode, or of a class of its own
        return None
