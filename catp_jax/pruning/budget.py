"""How many entries to keep: the only place where ratios become counts."""

import math
import re


def count(keep: int | str, available: int) -> int:
    """The number of visual tokens that `keep` stands for, of `available` ones.

    `keep` is a count (`64`, `"64"`) or a percentage (`"50%"`, rounded up).

    Raises ValueError if it is neither, or not between 1 and `available`.
    """
    wanted = f"keep takes a count from 1 to {available} or a percentage such as 50%, got {keep!r}"
    text = str(keep).strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise ValueError(f"{wanted}: a percentage is above 0 and at most 100")
        return math.ceil(available * percent / 100 - 1e-9)
    if not re.fullmatch(r"[+-]?\d+", text):
        raise ValueError(wanted)
    number = int(text)
    if number < 1:
        raise ValueError(f"{wanted}: at least one visual token has to stay")
    if number > available:
        raise ValueError(f"{wanted}: there are only {available} visual tokens")
    return number


def capacities(available: int, steps: int = 8) -> tuple[int, ...]:
    """The few sizes a data-dependent selection is rounded up to: even shares of `available`."""
    return tuple(sorted({math.ceil(available * step / steps) for step in range(1, steps + 1)}))
