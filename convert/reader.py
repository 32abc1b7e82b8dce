"""Loads a Hugging Face folder straight into a model, tensor by tensor, without torch.

Config and tensors are checked against each other before a byte of weights is read. Then each
tensor is mapped, changed to our layout and copied to where it belongs: host memory stays near the
largest tensor, beyond the model itself.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from catp_jax import checkpoint
from catp_jax.models.mllama import Mllama, MllamaConfig
from convert.configs import read_config
from convert.mllama import match_mllama
from convert.report import Report, make_report
from convert.rules import Match, copy
from convert.shards import DTYPES, Shard, Tensor, find_shards

Progress = Callable[[int, int], None]
"""Called after each tensor with the bytes done and the bytes in all."""

Place = Callable[[Mllama], Mllama]
"""Gives the leaves of an abstract model (jax.ShapeDtypeStruct) the shardings they are read onto."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checked Hugging Face folder: every parameter has its tensor, nothing has been read yet."""

    folder: Path
    config: MllamaConfig
    abstract: Mllama
    shards: list[Shard]
    tensors: dict[str, Tensor]
    layout: str
    matches: list[Match]
    ignored: dict[str, str]

    def report(self, dtype: np.dtype | None) -> Report:
        """What becomes of every tensor if stored as `dtype` (None: as it is)."""
        return make_report(
            self.folder, self.layout, self.matches, self.ignored, self.tensors, dtype
        )


def load_hf(
    folder: str | Path,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    place: Place | None = None,
) -> tuple[Mllama, Report]:
    """The model in a Hugging Face folder, its weights as `dtype` (None: as the folder has them).

    `place` chooses shardings; each process then reads only the bytes of its own shards. Raises
    ValueError if config.json or the weights are damaged, unsupported or do not fit together.
    """
    wanted = parse_dtype(dtype)
    source = open_source(Path(folder))
    dtypes = {match.target: source.tensors[match.source].dtype for match in source.matches}
    abstract = with_dtypes(source.abstract, dtypes, wanted)
    if place is not None:
        abstract = place(abstract)
    structs = checkpoint.names(abstract)
    arrays, done, total = {}, 0, sum(tensor.nbytes for tensor in source.tensors.values())
    for match, tensor in by_position(source):
        arrays[match.target] = _read(match, tensor, structs[match.target])
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    return checkpoint.fill(abstract, arrays), source.report(wanted)


def open_source(folder: Path) -> Source:
    """Checks a Hugging Face folder without reading its weights. Raises ValueError."""
    config = read_config(folder)
    shards = find_shards(folder)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= {tensor.name: tensor for tensor in shard.tensors}
    abstract = abstract_model(config)
    shapes = {name: tuple(leaf.shape) for name, leaf in checkpoint.names(abstract).items()}
    layout, matches, ignored = match_mllama(
        {name: tensor.shape for name, tensor in tensors.items()}, shapes, config, str(folder)
    )
    return Source(folder, config, abstract, shards, tensors, layout.name, matches, ignored)


class _OneKey(nnx.Rngs):
    """Hands out one key again and again: what shapes need, without counting (7 × as fast)."""

    def __init__(self):
        pass

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(config: MllamaConfig) -> Mllama:
    """The model without its numbers: every leaf a jax.ShapeDtypeStruct."""
    return nnx.eval_shape(lambda: Mllama(config, rngs=_OneKey()))


def with_dtypes(abstract: Mllama, dtypes: dict[str, np.dtype], dtype: np.dtype | None) -> Mllama:
    """The abstract model with `dtype` everywhere, or with each parameter's own if it is None."""
    structs = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name] if dtype is None else dtype)
        for name, leaf in checkpoint.names(abstract).items()
    }
    return checkpoint.fill(abstract, structs)


def by_position(source: Source) -> Iterator[tuple[Match, Tensor]]:
    """The matches in the order of their bytes on disk."""
    matches = {match.source: match for match in source.matches}
    for shard in source.shards:
        for tensor in shard.tensors:
            if tensor.name in matches:
                yield matches[tensor.name], tensor


def parse_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """A number type by name or object. Raises ValueError if weights cannot be of that type."""
    if dtype is None:
        return None
    names = ", ".join(known.name for known in DTYPES.values())
    try:
        parsed = np.dtype(jnp.dtype(dtype))
    except TypeError as error:
        raise ValueError(f"dtype is {dtype!r}; wanted: {names}") from error
    if parsed not in DTYPES.values():
        raise ValueError(f"dtype is {parsed.name}; wanted: {names}")
    return parsed


def _read(match: Match, tensor: Tensor, struct: jax.ShapeDtypeStruct) -> jax.Array:
    """One tensor in our layout, where `struct` wants it; what nobody asks for stays unread."""
    view = match.transform.forward(tensor.map())

    def part(index: Any) -> np.ndarray:
        return copy(view[index], struct.dtype)  # the array must not depend on the file

    if isinstance(struct.sharding, Sharding):
        array = jax.make_array_from_callback(struct.shape, struct.sharding, part)
    else:
        array = jnp.asarray(part((...,)))
    return array.block_until_ready()  # or host copies of several tensors would pile up
