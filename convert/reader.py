"""Loads a Hugging Face folder straight into a model, tensor by tensor, without torch.

Config and tensors are checked against each other before a byte of weights is read. Then each
tensor is mapped, changed to our layout and copied to where it belongs, a few at a time: host memory
stays near the largest tensor, beyond the model itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from catp_jax import checkpoint
from catp_jax.models.narrow import SCALE, Weights, is_narrowed, narrow, with_scales
from convert.adapter import find_adapter
from convert.configs import note, read_json
from convert.families import Config, Model, family_of, read_config
from convert.family import HUB, Family, Layout, bare_names
from convert.folders import refuse_unfinished
from convert.report import Report, make_report
from convert.rules import Match, Matching, listed
from convert.shards import DTYPES, Shard, Tensor, find_shards, have_same_values
from convert.streams import ahead

READ = tuple(DTYPES.values())
DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json; the second is the older

Progress = Callable[[int, int], None]
"""Called now and then with the bytes done and the bytes in all; in the end they are the same."""

Pair = tuple[Match, Tensor]

Place = Callable[[Any], Any]
"""Gives the leaves of an abstract model (jax.ShapeDtypeStruct) the shardings they are read onto."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checked Hugging Face folder: every parameter has its tensor, nothing has been read yet.

    `dtype` is the one number type to compute in if the tensors have several, else None.
    """

    folder: Path
    config: Config
    abstract: Any
    shards: list[Shard]
    tensors: dict[str, Tensor]
    layout: str
    matching: Matching
    dtype: np.dtype | None

    def stored(self, match: Match, dtype: np.dtype | None) -> np.dtype:
        """The number type of a parameter where `dtype` is asked for (None: as it is)."""
        found = self.tensors[match.source].dtype
        return found if dtype is None else cast(family_of(self.config), match.target, dtype)

    def report(self, dtypes: dict[str, np.dtype]) -> Report:
        """What becomes of every tensor, with the parameters of these number types."""
        return make_report(self.folder, self.layout, self.matching, self.tensors, dtypes)


def load_hf(
    folder: str | Path,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    place: Place | None = None,
    weights: Weights | None = None,
    ignore_config: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> tuple[Model, Report]:
    """The model in a Hugging Face folder, its weights as `dtype` (None: as the folder has them; if
    it has several types, that of config.json, as in transformers).

    A LoRA adapter beside the weights, or in the folder `adapter`, is merged, see `convert.adapter`.
    Keys of config.json in `ignore_config` are read as if they were not there. Parts that compute in
    float32 (BLIP-2's Q-Former) have float32 weights, whatever `dtype`. `place` chooses shardings;
    each process then reads the bytes of its own shards. `weights` narrows kernels one by one as
    they come, see `catp_jax.models.narrow`. Raises
    ValueError if config.json or the weights are damaged, unsupported or do not fit together.
    """
    wanted = parse_dtype(dtype)
    source = open_source(Path(folder), ignore_config, adapter)
    family = family_of(source.config)
    wanted = wanted or source.dtype
    dtypes = {
        match.target: cast(family, match.target, source.stored(match, wanted))
        for match in source.matching.matches
    }
    model = with_dtypes(source.abstract, dtypes)
    if place is not None:
        model = place(model)
    structs = checkpoint.names(model)
    pairs = by_position(source)
    arrays, done, total = {}, 0, sum(map(file_bytes, pairs))

    def read(pair: Pair) -> jax.Array:
        return _read(*pair, structs[pair[0].target])

    def read_bytes(pair: Pair) -> int:
        return structs[pair[0].target].size * structs[pair[0].target].dtype.itemsize

    for found in ahead([[pair] for pair in pairs], read, read_bytes):
        for (match, tensor), array in found:
            arrays |= narrowed(match.target, array, weights)
            del array
            done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    if weights is not None:
        model = with_scales(model, weights)
    return checkpoint.fill(model, arrays), source.report(dtypes)


def narrowed(name: str, array: jax.Array, weights: Weights | None) -> dict[str, jax.Array]:
    """A parameter by its name: as it is, or as a narrow kernel and its scales."""
    if weights is None or not is_narrowed(name):
        return {name: array}
    kernel, scale = jax.block_until_ready(narrow(array, weights))
    return {name: kernel, f"{name.removesuffix('kernel')}{SCALE}": scale}


def open_source(
    folder: Path, ignore_config: Sequence[str] = (), adapter: str | Path | None = None
) -> Source:
    """Checks a Hugging Face folder without reading its weights. Raises ValueError.

    But for those that may be another's twin: these are compared, as far as they are equal.
    """
    refuse_unfinished(folder)
    config = read_config(folder, ignore_config)
    addition = find_adapter(folder, None if adapter is None else Path(adapter))
    shards = find_shards(folder)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= {tensor.name: tensor for tensor in shard.tensors}
    family = family_of(config)
    if has_own_head(family, {bare: tensors[name] for bare, name in bare_names(tensors).items()}):
        config = family.with_own_head(config)
    model = abstract(config)
    shapes = {name: tuple(leaf.shape) for name, leaf in checkpoint.names(model).items()}
    layout, matching = family.match(
        {name: tensor.shape for name, tensor in tensors.items()}, shapes, config, str(folder)
    )
    _refuse_other_values(folder, tensors, matching)
    if addition is not None:
        tensors |= addition.apply(tensors, _finder(family, config, layout, tensors, shapes))
    found = {one.target: tensors[one.source] for one in matching.matches}
    _refuse_other_types(folder, [*found.values()])
    dtype = one_dtype(
        folder, family, {name: (one.dtype, one.nbytes) for name, one in found.items()}
    )
    return Source(folder, config, model, shards, tensors, layout.name, matching, dtype)


def _finder(
    family: Family, config: Config, layout: Layout, tensors: Mapping[str, Tensor], parameters: Any
) -> Callable[[str], str]:
    """Finds a checkpoint's tensor by its name in an adapter, which may be of another layout."""
    hub = {layout.to_hub(bare): name for bare, name in bare_names(tensors).items()}
    shared = {*family.relatives(family.head), family.head} if family.head else set()
    placed = family.places(shared, parameters, config, HUB)

    def find(name: str) -> str:
        names = [one.to_hub(name) for one in family.layouts.values()]
        targets = [one.target for one in placed.values()]
        if any(one in placed and targets.count(placed[one].target) > 1 for one in names):
            raise ValueError(f"{name} is one with another tensor, which would stay as it is")
        if not (own := [hub[one] for one in names if one in hub]):
            raise ValueError(f"there is no {name}")
        return own[0]

    return find


def one_dtype(
    folder: Path, family: Family, found: Mapping[str, tuple[np.dtype, int]]
) -> np.dtype | None:
    """The number type that parameters of several types are read as: what config.json says, else
    what most bytes are of. None if all are of one.

    `found` has type and bytes of each parameter. Those that stay float32 anyway do not count.
    """
    nbytes: dict[str, int] = {}
    for name, (dtype, size) in found.items():
        if not name.startswith(family.float32):
            nbytes[dtype.name] = nbytes.get(dtype.name, 0) + size
    if len(nbytes) < 2:
        return None
    raw = read_json(folder)
    parts = [raw, raw.get("text_config")]
    said = [part.get(key) for part in parts if isinstance(part, dict) for key in DTYPE_KEYS]
    one = next(
        (name for name in said if name in nbytes), max(nbytes, key=lambda name: nbytes[name])
    )
    note(f"{folder} has weights of {' and '.join(sorted(nbytes))}; all are read as {one}")
    return parse_dtype(one)


def has_own_head(family: Family, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head is a tensor by itself and not the embedding once more."""
    if family.head is None or family.head not in tensors:
        return False
    others = [tensors[name] for name in family.relatives(family.head) if name in tensors]
    head = tensors[family.head]
    return bool(others) and not any(have_same_values(head, other) for other in others)


def _refuse_other_types(folder: Path, tensors: list[Tensor]) -> None:
    wrong = [f"{one.name} ({one.dtype.name})" for one in tensors if one.dtype not in READ]
    if wrong:
        raise ValueError(
            f"{folder} has weights of other types than {', '.join(dtype.name for dtype in READ)}: "
            f"{listed(wrong)}"
        )


def _refuse_other_values(folder: Path, tensors: Mapping[str, Tensor], matching: Matching) -> None:
    """Raises ValueError for tensors that should be another one's twin and differ from it."""
    first = {one.target: one.source for one in matching.matches}
    different = [
        f"{twin.source} differs from {first[twin.target]}"
        for twin in matching.twins
        if not have_same_values(tensors[twin.source], tensors[first[twin.target]])
    ]
    if different:
        raise ValueError(
            f"{folder}: config.json says that these are the same, but {'; '.join(different)}; set "
            "tie_word_embeddings to false in text_config, if that is about the head, or take "
            "another copy of the checkpoint"
        )


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
    return nnx.eval_shape(lambda: family_of(config).build(config, _OneKey()))


def cast(family: Family, parameter: str, dtype: np.dtype) -> np.dtype:
    """`dtype`, or float32 for a parameter that is used in float32 only."""
    is_wide = parameter.startswith(family.float32) or (
        dtype == np.float16 and parameter.endswith(family.not_float16)
    )
    return np.dtype(np.float32) if is_wide else dtype


def with_dtypes(model: Any, dtypes: Mapping[str, np.dtype]) -> Any:
    """An abstract model with these number types."""
    structs = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name])
        for name, leaf in checkpoint.names(model).items()
    }
    return checkpoint.fill(model, structs)


