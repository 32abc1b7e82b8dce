"""A model from the arrays that a folder holds, whichever kind of folder it is."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from catp_jax import leaves
from catp_jax.models.narrow import SCALE, Weights, is_narrowed, narrow, with_scales
from convert.dtypes import cast, one_dtype, parse_dtype, with_dtypes
from convert.families import Config, Model, family_of

Run = TypeVar("Run", bound=Mapping[str, Any])

Progress = Callable[[int, int], None]
"""Called now and then with the bytes done and the bytes in all; in the end they are the same."""

Place = Callable[[Any], Any]
"""Gives the leaves of an abstract model (jax.ShapeDtypeStruct) the shardings they are read onto."""


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """A checked folder; nothing has been read of its parameters. `stored` are these, abstract, with
    the number types they have.
    """

    folder: Path
    config: Config
    stored: Mapping[str, jax.ShapeDtypeStruct]

    @abc.abstractmethod
    def read(self, name: str, struct: jax.ShapeDtypeStruct) -> np.ndarray | jax.Array:
        """A parameter: with the number type and on the devices that `struct` says, or in host
        memory if it says none. Raises ValueError if it is damaged.
        """

    def called(self, name: str) -> str:
        """What the folder's files call a parameter."""
        return name

    def is_unchanged(self, name: str, array: np.ndarray) -> bool:
        """Whether a parameter, as it is stored, is what it was when the folder was written."""
        return True


def load_model(
    source: Source,
    dtype: DTypeLike | None = None,
    place: Place | None = None,
    weights: Weights | None = None,
) -> Model:
    """The model in a folder, its weights as `dtype`: see `convert.load`."""
    model = abstract_as(source, dtype)
    if place is not None:
        model = place(model)
    wanted = leaves.named(model)
    sizes = {name: leaves.nbytes(wanted[name]) for name in source.stored}
    arrays: dict[str, jax.Array] = {}
    for run in leaves.ahead(lambda name: source.read(name, wanted[name]), sizes):
        for name in [*run]:
            array = run.pop(name)
            if not isinstance(array, jax.Array):  # it has no sharding: onto the first device
                array = jax.device_put(array).block_until_ready()  # or host copies would pile up
            arrays |= {name: array} if weights is None else _narrowed(name, array, weights)
            del array
    if weights is not None:
        model = with_scales(model, weights)
    return leaves.fill(model, arrays)


def abstract_as(source: Source, dtype: DTypeLike | None = None) -> Model:
    """The abstract model in the number types that a load as `dtype` gives."""
    family = family_of(source.config)
    wanted = parse_dtype(dtype) or one_dtype(source.folder, family, source.stored)
    dtypes = {
        name: cast(family, name, wanted or struct.dtype) for name, struct in source.stored.items()
    }
    return with_dtypes(abstract(source.config), dtypes)


def _narrowed(name: str, array: jax.Array, weights: Weights) -> dict[str, jax.Array]:
    """A parameter by its name: as it is, or as a narrow kernel and its scales."""
    if not is_narrowed(name):
        return {name: array}
    kernel, scale = jax.block_until_ready(narrow(array, weights))
    return {name: kernel, f"{name.removesuffix('kernel')}{SCALE}": scale}


def counted(
    runs: Iterable[Run], sizes: Mapping[str, int], progress: Progress | None, done: int, total: int
) -> Iterator[Run]:
    """The runs; `progress` hears of the bytes of each, `sizes` by name, when it is done with."""
    for run in runs:
        size = sum(sizes[name] for name in run)
        yield run
        done += size
        if progress is not None:
            progress(done, total)


class _OneKey(nnx.Rngs):
    """Hands out one key again and again: what shapes need, without counting (7 × as fast)."""

    def __init__(self):
        pass

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract(config: Config) -> Any:
    """The model of a configuration without its numbers: every leaf a jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda leaf: leaf, _traced(config))  # the caller's own


@functools.lru_cache(maxsize=4)  # reading a converted folder wants one model three times
def _traced(config: Config) -> Any:
    return nnx.eval_shape(lambda: family_of(config).models[type(config)](config, rngs=_OneKey()))
