"""Blocks: some rows of one weight, adapted as a weight of their own. Integers only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from superlora_tn.declare.parts import SpecError, check_count, shown

MOST_BLOCKS = 64


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` (not included) of each `period` rows.

    Plain blocks have one period, the whole weight; blocks that are interleaved by head have one for each head.
    """

    start: int
    stop: int
    period: int

    def __post_init__(self) -> None:
        numbers = (self.start, self.stop, self.period)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not whole or not 0 <= self.start < self.stop <= self.period:
            raise SpecError(f"a block was given the rows {shown(numbers)}; expected 0 <= start < stop <= period.")

    def count(self, rows: int) -> int:
        """How many of so many rows it has.

        Raises:
            SpecError: the period does not divide them.
        """
        if rows % self.period:
            raise SpecError(f"a block repeats every {self.period} rows, which do not divide the {rows} rows of its weight.")
        return rows // self.period * (self.stop - self.start)

    def meets(self, other: Span) -> bool:
        """Whether the two have a row in common."""
        if self.period == other.period:
            return self.start < other.stop and other.start < self.stop
        rows = range(math.lcm(self.period, other.period))
        mine = (r for r in rows if self.start <= r % self.period < self.stop)
        return any(other.start <= r % other.period < other.stop for r in mine)

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}/{self.period}"

    @classmethod
    def from_text(cls, text: object) -> Span:
        """What `str` gave.

        Raises:
            SpecError: it is something else.
        """
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})/(\d{1,12})", text) if isinstance(text, str) else None
        if found is None:
            raise SpecError(f"rows were given as {shown(text)}; expected 'start:stop/period'.")
        return cls(*(int(number) for number in found.groups()))


@dataclass(frozen=True)
class Rows:
    """Blocks of the rows of one linear layer, or of an embedding's table: ``Rows("qkv", ("q", "k", "v"), use=("q", "v"))``.

    They are named as targets. Of a table with new tokens at its end: ``Rows("embed", ("old", "new"), ("new",), (1000, 8))``.

    Args:
        layer: the layer's name, or its ending, as in a list of targets.
        parts: the blocks' names, in the order of the rows.
        use: which of them are adapted; None takes all.
        sizes: how the rows divide among the blocks, as numbers of rows or of heads (grouped heads: ``sizes=(32, 8, 8)``);
            None takes equal shares.
        heads: how many runs of all blocks follow one another, where they are interleaved by head: rows are
            (head, block, rest).

    A block is named behind its layer: ``"blocks.0.attn.qkv.q"``.
    """

    layer: str
    parts: tuple[str, ...]
    use: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None
    heads: int = 1

    def __post_init__(self) -> None:
        for field in ("parts", "use", "sizes"):
            given = getattr(self, field)
            if isinstance(given, list):
                object.__setattr__(self, field, tuple(given))
        if not isinstance(self.layer, str) or not self.layer:
            raise SpecError(f"Rows was given layer={shown(self.layer)}; give the layer's name, such as 'qkv'.")
        good = isinstance(self.parts, tuple) and 1 <= len(self.parts) <= MOST_BLOCKS and len(set(self.parts)) == len(self.parts)
        if not good or not all(isinstance(p, str) and re.fullmatch(r"[A-Za-z0-9_]+", p) for p in self.parts):
            raise SpecError(f"Rows was given parts={shown(self.parts)}; give different names, such as ('q', 'k', 'v').")
        if self.use is not None and (not isinstance(self.use, tuple) or not self.use or not set(self.use) <= set(self.parts)):
            raise SpecError(f"Rows was given use={shown(self.use)}; choose among its parts {', '.join(self.parts)}.")
        check_count("Rows", "heads", self.heads, 1 << 20)
        if self.sizes is not None:
            if not isinstance(self.sizes, tuple) or len(self.sizes) != len(self.parts):
                raise SpecError(f"Rows was given sizes={shown(self.sizes)} for {len(self.parts)} parts; give one each.")
            for size in self.sizes:
                check_count("Rows", "sizes", size, 1 << 40)

    def spans(self, rows: int) -> dict[str, Span]:
        """The rows of each block of a weight of so many rows.

        Raises:
            SpecError: they do not divide so.
        """
        sizes = self.sizes or (1,) * len(self.parts)
        period, left = divmod(rows, self.heads)
        unit, more = divmod(period, sum(sizes))
        if left or more or not unit:
            raise SpecError(
                f"{rows} rows of '{self.layer}' do not divide into {self.heads} x {' + '.join(map(str, sizes))} equal shares "
                f"for {', '.join(self.parts)}; give other sizes= or heads=."
            )
        found, start = {}, 0
        for part, size in zip(self.parts, sizes, strict=True):
            found[part] = Span(start, start + size * unit, period)
            start += size * unit
        return found
