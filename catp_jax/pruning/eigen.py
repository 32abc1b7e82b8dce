"""Eigen Attention: keys and values are put down in few directions of their own.

Source: Saxena et al., "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression",
arXiv 2408.05646; its form without RoPE. The released code is followed.

    keys [n × d] · U [d × r] → cached [n × r]       queries · U, so that logits are as before but
    values       · V         → cached               for what lies outside the directions
    what a row takes of them · Vᵀ

On some samples, queries and keys of a key-value head are stacked, and so are values (`Gram`): their
singular vectors are its directions (`Directions`). A layer's rank is how many of them it takes
until they hold the share ε of the sum of singular values, of the head that needs most, in whole
eights (one by one, where a head has fewer than 64 channels). In the paper ε falls, layer by
layer, as long as the layer's output stays near (`Near`, `search`): those are the ranks without a
budget. With one, a single ε holds for all layers, the largest that fits. Budgets are of bytes: of
what visual tokens take, as many as `keep` of them would; the directions themselves come on top,
once a batch.

Our reading: the prompt is read as it is, and then put down; new tokens keep all channels (the paper
folds the directions into the weights, which is the same where no norm stands between, and saves
their bytes as well). Text of the prompt is put down as images are, and stays. Models with RoPE
between text and images are refused where directions are learned: their keys turn with the position.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from catp_jax.contract import Basis, Pruner, Reduction, Site, View
from catp_jax.pruning.learned import Learned
from catp_jax.pruning.scores import attention, check_keep, evidence_of
from catp_jax.struct import pytree, static

EIGHTS, WIDE = 8, 64
"""Ranks are whole eights, where a head is as wide as those of real models; else any number."""

PARTS = ("keys", "values")
Ranks = tuple[int, int]
"""Of keys and of values."""
Bases = tuple[Basis | None, ...]
"""Of keys and of values; None leaves them as they are."""


@pytree
class Gram:
    """Of a layer: products of keys and queries with themselves, and of values, over all tokens."""

    keys: Float[Array, "b kv d d"]
    values: Float[Array, "b kv d d"]


@pytree
class Gather(Pruner[Gram]):
    """Prunes nothing; its state is what directions are learned from."""

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)

    site: Site = static(default=Site.CACHE)
    keep: str = static(default="100%")

    def start(self, view: View) -> Gram:
        shown = evidence_of(view)
        batch, _, kv, channels = shown.keys.shape
        nothing = jnp.zeros((batch, kv, channels, channels), jnp.float32)
        return Gram(keys=nothing, values=nothing)

    def __call__(self, view: View, state: Gram) -> tuple[Reduction, Gram]:
        if not view.num_visual or view.values is None:
            return Reduction(), state
        shown = evidence_of(view)
        batch, rows, _, channels = shown.queries.shape
        kv = shown.keys.shape[2]
        is_row = view.sees.any(axis=2)
        queries = shown.queries * channels**0.5  # as projections make them
        queries = jnp.where(is_row[..., None, None], queries, 0)
        queries = queries.reshape(batch, rows, kv, -1, channels)
        keys, values = (
            jnp.where(view.valid[..., None, None], array.astype(jnp.float32), 0)
            for array in (shown.keys, view.values)
        )
        of_keys = jnp.einsum("bskgd,bskge->bkde", queries, queries)
        of_keys += jnp.einsum("bnkd,bnke->bkde", keys, keys)
        return Reduction(), Gram(keys=of_keys, values=jnp.einsum("bnkd,bnke->bkde", values, values))


class Directions:
    """What was learned of a model: directions of each layer and key-value head, the strongest
    first, and their singular values.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        """`arrays` of each layer: "3.keys" [kv, d, d], "3.keys.strength" [kv, d], of values too;
        where ranks were searched, "3.ranks" [2].
        """
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self.layers = sorted({int(name.split(".")[0]) for name in arrays})

    @classmethod
    def learned(cls, grams: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> "Directions":
        """From the sums by layer of `Gram.keys` and `Gram.values` over samples.

        Raises ValueError if there is no layer, or a number that is not finite.
        """
        if not grams:
            raise ValueError("no layer of the model reads visual tokens: nothing to learn from")
        arrays = {}
        for layer, pair in grams.items():
            for name, gram in zip(PARTS, pair, strict=True):
                if not np.isfinite(gram).all():
                    raise ValueError(f"layer {layer} has {name} that are not finite numbers")
                squares, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
                strength = np.sqrt(np.maximum(squares[:, ::-1], 0))
                arrays[f"{layer}.{name}"] = vectors[:, :, ::-1].astype(np.float32)
                arrays[f"{layer}.{name}.strength"] = strength.astype(np.float32)
        return cls(arrays)

    @property
    def channels(self) -> int:
        """Of a head."""
        return self.arrays[f"{self.layers[0]}.keys"].shape[-1]

    def rank(self, layer: int, name: str, share: float) -> int:
        """How many directions it takes to hold a share of the sum of singular values: as many as
        hold less, in the head that needs most.
        """
        return self.rounded(int((self._held(layer, name) < share).sum(axis=1).max()))

    def rounded(self, rank: int) -> int:
        """A rank that arrays may have: no smaller, but for all channels."""
        unit = EIGHTS if self.channels >= WIDE else 1
        return min(max(-(-rank // unit) * unit, unit), self.channels)

    def ranks(self, share: float) -> dict[int, Ranks]:
        """Of keys and of values, by layer, where directions hold this share (the paper's ε)."""
        return {
            layer: (self.rank(layer, "keys", share), self.rank(layer, "values", share))
            for layer in self.layers
        }

    def with_ranks(self, ranks: Mapping[int, Ranks]) -> "Directions":
        """The same, and which ranks a search has found."""
        found = {f"{layer}.ranks": np.asarray(pair, np.int32) for layer, pair in ranks.items()}
        return Directions(self.arrays | found)

    def searched(self) -> dict[int, Ranks]:
        """The ranks that a search has found. Raises ValueError if they cannot be."""
        every = {layer: self.arrays[f"{layer}.ranks"] for layer in self.layers}
        for layer, pair in every.items():
            if pair.shape != (2,) or not ((pair >= 1) & (pair <= self.channels)).all():
                raise ValueError(
                    f"layer {layer} has ranks {pair.tolist()}, where two of 1 to {self.channels} "
                    "are wanted; calibrate anew"
                )
        return {layer: (int(pair[0]), int(pair[1])) for layer, pair in every.items()}

    def left(self, ranks: Mapping[int, Ranks]) -> float:
        """The share of the bytes that these ranks leave."""
        return sum(map(sum, ranks.values())) / (2 * self.channels * len(self.layers))

    def within(self, share: float) -> dict[int, Ranks]:
        """The ranks of one ε for all layers that leave this share of the bytes at most; the
        smallest, if that is less than there can be.
        """
        every = [self._held(layer, name) for layer in self.layers for name in PARTS]
        known = np.unique(np.concatenate([held.ravel() for held in every]))
        low, high = 0, len(known)  # ranks change at these alone, and grow with them
        while low < high:
            middle = (low + high) // 2
            fits = self.left(self.ranks(np.nextafter(known[middle], 2.0))) <= share
            low, high = (middle + 1, high) if fits else (low, middle)
        return self.ranks(np.nextafter(known[low - 1], 2.0) if low else 0.0)

    def basis(self, layer: int, name: str, rank: int) -> Basis:
        """The first directions of a layer's keys or values, as many as this."""
        return Basis(matrix=jnp.asarray(self.arrays[f"{layer}.{name}"][:, :, :rank]))

    def bases(self, ranks: Mapping[int, Ranks]) -> dict[int, Bases]:
        """Those of all layers; None for all there are, which would turn keys and values for
        nothing.
        """
        return {
            layer: tuple(
                None if rank == self.channels else self.basis(layer, name, rank)
                for name, rank in zip(PARTS, pair, strict=True)
            )
            for layer, pair in ranks.items()
        }

    def _held(self, layer: int, name: str) -> Float[np.ndarray, "kv d"]:
        """Which share of the sum of singular values a head's first directions hold."""
        strength = self.arrays[f"{layer}.{name}.strength"].astype(np.float64)
        held, total = np.cumsum(strength, axis=1), strength.sum(axis=1, keepdims=True)
        return np.where(total > 0, held / np.where(total > 0, total, 1), 1)  # of nothing: all


@pytree
class Apart:
    """Squares, summed: of what a layer's attention gives, and of how far it is off in `bases`."""

    output: Float[Array, " b"]
    error: Float[Array, " b"]


@pytree
class Near(Pruner[Apart]):
    """Prunes nothing; its state says how far each layer's output is off if it is put down in
    `bases`. The output is what attention gives, in front of its projection (our reading).
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)

    site: Site = static(default=Site.CACHE)
    keep: str = static(default="100%")
    bases: dict[int, tuple[Basis, Basis]]

    def start(self, view: View) -> Apart:
        nothing = jnp.zeros(view.valid.shape[0], jnp.float32)
        return Apart(output=nothing, error=nothing)

    def __call__(self, view: View, state: Apart) -> tuple[Reduction, Apart]:
        if view.layer not in self.bases or view.values is None:
            return Reduction(), state
        shown, (keys_in, values_in) = evidence_of(view), self.bases[view.layer]
        group = shown.queries.shape[2] // shown.keys.shape[2]
        keys, values = (
            jnp.swapaxes(array.astype(jnp.float32), 1, 2) for array in (shown.keys, view.values)
        )
        off_keys = jnp.einsum("bknr,kdr->bnkd", keys_in.apply(keys), keys_in.matrix)

        def output(keys: Array, values: Array) -> Array:
            weights = attention(shown.queries, keys, view.sees)
            return jnp.einsum("bhsn,bhnd->bshd", weights, jnp.repeat(values, group, axis=1))

        whole = output(shown.keys, values)
        off = output(off_keys, values_in.back(values_in.apply(values))) - whole
        return Reduction(), Apart(
            output=(whole**2).sum(axis=(1, 2, 3)), error=(off**2).sum(axis=(1, 2, 3))
        )


STEP, MOST = 0.02, 0.025
"""By how much ε falls at a time, and how far a layer's output may be off."""


def search(
    directions: Directions,
    errors: Callable[[dict[int, tuple[Basis, Basis]]], Mapping[int, float]],
) -> dict[int, Ranks]:
    """The paper's ranks, of an ε for each layer: the last before the layer's output is off by 2.5 %
    of itself. `errors` says by how much it is, in some bases.
    """
    chosen = directions.ranks(2.0)
    whole = {
        layer: tuple(directions.basis(layer, name, directions.channels) for name in PARTS)
        for layer in directions.layers
    }
    going, share = set(directions.layers), 1.0
    while going and share > 0:
        ranks = directions.ranks(share)
        cut = {
            layer: tuple(
                Basis(matrix=jnp.where(jnp.arange(basis.matrix.shape[2]) < rank, basis.matrix, 0))
                for basis, rank in zip(whole[layer], ranks[layer], strict=True)
            )
            for layer in directions.layers
        }  # directions are zero, not gone: so it is one program for all
        off = errors(cut)  # type: ignore[arg-type]
        going = {layer for layer in going if off[layer] < MOST}
        chosen |= {layer: ranks[layer] for layer in going}
        share -= STEP
    return chosen


@pytree
class EigenAttention(Pruner[tuple[()]]):
    """Puts each layer's keys and values down in `bases`, which have all that a budget leaves, or
    without one (`keep` None) the ranks that were searched: all samples have the same, and `limit`
    is not read. `of_model` is the model that they were learned of, by its checksum.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)
    keeps_all: ClassVar[bool] = True
    is_by_bytes: ClassVar[bool] = True

    site: Site = static(default=Site.CACHE)
    keep: int | None = static()
    limit: Int[Array, " b"] | None = None
    of_model: str | None = static(default=None)
    bases: dict[int, Bases]

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)

    @classmethod
    def from_learned(cls, learned: Learned, keep: int | None, of: int) -> dict[str, Any]:
        """Its fields, for as many bytes as `keep` tokens `of` so many take."""
        directions = Directions(learned.arrays)
        ranks = directions.searched() if keep is None else directions.within(min(keep / of, 1.0))
        return {"bases": directions.bases(ranks)}

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if not view.num_visual or view.layer not in self.bases:
            return Reduction(), state
        keys, values = self.bases[view.layer]
        return Reduction(keys=keys, values=values), state
