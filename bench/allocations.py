"""What torch allocates on the CPU while some code runs, inside its operations too, backward pass included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile


class Watch:
    """`with Watch() as watch:` notes every allocation of torch's CPU allocator, by its profiler.

    ignore: sizes in bytes that are not counted, for parameter gradients. largest: the bytes of the largest allocation,
    and the operation that made it. peak: the most bytes that were alive at one time, of those allocated meanwhile.
    """

    def __init__(self, ignore: Iterable[int] = ()) -> None:
        self.ignore = set(ignore)
        self.largest = self.peak = 0
        self.largest_is = ""
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Watch:
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        profiler: Any = self.profile.profiler
        events = _all(profiler.kineto_results.experimental_event_tree())
        found = [e for e in events if type(e.extra_fields).__name__ == "_ExtraFields_Allocation"]
        alive: dict[int, int] = {}
        now = 0
        for event in sorted(found, key=lambda e: e.start_time_ns):
            size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
            if size > 0 and size not in self.ignore:
                alive[address] = size
                now += size
                if size > self.largest:
                    self.largest, self.largest_is = size, event.parent.name if event.parent else "outside of operations"
            elif size < 0:
                now -= alive.pop(address, 0)  # what was there before is freed without being counted
            self.peak = max(self.peak, now)


def _all(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all(event.children)
