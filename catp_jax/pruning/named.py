"""Methods by name with their budgets, as the command, a study and `Model.generate` take them.

prune="catp:layers=first,fastv", keep="50%,8"
prune=["catp:layers=first", "fastv"], keep=["50%", 8]       the same
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from catp_jax.contract import Site
from catp_jax.pruning import METHODS, budget, make

AUTO = "auto"
"""The budget of a method that finds its own number, in the data or in what it has learned."""

WHOLE = 100_000
"""A hundred per cent, where a budget is a share of bytes, so that it is the same in every batch."""

Named = tuple[tuple[str, int | str], ...]
"""Methods in the order in which they apply, each with a count, a percentage or `AUTO`."""


def named(prune: str | Sequence[str] | None, keep: int | str | Sequence[int | str] | None) -> Named:
    """Each method with its budget, checked as far as that goes without a model. A text names
    several, separated by commas.

    Raises ValueError if their numbers differ, and for what `make` or `budget.parse` refuse.
    """
    specs, budgets = split(prune), split(keep)
    budgets = [
        int(some) if isinstance(some, numbers.Integral) and not isinstance(some, bool) else some
        for some in budgets
    ]
    if len(specs) != len(budgets):
        raise ValueError(
            f"each method to prune by wants its budget to keep: got {len(specs)} methods and "
            f"{len(budgets)} budgets"
        )
    for spec, some in zip(specs, budgets, strict=True):
        make(spec, None if some == AUTO else 1, frozenset(Site))
        if not isinstance(some, int | str):
            raise ValueError(f"{budget.WANTED}; got {some!r}")
        if some != AUTO and budget.parse(some).percent is None and is_by_bytes(spec):
            raise ValueError(
                f"{spec.partition(':')[0]} leaves the same share of each token's bytes in all "
                f"prompts, of whatever number of tokens; give it a percentage such as 50%, got "
                f"{some!r}"
            )
    return tuple(zip(specs, budgets, strict=True))


def split(words: Any) -> list[Any]:
    """Methods, or budgets, as a list: of a text what its commas separate."""
    if words is None:
        return []
    if isinstance(words, str):
        return [word.strip() for word in words.split(",")]
    return [*words] if isinstance(words, Sequence) else [words]


def limits(methods: Named, available: int) -> list[int]:
    """How many of its visual tokens a prompt keeps, by each method in turn; of one that keeps all,
    how many take the bytes that it leaves.
    """
    found = []
    for spec, keep in methods:
        left = available if keep == AUTO else budget.count(keep, available)
        found.append(left)
        available = available if keeps_all(spec) else left
    return found


def keeps_all(spec: str) -> bool:
    """Whether a method's budget is one of bytes alone, and all tokens stay."""
    return getattr(METHODS[spec.partition(":")[0]], "keeps_all", False)


def is_fixed(spec: str, keep: int | str) -> bool:
    """Whether a method's budget does not depend on the data."""
    return keep != AUTO or keeps_all(spec)


def is_by_bytes(spec: str) -> bool:
    """Whether all prompts have the same share left of each token's bytes."""
    return getattr(METHODS[spec.partition(":")[0]], "is_by_bytes", False)


def pruners(
    methods: Named,
    available: Sequence[int],
    capacity: int,
    sites: frozenset[Site],
    most: int | None = None,
) -> tuple[Any, ...]:
    """One pruner a method, for prompts with so many visual tokens each, of `capacity` at most.

    Shapes depend on `capacity` alone; a percentage leaves each prompt its share of its tokens, or
    of each token's bytes, a count what it has, if that is less. Raises ValueError for a count that
    no prompt can fill, which may have `most`.
    """
    counted = [(spec, keep) for spec, keep in methods if keep != AUTO]
    budget.check([keep for spec, keep in counted if not keeps_all(spec)], most)
    for spec, keep in counted:
        if keeps_all(spec):
            budget.check([keep], most)
    per_prompt = [limits(methods, count) for count in available]
    made = []
    for number, (spec, keep) in enumerate(methods):
        if capacity and keep == AUTO:
            made.append(make(spec, None, sites))
        elif capacity and is_by_bytes(spec):
            made.append(make(spec, budget.count(keep, WHOLE), sites, of=WHOLE))
        elif capacity:
            left = budget.count(keep, capacity)
            limit = jnp.asarray([counts[number] for counts in per_prompt], jnp.int32)
            made.append(make(spec, left, sites, limit=limit, of=capacity))
            capacity = capacity if keeps_all(spec) else left
    return tuple(made)
