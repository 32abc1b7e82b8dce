"""How many entries to keep: the only place where ratios become counts."""

import dataclasses
import math
import re
from collections.abc import Sequence

WANTED = "keep takes a count of at least 1 or a percentage such as 50%"


@dataclasses.dataclass(frozen=True)
class Budget:
    """A count, or a percentage of what there is."""

    number: int | None
    percent: float | None

    def count(self, available: int) -> int:
        """The number of entries to keep of `available` ones: a count, as far as there are as many,
        or a percentage, rounded up.
        """
        if self.number is None:
            rounded = math.ceil(available * (self.percent or 0) / 100 - 1e-9)
            return max(rounded, min(available, 1))
        return min(self.number, available)


def parse(keep: int | str) -> Budget:
    """Reads `64`, `"64"` or `"50%"`.

    Raises ValueError if it is neither a count from 1 on nor a percentage in (0, 100].
    """
    text = str(keep).strip()
    if match := re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*%", text):
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise ValueError(f"{WANTED}, above 0% and at most 100%; got {keep!r}")
        return Budget(None, percent)
    if not re.fullmatch(r"[+-]?\d+", text) or int(text) < 1:
        raise ValueError(f"{WANTED}; got {keep!r}")
    return Budget(int(text), None)


def count(keep: int | str, available: int) -> int:
    """The number of entries that `keep` stands for, of `available` ones."""
    return parse(keep).count(available)


def check(keeps: Sequence[int | str], most: int | None) -> None:
    """Raises ValueError for a count that no prompt can fill, of methods that follow each other.

    `most` is what a prompt may have (None: any number); a prompt that has fewer keeps what it has.
    """
    for keep in keeps:
        budget = parse(keep)
        if most is None:
            most = budget.number
            continue
        if budget.number is not None and budget.number > most:
            raise ValueError(
                f"keep is {budget.number}, but there are only {most} visual tokens; "
                f"give 1 to {most}, or a percentage"
            )
        most = budget.count(most)


def capacities(available: int, steps: int = 8) -> tuple[int, ...]:
    """The few sizes a data-dependent selection is rounded up to: even shares of `available`."""
    return tuple(sorted({math.ceil(available * step / steps) for step in range(1, steps + 1)}))
