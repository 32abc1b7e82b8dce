"""What docs/methods.md says of SGL with the shipped guide: tables."""

from benchmarks.guide import ALONE, OWN, SGL, SHARES
from benchmarks.tables import plus_minus, points, read, table
from catp_jax.study.records import UNPRUNED
from catp_jax.study.results import RANDOM

FAMILIES = {"attribute": ", attribute", "all": ""}
COLUMNS = tuple(f"{family}, {share}" for family in FAMILIES for share in SHARES)


def worth() -> str:
    """Right answers about attributes and about everything, and the share of needed tokens kept, by
    budget.
    """
    rows, lines = read("guide_mini")["rows"], []
    for method in (UNPRUNED, ALONE, SGL, *OWN, RANDOM):
        found = [rows.get(method) or rows[f"{method}, {share}"] for share in SHARES]
        right = [
            plus_minus(one[f"accuracy{behind}"]) for behind in FAMILIES.values() for one in found
        ]
        needed = [one["needed, kept"] for one in found]
        kept = ["" if share is None else f"{100 * share:.0f}" for share in needed]
        lines.append([method if method == ALONE else f"`{method}`", *right, *kept])
    return table(["%", *COLUMNS, *(f"needed, {share}" for share in SHARES)], lines)


def ahead() -> str:
    """By how many points SGL is ahead of the others."""
    rows, lines = read("guide_mini")["rows"], []
    for other in (*OWN, RANDOM, UNPRUNED):
        gains = [
            rows[f"{SGL}, {share}"][f"against {other}{behind}"]
            for behind in FAMILIES.values()
            for share in SHARES
        ]
        lines.append([f"`{other}`", *map(points, gains)])
    return table(["points ahead of", *COLUMNS], lines)


def exits() -> str:
    """What comes of early exit, by threshold, at the largest budget."""
    head = ("threshold", "the guide answers, %", "right, %", "as many at random, %", "− no exit")
    lines = (
        (
            f"{one['threshold']:g}",
            f"{100 * one['share']:.0f}",
            plus_minus(one["accuracy"]),
            f"{100 * one['at random']:.0f}",
            points(one[f"against {SGL}"]),
        )
        for one in read("guide_mini")["exits"][SHARES[0]]
    )
    return table(head, lines)
