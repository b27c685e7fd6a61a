"""`Tally` and `Counts`: what an emulated core executed, exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .thumb import Kind


@dataclass(frozen=True)
class Tally:
    """What a stretch of code executed."""

    instructions: int = 0
    loads: int | None = None
    """words of up to four bytes that were read, those of instructions included whose condition failed. None: not counted"""
    stores: int | None = None
    """the same for writes"""
    branches: int | None = None
    """taken branches, calls and returns"""
    kinds: Counter[Kind] | None = None
    """`instructions` by kind"""

    def __sub__(self, other: Tally) -> Tally:
        """What was executed since `other`."""

        def less(a: int | None, b: int | None) -> int | None:
            return None if a is None or b is None else a - b

        return Tally(
            self.instructions - other.instructions,
            less(self.loads, other.loads),
            less(self.stores, other.stores),
            less(self.branches, other.branches),
            None if self.kinds is None or other.kinds is None else self.kinds - other.kinds,
        )


@dataclass
class Counts:
    """One inference, from the entry of the model's run function to its return."""

    total: Tally = field(default_factory=Tally)
    layers: list[Tally] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """layer numbers as the firmware reported them"""
