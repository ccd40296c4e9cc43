"""What torch allocates while some code runs, as seen from the outputs of every operation, backward pass included."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """`with Watch(*kept) as watch:` notes every tensor that an operation returns.

    kept: tensors whose storage is not counted. ignore: shapes that are not counted either, for parameter gradients.
    largest: the most elements that any one tensor spanned in its storage, and its operation and shape. peak: the most
    bytes that were alive at one time in new storages. What an operation allocates inside and frees is not seen.
    """

    def __init__(self, *kept: Tensor, ignore: tuple[tuple[int, ...], ...] = ()) -> None:
        super().__init__()
        self.kept = {t.untyped_storage()._cdata for t in kept}
        self.ignore = ignore
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = 0
        self.largest_is = ""
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tuple(tensor.shape) not in self.ignore:
                self._note(tensor, func)
        return result

    def _note(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.kept:
            return
        elements = storage.nbytes() // tensor.element_size()
        if elements > self.largest:
            self.largest, self.largest_is = elements, f"{func} → {tuple(tensor.shape)}"
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