def by_position(source: Source) -> list[Pair]:
    """The matches in the order of their bytes on disk."""
    matches = {match.source: match for match in source.matching.matches}
    return [
        (matches[tensor.name], source.tensors[tensor.name])  # which an adapter may have changed
        for shard in source.shards
        for tensor in shard.tensors
        if tensor.name in matches
    ]


def file_bytes(pair: Pair) -> int:
    """Bytes of a tensor in its file."""
    return pair[1].nbytes


def parse_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """A number type by name or object. Raises ValueError if weights cannot be of that type."""
    if dtype is None:
        return None
    names = ", ".join(known.name for known in READ)
    try:
        parsed = np.dtype(jnp.dtype(dtype))
    except TypeError as error:
        raise ValueError(f"dtype is {dtype!r}; wanted: {names}") from error
    if parsed not in READ:
        raise ValueError(f"dtype is {parsed.name}; wanted: {names}")
    return parsed


def read_part(match: Match, tensor: Tensor, dtype: np.dtype, index: Any = ...) -> np.ndarray:
    """A tensor in our layout, or what an index picks of it there; in host memory."""
    return tensor.read(lambda mapped: match.transform.forward(mapped)[index], dtype)


def _read(match: Match, tensor: Tensor, struct: jax.ShapeDtypeStruct) -> jax.Array:
    """One tensor in our layout, where `struct` wants it; what nobody asks for stays unread."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = tuple(one.indices(n)[:2] for one, n in zip(index, struct.shape, strict=True))
        if key not in parts:  # several devices may hold the same
            parts[key] = read_part(match, tensor, struct.dtype, index)
        return parts[key]

    if isinstance(struct.sharding, Sharding):
        array = jax.make_array_from_callback(struct.shape, struct.sharding, part)
    else:
        array = jnp.asarray(read_part(match, tensor, struct.dtype))
    return array.block_until_ready()  # or host copies of several tensors would pile up
