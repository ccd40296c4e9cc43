"""Of what sums are and from which parts of a text, so that what is merged belongs together and nothing counts twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsae.analysis.checkpoint import Arrays
from fastsae.errors import FastSAEError

Piece = tuple[int, int, int, int]  # rank, world, first document, end


class Parted:
    """What a pass adds up, by one process or by several.

    of: digests of dictionaries, models and text, ready for JSON; empty where it was added up by hand. parts: which
    pieces of the text are in; empty likewise.
    """

    def __init__(self) -> None:
        self.of: dict[str, Any] = {}
        self.parts: list[Piece] = []

    def missing(self) -> list[Piece]:
        """The pieces of other ranks that are not in, of each stretch of documents of which some rank's piece is."""
        wanted = {(rank, world, low, high) for _, world, low, high in self.parts for rank in range(world)}
        return sorted(wanted - set(self.parts))

    def _check_whole(self, what: str) -> None:
        """Raises FastSAEError where ranks are missing."""
        if missing := self.missing():
            raise FastSAEError(
                f"expected {what} of all ranks, and {ranks(missing)} missing: merge what is missing, or ask for "
                "result(partial=True)"
            )

    def _join(self, other: Parted, what: str, empty: bool) -> None:
        """Takes over the other's parts. empty: nothing was added here yet: made to be merged into.

        Raises FastSAEError, before anything changes, for what is of something else, and for a part that is in already.
        """
        if empty and not (self.of or self.parts):
            self.of = other.of
        mine, theirs = self.of, other.of
        if different := [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]:
            key = different[0]
            raise FastSAEError(
                f"{what} to merge must be of the same dictionaries, models and text: {key} is {mine.get(key)} here and "
                f"{theirs.get(key)} there"
            )
        check_parts(self.parts, other.parts, what)
        self.parts = sorted(self.parts + other.parts)

    def _parted_arrays(self) -> Arrays:
        """of and parts, to be saved; nothing of what was added up by hand."""
        if not (self.of or self.parts):
            return {}
        return {"parted": np.frombuffer(json.dumps([self.of, self.parts]).encode(), dtype=np.uint8)}

    def _load_parted(self, arrays: Arrays) -> None:
        """What `_parted_arrays` gave."""
        if "parted" in arrays:
            self.of, parts = json.loads(arrays["parted"].tobytes())
            self.parts = [(a, b, c, d) for a, b, c, d in parts]


def check_parts(mine: Sequence[Piece], theirs: Sequence[Piece], what: str) -> None:
    """Raises FastSAEError where something would be counted twice."""
    for rank, world, low, high in theirs:
        for my_rank, my_world, my_low, my_high in mine:
            if high <= my_low or my_high <= low:
                continue
            of = f"documents {low} to {high - 1}"
            if (low, high) != (my_low, my_high):
                raise FastSAEError(
                    f"{what} to merge must not share documents: {of} there, {my_low} to {my_high - 1} here"
                )
            if world != my_world:
                raise FastSAEError(
                    f"{what} to merge must be of one number of ranks: {of} were read by {world} there, {my_world} here"
                )
            if rank == my_rank:
                raise FastSAEError(
                    f"{what} to merge must be of different parts: rank {rank} of {world} has been added already"
                )


def ranks(missing: Sequence[Piece]) -> str:
    """In words: "rank 1 of 2 is", "ranks 0 and 2 of 4 are"; where there are several worlds, those of the first."""
    world = missing[0][1]
    numbers = [str(rank) for rank in sorted({rank for rank, of, *_ in missing if of == world})]
    if len(numbers) == 1:
        return f"rank {numbers[0]} of {world} is"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]} of {world} are"
