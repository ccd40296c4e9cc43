"""How much room codes of variable length (ReLU, JumpReLU, BatchTopK) take: learnt from call to call, without waiting
for the device.

What a call needed is copied to the host while the device works on, and read two calls later, when it has long arrived:
a fixed delay, so that a run makes the same choices again.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DELAY = 2  # calls


@dataclass
class Counters:
    """A few integers a call, on their way from the device to the host."""

    under_way: deque[tuple[Tensor, Any]] = field(default_factory=deque)

    def send(self, numbers: Tensor) -> None:
        """numbers: integers [M]. Nothing is sent while a CUDA graph is captured: it is replayed without us."""
        if numbers.device.type != "cuda":
            self.under_way.append((numbers.clone(), None))
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self.under_way.append((host, arrived))

    def receive(self) -> list[list[int]]:
        """What was sent DELAY calls ago or earlier, and not yet received."""
        found = []
        while len(self.under_way) >= DELAY and not _capturing(self.under_way[0][1]):
            numbers, arrived = self.under_way.popleft()
            if arrived is not None:
                arrived.synchronize()
            found.append(numbers.tolist())
        return found


def _capturing(event: Any) -> bool:
    return event is not None and torch.cuda.is_current_stream_capturing()


@dataclass
class Capacity:
    """The room that codes of one caller have taken lately, so that the kernels make the next one in one go.

    slots: entries of a row; groups: groups of a row that are computed in full; dead: latents that AuxK chooses among.
    """

    slots: int = 64
    groups: int = 32
    dead: int = 0
    needed: int | None = None
    """Entries of the fullest row a few calls ago; None until something is known."""
    counters: Counters = field(default_factory=Counters, repr=False, compare=False)
    dead_counters: Counters = field(default_factory=Counters, repr=False, compare=False)

    def fit(self, slots: int, groups: int | None) -> None:
        """Grows to half more than was needed; gives room back where four times that was needed, half of it a time.

        It stays the same for many calls: torch's checkpointing asks for a second forward pass with the same shapes.
        groups: None where it is not known.
        """
        self.needed = slots
        self.slots = _fitted(self.slots, slots)
        if groups is not None:
            self.groups = _fitted(self.groups, groups)

    def update(self) -> None:
        """From what earlier calls needed, but not within a backward pass, where a forward pass is run again."""
        if torch._C._current_graph_task_id() == -1:
            for slots, groups in self.counters.receive():
                self.fit(slots, groups if groups >= 0 else None)

    def send(self, slots: Tensor, groups: Tensor | None) -> None:
        """What this call needed: scalars on the device; groups None where it is not known."""
        if torch._C._current_graph_task_id() == -1:
            unknown = slots.new_full((), -1) if groups is None else groups
            self.counters.send(torch.stack([slots.long(), unknown.long()]))


def _fitted(room: int, needed: int) -> int:
    if 8 * needed > 7 * room:
        return max(needed + needed // 2, 8)
    return max(room // 2, 8) if 4 * needed < room else room


# An operation that torch.compile does not look into takes numbers and tensors only, so a caller's Capacity has a
# number.
_rooms: dict[int, Capacity] = {}
_numbers = itertools.count(1)


def new_room() -> int:
    """A number that stands for one caller of variable codes, whose Capacity is kept from call to call."""
    return next(_numbers)


def room_of(number: int) -> Capacity:
    """The Capacity of a caller; for 0 a fresh one each time."""
    return _rooms.setdefault(number, Capacity()) if number else Capacity()
