"""Pruning methods: one file, one method, one paper. `METHODS` lists them by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

from jaxtyping import Array, Int

from catp_jax.contract import Site
from catp_jax.pruning.fastv import FastV
from catp_jax.pruning.k_norm import KNorm
from catp_jax.pruning.random import Random
from catp_jax.pruning.trimmed_llama import TrimmedLlama

METHODS: dict[str, Callable[..., Any]] = {
    "trimmed_llama": TrimmedLlama,
    "fastv": FastV,
    "k_norm": KNorm,
    "random": Random,
}


def methods_for(sites: frozenset[Site]) -> list[str]:
    """Names of the methods that fit a model with these sites."""
    return [name for name, method in METHODS.items() if method.site in sites]  # type: ignore[attr-defined]


def make(
    spec: str,
    keep: int | None,
    sites: frozenset[Site],
    limit: Int[Array, " b"] | None = None,
) -> Any:
    """A method from its name and options: `"trimmed_llama"`, `"trimmed_llama:k_ratio=0.25"`.

    Options follow the name, each after a colon. `keep` is a count of entries, None for a method
    whose budget follows from the data; `limit` leaves fewer to some samples.

    Raises ValueError for a name or an option that does not exist or does not fit the model.
    """
    name, *options = spec.split(":")
    fitting = ", ".join(methods_for(sites)) or "no method"
    if name not in METHODS:
        raise ValueError(f"unknown pruning method {name!r}; this model takes {fitting}")
    if name not in methods_for(sites):
        raise ValueError(f"{name} prunes a place that this model does not have; it takes {fitting}")
    method = METHODS[name]
    every = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    fields = {key: field for key, field in every.items() if key not in ("keep", "limit")}
    values: dict[str, Any] = {}
    for option in options:
        key, separator, text = option.partition("=")
        if key not in fields or not separator:
            takes = ", ".join(f"{field}=…" for field in fields) or "no options"
            raise ValueError(f"{name} does not know the option {option!r}; it takes {takes}")
        values[key] = _number(text, fields[key].type, f"{name}:{key}")
    if keep is None and type(None) not in get_args(every["keep"].type):
        raise ValueError(f"{name} wants a number of visual tokens to keep, such as 50% or 64")
    if limit is not None:
        values["limit"] = limit
    return method(keep=keep, **values)


def _number(text: str, kind: Any, what: str) -> int | float:
    """`text` as the field's type has it: 1 is no count where a ratio is wanted, nor the reverse."""
    is_ratio = float in get_args(kind)
    try:
        return float(text) if is_ratio else int(text)
    except ValueError:
        wanted = "number" if is_ratio else "whole number"
        raise ValueError(f"{what} takes a {wanted}, got {text!r}") from None
