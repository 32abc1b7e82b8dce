"""Pruning methods: one file, one method, one paper. `METHODS` lists them by name."""

import dataclasses
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import jax.numpy as jnp
from jaxtyping import Array, Int

from catp_jax.contract import Site
from catp_jax.pruning import learned
from catp_jax.pruning.aircache import AirCache
from catp_jax.pruning.anti import Anti
from catp_jax.pruning.attention_predictor import AttentionPredictor
from catp_jax.pruning.catp import CATP
from catp_jax.pruning.csp import CSP
from catp_jax.pruning.eigen import EigenAttention
from catp_jax.pruning.elastic_cache import ElasticCache
from catp_jax.pruning.fastv import FastV
from catp_jax.pruning.k_norm import KNorm
from catp_jax.pruning.l2 import L2Norm
from catp_jax.pruning.nearest_centroid import NearestCentroid
from catp_jax.pruning.oracle import Oracle
from catp_jax.pruning.pool import Pool
from catp_jax.pruning.position import Position
from catp_jax.pruning.random import Random
from catp_jax.pruning.self_attention import SelfAttention
from catp_jax.pruning.think import ThinK
from catp_jax.pruning.trimmed_llama import TrimmedLlama
from catp_jax.pruning.uniform import Uniform
from catp_jax.pruning.vistog_grouping import VisToGGrouping
from catp_jax.pruning.zipvl import ZipVL

METHODS: dict[str, Callable[..., Any]] = {
    "catp": CATP,
    "l2": L2Norm,
    "self_attention": SelfAttention,
    "position": Position,
    "trimmed_llama": TrimmedLlama,
    "fastv": FastV,
    "k_norm": KNorm,
    "csp": CSP,
    "elastic_cache": ElasticCache,
    "think": ThinK,
    "zipvl": ZipVL,
    "aircache": AirCache,
    "eigen": EigenAttention,
    "attention_predictor": AttentionPredictor,
    "vistog_grouping": VisToGGrouping,
    "random": Random,
    "uniform": Uniform,
    "nearest_centroid": NearestCentroid,
    "pool": Pool,
    "oracle": Oracle,
    "anti": Anti,
}

BOUNDS = ("oracle", "anti")
"""Those that must be told what is needed, as a study of a task that knows does."""

NOT_OPTIONS = ("keep", "limit", "of", "needed", "of_model")


def is_learned(name: str) -> bool:
    """Whether a method wants a folder that `catp-jax calibrate` made."""
    return hasattr(METHODS[name], "from_learned")


def site_of(name: str, sites: frozenset[Site]) -> Site | None:
    """Where a method works in a model with these sites; None if it does not fit."""
    wanted: tuple[Site, ...] = METHODS[name].sites  # type: ignore[attr-defined]
    return next((site for site in wanted if site in sites), None)


def methods_for(sites: frozenset[Site]) -> list[str]:
    """Names of the methods that fit a model with these sites, without the bounds and those that
    must learn first.
    """
    return [
        name
        for name in METHODS
        if name not in BOUNDS and not is_learned(name) and site_of(name, sites) is not None
    ]


