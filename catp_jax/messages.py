"""What errors quote: long values cut short, and of many entries the first."""

from collections.abc import Sequence


def short(text: str, most: int = 80) -> str:
    """A text, cut off where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(entries: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """The first `most` entries, and how many more there are."""
    more = len(entries) - most
    return between.join([*entries[:most], *([f"… and {more} more"] if more > 0 else [])])
