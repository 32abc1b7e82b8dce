"""What a program computes at least, read off before it is compiled: its matrix products."""

import math
from collections.abc import Iterator
from typing import Any


def matrix_flops(traced: Any) -> int:
    """Floating-point operations of all matrix products in a traced function (`jitted.trace(…)`).

    Loops count as often as they run, one that the data end once, and of branches the one with most
    products; of what depends on the platform what all others do.
    """
    return _flops(traced.jaxpr.jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        parts = [_flops(part) for part in _programs_in(given.values())]
        if name == "cond" and parts:
            total += parts[-1] if given.get("branches_platforms") else max(parts)
        elif parts:
            total += (given["length"] if name == "scan" else 1) * sum(parts)
    return total


def _programs_in(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _programs_in(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