def make(
    spec: str,
    keep: int | None,
    sites: frozenset[Site],
    limit: Int[Array, " b"] | None = None,
    of: int | None = None,
) -> Any:
    """A method from its name and options: `"catp:layers=first"`, `"trimmed_llama:k_ratio=0.25"`.

    Options follow the name, each after a colon; a switch goes by its name alone
    (`"catp:image_weights"`), slashes separate a vector's numbers (`"catp:weights=1/0/0.5"`). A
    method that fits several places of a model takes the first, or as it is told
    (`"k_norm:site=cache"`); one that has to learn wants the folder, first of all (`"eigen:DIR"`,
    see `learned`). `keep` is a count of entries, None for a method whose budget follows
    from the data, or from what it has learned; `limit` leaves fewer to some samples. A method that
    takes a share is told that `keep` is one `of` so many.

    Raises ValueError for a name or an option that does not exist or does not fit the model.
    """
    name, *options = spec.split(":")
    fitting = ", ".join(methods_for(sites)) or "no method"
    if name not in METHODS:
        takes = "there are" if sites == frozenset(Site) else "this model takes"
        raise ValueError(f"unknown pruning method {name!r}; {takes} {fitting}")
    method, first = METHODS[name], site_of(name, sites)
    if first is None:
        raise ValueError(f"{name} prunes a place that this model does not have; it takes {fitting}")
    texts: dict[str, str | None] = {}
    folder = options.pop(0) if is_learned(name) and options else ""
    for option in options:
        key, separator, text = option.partition("=")
        if key in texts:
            raise ValueError(f"{name} got the option {key!r} twice")
        texts[key] = text if separator else None
    types = _types(method)
    own = {site.name.lower(): site for site in method.sites if site in sites}  # type: ignore[attr-defined]
    site = own.get(texts.get("site") or "", first)
    if site is not Site.LAYER:
        types.pop("layer", None)  # nothing there would read it
    types["site"] = tuple(own)
    values: dict[str, Any] = {"keep": keep}
    if keep is None and type(None) not in types["keep"]:
        raise ValueError(f"{name} wants a number of visual tokens to keep, such as 50% or 16")
    if is_learned(name):
        found = learned.read(folder, name)
        try:
            given = method.from_learned(found, keep, of or keep or 1)  # type: ignore[attr-defined]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{folder} lacks {error.args[0]!r}; calibrate anew") from None
        values |= {**given, "of_model": found.model["checksum"]}
        types = {key: kinds for key, kinds in types.items() if key not in given or key == "keep"}
    for key, text in texts.items():
        known = () if key in NOT_OPTIONS else types.get(key, ())
        if not known or (text is None and known != (bool,)):
            given = key if text is None else f"{key}={text}"
            takes = ", ".join(_usage(types)) or "no options"
            raise ValueError(f"{name} does not know the option {given!r}; it takes {takes}")
        values[key] = _value("true" if text is None else text, known, f"{name}:{key}")
    if limit is not None:
        values["limit"] = limit
    if "of" in types:
        values["of"] = of
    return method(**{**values, "site": site})


def _types(method: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """What each field of a method may be: types, and words for a choice among some."""
    found = {}
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        kinds: list[Any] = []
        union = get_origin(field.type) in (Union, UnionType)
        for kind in get_args(field.type) if union else (field.type,):
            kinds += get_args(kind) if get_origin(kind) is Literal else [kind]
        found[field.name] = tuple(kinds)
    return found


def _usage(types: dict[str, tuple[Any, ...]]) -> list[str]:
    return [
        key if kinds == (bool,) else f"{key}=…"
        for key, kinds in types.items()
        if key not in NOT_OPTIONS and not (key == "site" and len(kinds) == 1)  # no choice
    ]


def _value(text: str, kinds: tuple[Any, ...], what: str) -> Any:
    """`text` as the field's type has it: 1 is no count where a ratio is wanted, nor the reverse."""
    words = [kind for kind in kinds if isinstance(kind, str)]
    if text in words:
        return text
    try:
        if bool in kinds:
            return {"true": True, "false": False}[text]
        if float in kinds:
            return float(text)
        if int in kinds:
            return int(text)
        if len(words) == len(kinds):
            raise ValueError
        return jnp.asarray([float(part) for part in text.split("/")], jnp.float32)
    except (ValueError, KeyError):
        wanted = [*words]
        if bool in kinds:
            wanted.append("true or false")
        elif float in kinds:
            wanted.append("a number")
        elif int in kinds:
            wanted.append("a whole number")
        elif len(words) < len(kinds):
            wanted.append("numbers separated by slashes")
        raise ValueError(f"{what} takes {', or '.join(wanted)}, got {text!r}") from None
