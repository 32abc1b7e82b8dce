"""Loads a Hugging Face folder straight into a model, tensor by tensor, without torch.

Config and tensors are checked against each other before a byte of weights is read. Then each
tensor is mapped, changed to our layout and copied to where it belongs, a few at a time: host memory
stays near the largest tensor, beyond the model itself.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from catp_jax import leaves
from catp_jax.messages import listed
from catp_jax.models.narrow import Weights
from convert.adapter import find_adapter
from convert.dtypes import READ
from convert.families import Config, Model, family_of
from convert.family import Family, Layout
from convert.folders import refuse_unfinished
from convert.loading import Place, Source, abstract, load_model
from convert.manifest import read_config
from convert.report import Report, make_report
from convert.rules import Matching, copy
from convert.shards import Shard, Tensor
from convert.weights import find_shards


@dataclasses.dataclass(frozen=True)
class HfSource(Source):
    """A Hugging Face folder, in which every parameter has its tensor. An adapter may have changed
    `tensors`, not `shards`.
    """

    layout: Layout
    shards: list[Shard]
    tensors: dict[str, Tensor]
    matching: Matching

    def read(self, name: str, struct: jax.ShapeDtypeStruct) -> np.ndarray | jax.Array:
        one = self.matching.filled[name]
        values = one.transform.forward(self.tensors[one.source].values())
        return leaves.placed(struct, lambda index: copy(values[index], struct.dtype))

    def called(self, name: str) -> str:
        return self.matching.filled[name].source

    def report(self, dtypes: Mapping[str, np.dtype]) -> Report:
        """What becomes of every tensor, with the parameters of these number types."""
        return make_report(self.folder, self.layout.name, self.matching, self.tensors, dtypes)


def load_hf(
    folder: str | Path,
    dtype: DTypeLike | None = None,
    place: Place | None = None,
    weights: Weights | None = None,
    ignore_config: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> tuple[Model, Report]:
    """The model in a Hugging Face folder, as `convert.load` reads it, and a report."""
    source = open_hf(Path(folder), ignore_config, adapter)
    model = load_model(source, dtype, place, weights)
    return model, source.report({name: x.dtype for name, x in leaves.named(model).items()})


def open_hf(
    folder: Path, ignore_config: Sequence[str] = (), adapter: str | Path | None = None
) -> HfSource:
    """Checks a Hugging Face folder without reading its weights. Raises ValueError.

    But for those that may be another's twin: these are compared, as far as they are equal.
    """
    refuse_unfinished(folder)
    config = read_config(folder, ignore_config)
    addition = find_adapter(folder, None if adapter is None else Path(adapter))
    shards = find_shards(folder)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    family = family_of(config)
    layout = family.layout_of(tensors, str(folder))
    if _has_own_head(family, layout, tensors):
        config = family.with_own_head(config)
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.named(abstract(config)).items()}
    names = family.names(shapes, config, layout)
    matching = names.match({name: one.shape for name, one in tensors.items()}, shapes, str(folder))
    _refuse_other_values(folder, tensors, matching)
    if addition is not None:
        tensors |= addition.apply(tensors, _finder(family, config, layout, tensors, shapes))
    _refuse_other_types(folder, [tensors[one.source] for one in matching.filled.values()])
    stored = {
        name: jax.ShapeDtypeStruct(shapes[name], tensors[one.source].dtype)
        for name, one in matching.filled.items()
    }
    return HfSource(folder, config, stored, layout, shards, tensors, matching)


def _finder(
    family: Family,
    config: Config,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    parameters: Iterable[str],
) -> Callable[[str], str]:
    """Finds a checkpoint's tensor by its name in an adapter, which may be of another layout."""
    shared = {*family.relatives(family.head), family.head} if family.head else set()
    placed = family.names(parameters, config).places(shared)
    targets = [one.target for one in placed.values()]

    def find(name: str) -> str:
        for hub_name in [known.to_hub(name) for known in family.layouts.values()]:
            if hub_name in placed and targets.count(placed[hub_name].target) > 1:
                raise ValueError(f"{name} is one with another tensor, which would stay as it is")
            if (own := layout.from_hub(hub_name)) in tensors:
                return own
        raise ValueError(f"there is no {name}")

    return find


def _has_own_head(family: Family, layout: Layout, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head is a tensor by itself and not the embedding once more."""
    if family.head is None or (head := tensors.get(layout.from_hub(family.head))) is None:
        return False
    names = [layout.from_hub(name) for name in family.relatives(family.head)]
    others = [tensors[name] for name in names if name in tensors]
    return bool(others) and not any(head.equals(other) for other in others)


def _refuse_other_types(folder: Path, tensors: Iterable[Tensor]) -> None:
    wrong = [f"{one.name} ({one.dtype.name})" for one in tensors if one.dtype not in READ]
    if wrong:
        raise ValueError(
            f"{folder} has weights of other types than {', '.join(dtype.name for dtype in READ)}: "
            f"{listed(wrong)}"
        )


def _refuse_other_values(folder: Path, tensors: Mapping[str, Tensor], matching: Matching) -> None:
    """Raises ValueError for tensors that should be another one's twin and differ from it."""
    different = [
        f"{twin.source} differs from {first.source}"
        for twin in matching.twins
        for first in [matching.filled[twin.target]]
        if not tensors[twin.source].equals(tensors[first.source])
    ]
    if different:
        raise ValueError(
            f"{folder}: config.json says that these are the same, but {'; '.join(different)}; set "
            "tie_word_embeddings to false in text_config, if that is about the head, or take "
            "another copy of the checkpoint"
        )
