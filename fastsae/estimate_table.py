"""An estimate as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastsae.machines import GIB

if TYPE_CHECKING:
    from fastsae.estimate import Estimate

_MEMORY = {
    "parameters": "parameters",
    "buffers": "counters and normalisation",
    "master": "fp32 copy of the parameters",
    "state": "Adam's moments",
    "batch": "rows of the batch",
    "codes": "codes",
    "workspace": "workspace",
}


def table(found: Estimate) -> str:
    """Lines of text: memory, time, and what would fit."""
    return "\n".join((*_head(found), *_memory(found), *_time(found), *_rest(found)))


def _head(found: Estimate) -> Iterator[str]:
    sizes = found.sizes
    yield (
        f"{sizes['d_sae']:,} latents of width {sizes['d_in']:,}, {sizes['active']:,} active on a token, "
        f"{sizes['tokens_per_step']:,} tokens a step"
    )
    yield f"{found.machine}: {found.about}"


def _memory(found: Estimate) -> Iterator[str]:
    yield ""
    yield f"memory{'GiB':>37}"
    for name, count in found.memory.items():
        if count:
            yield _line(_MEMORY[name], _gib(count))
    yield _line(f"peak of a step ({found.phase})", _gib(sum(found.memory.values())))
    yield _line("peak while the weights are made", _gib(found.making))
    if found.available is not None:
        yield _line("available", _gib(found.available))
        yield "it fits" if found.fits else f"it does NOT fit: {_gib(found.total - found.available)} GiB too much"


def _time(found: Estimate) -> Iterator[str]:
    if found.time is None or found.seconds_per_step is None:
        yield "\ntime: the speed of this machine is not known"
        return
    yield ""
    yield f"time of a step{'ms':>29}"
    for name, seconds in found.time.items():
        if seconds:
            yield _line(name, f"{1000 * seconds:,.2f}")
    yield _line("all", f"{1000 * found.seconds_per_step:,.2f}")
    yield _line("tokens per second", f"{found.tokens_per_second:,.0f}")
    if found.days is not None:
        yield _line("days for the run", f"{found.days:,.2f}")


def _rest(found: Estimate) -> Iterator[str]:
    if found.available is not None:
        yield ""
        largest = "none" if found.largest_d_sae is None else f"{found.largest_d_sae:,}"
        yield _line("largest d_sae that fits", largest)
    if found.switches:
        yield "\nwhat would help, each with those before it" + f"{'GiB':>10}"
        for switch in found.switches:
            yield f"  {switch.text:<40}{_gib(switch.bytes):>10}{'  fits' if switch.fits else ''}"
        if not any(switch.fits for switch in found.switches):
            yield "  none of them is enough"
    if found.notes:
        yield ""
        yield from (f"- {note}" for note in found.notes)


def _line(name: str, value: str) -> str:
    return f"  {name:<31}{value:>10}"


def _gib(count: int) -> str:
    return f"{count / GIB:,.3f}" if count < 10 * GIB else f"{count / GIB:,.1f}"
