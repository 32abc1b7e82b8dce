"""AttentionPredictor: a step reads the blocks that a small network expects to be attended to.

Source: Yang et al., "AttentionPredictor: Temporal Pattern Matters for Efficient LLM Inference",
arXiv 2502.04077.

    the last `rows` rows of attention, the highest of each block → network → the next row
    the best blocks of that are read, and the step's own row joins the others

From the released code: the network, one for all layers and heads, and the history, which begins
with the prompt's last rows. A step's row is of what it read, zero elsewhere; every 5th, in the
paper, of all tokens. Only those steps multiply with all keys. The network itself is not free: for
each key-value head it takes 4,752 multiplications a row and block.

Our reading: heads that share keys choose together, by the highest weight in the group, and so do
all rows of a prompt (beams). The paper keeps the first and the last 64 tokens besides; text takes
their place here and always stays. Where a layer attends to visual tokens alone their number is
fixed, and nothing is first or last. New tokens are no part of the softmax that makes a row. The
training code was not released.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from catp_jax.contract import Keep, Pruner, Reduction, Site, View, keep_columns
from catp_jax.pruning.learned import Learned
from catp_jax.pruning.scores import (
    LOGITS_AT_ONCE,
    attention,
    check_keep,
    evidence_of,
    keep_best,
    last_rows,
    rank,
)
from catp_jax.struct import pytree, static


@pytree
class Convolution:
    """One layer's arrays, shaped and named as PyTorch has them."""

    weight: Float[Array, "o i *kernel"]
    bias: Float[Array, " o"]

    @classmethod
    def start(cls, key: PRNGKeyArray, out: int, into: int, *kernel: int) -> "Convolution":
        """Random ones, as PyTorch draws them."""
        weight = jax.random.uniform(key, (out, into, *kernel), jnp.float32, -1, 1)
        bias = jax.random.uniform(jax.random.fold_in(key, 1), (out,), jnp.float32, -1, 1)
        most = (weight.size // out) ** -0.5
        return cls(weight=weight * most, bias=bias * most)

    def __call__(self, x: Float[Array, "n i *rest"]) -> Float[Array, "n o *rest"]:
        strides = (1,) * (x.ndim - 2)
        x = jax.lax.conv_general_dilated(x, self.weight, strides, "SAME")
        return x + self.bias.reshape(1, -1, *strides)


@pytree
class Network:
    """Predicts the next row of a history: 4,833 parameters."""

    conv1: Convolution
    conv2: Convolution
    conv3: Convolution

    @classmethod
    def start(cls, key: PRNGKeyArray) -> "Network":
        """One that has learned nothing yet."""
        first, second, third = jax.random.split(key, 3)
        return cls(
            conv1=Convolution.start(first, 16, 1, 3, 3),
            conv2=Convolution.start(second, 32, 16, 3, 3),
            conv3=Convolution.start(third, 1, 32, 1),
        )

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "Network":
        """From arrays by their names in PyTorch, such as "conv1.weight"."""
        layers = {
            name: Convolution(
                weight=jnp.asarray(arrays[f"{name}.weight"]),
                bias=jnp.asarray(arrays[f"{name}.bias"]),
            )
            for name in ("conv1", "conv2", "conv3")
        }
        return cls(**layers)

    def named(self) -> dict[str, Array]:
        """The arrays by these names."""
        layers = {"conv1": self.conv1, "conv2": self.conv2, "conv3": self.conv3}
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in layers.items()
            for part in ("weight", "bias")
        }

    def __call__(
        self, history: Float[Array, "*batch rows blocks"], real: Bool[Array, "*batch blocks"]
    ) -> Float[Array, "*batch blocks"]:
        """Zero for a block that is not `real`, and what stands there is not read."""
        rows, blocks = history.shape[-2:]
        there = real.reshape(-1, 1, 1, blocks)
        x = jnp.where(there, history.astype(jnp.float32).reshape(-1, 1, rows, blocks), 0)
        for layer in (self.conv1, self.conv2):
            x = jnp.where(there, jax.nn.relu(layer(x)), 0)  # a bias must not reach its neighbours
        x = self.conv3(x.mean(axis=2))
        return jnp.where(real, x.reshape(real.shape), 0)


@pytree
class State:
    """A layer's `history`, its last row the latest, and how many `steps` are in it."""

    history: Float[Array, "b kv seen blocks"]
    steps: Int[Array, " b"]


@pytree
class AttentionPredictor(Pruner[State]):
    """Each key-value head reads the best blocks of `block` visual tokens, `keep` tokens together.

    `limit` leaves fewer to a sample: as many blocks as fit, one at least; a sample that has no more
    tokens than that is not limited. `of_model` is the model that the network was trained on, by its
    checksum. A history has `rows` rows, and every `refresh`-th step adds one
    of all tokens.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.READ,)
    keeps_all: ClassVar[bool] = True

    site: Site = static(default=Site.READ)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    of_model: str | None = static(default=None)
    network: Network
    block: int = static(default=16)
    rows: int = static(default=64)
    refresh: int = static(default=5)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("block", "rows", "refresh"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"AttentionPredictor wants {name} at least 1, got {number}")
        if over := self.keep % self.block:
            below = self.keep - over
            near = " or ".join(str(some) for some in (below, below + self.block) if some)
            raise ValueError(
                f"AttentionPredictor reads whole blocks of {self.block} visual tokens, got "
                f"keep={self.keep}; give it {near}"
            )

    @classmethod
    def from_learned(cls, learned: Learned, keep: int, of: int) -> dict[str, Any]:
        """Its fields; a budget is rounded down to whole blocks, one at least."""
        block, rows = (int(learned.settings[name]) for name in ("block", "rows"))
        network = Network.of(learned.arrays)
        keep = max(keep // block, 1) * block
        return {"keep": keep, "network": network, "block": block, "rows": rows}

    def start(self, view: View) -> State:
        shown = evidence_of(view)
        batch, columns, kv, _ = shown.keys.shape
        steps = jnp.zeros(batch, jnp.int32)
        if not view.num_visual:
            nothing = jnp.zeros((batch, kv, self.rows, 0), jnp.float32)
            return State(history=nothing, steps=steps)
        wanted = jnp.full((batch, 1), self.rows, jnp.int32)
        rows, looks = last_rows(view.sees.any(axis=2), wanted, self.rows)
        queries = jnp.take_along_axis(shown.queries, rows[:, :, None, None], axis=1)
        sees = jnp.take_along_axis(view.sees, rows[:, :, None], axis=1) & looks[..., None]
        keys = jnp.swapaxes(shown.keys, 1, 2)
        history = jax.lax.map(
            lambda row: self.row(row[0][:, None], keys, row[1][:, None], view.num_visual),
            (jnp.swapaxes(queries, 0, 1), jnp.swapaxes(sees, 0, 1)),
            batch_size=max(LOGITS_AT_ONCE // (batch * queries.shape[2] * columns), 1),
        )
        return State(history=jnp.moveaxis(history, 0, 2), steps=steps)

    def __call__(self, view: View, state: State) -> tuple[Reduction, State]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        shown = evidence_of(view)
        is_visual = (view.valid & (view.numbers >= 0))[:, : view.num_visual]
        blocks = self.best(state.history, is_visual)
        keep = self.tokens(view, is_visual, blocks)

        # gathered as the layer's own attention does it, so that a compiler does it once
        keys = jnp.swapaxes(shown.keys, 1, 2)
        kept = jnp.take_along_axis(keys, keep.indices[..., None], axis=2)
        visual, sees = blocks.indices.shape[2] * self.block, keep_columns(view.sees, keep)
        row = self.row(shown.queries, kept, sees, visual)
        others = jnp.zeros_like(state.history[:, :, 0])
        selected = jnp.put_along_axis(others, blocks.indices, row, axis=2, inplace=False)
        due = state.steps % self.refresh == self.refresh - 1

        def of_all() -> Float[Array, "b kv blocks"]:
            row = self.row(shown.queries, keys, view.sees, view.num_visual)
            return jnp.where(due[:, None, None], row, selected)

        # samples advance together: one that is behind the others has ended, and asks for nothing
        is_due = state.steps.max() % self.refresh == self.refresh - 1
        row = jax.lax.cond(is_due, of_all, lambda: selected)
        history = jnp.concatenate([state.history[:, :, 1:], row[:, :, None]], axis=2)
        return Reduction(tokens=keep), State(history=history, steps=state.steps + 1)

    def best(
        self, history: Float[Array, "b kv rows blocks"], is_visual: Bool[Array, "b v"]
    ) -> Keep:
        """Blocks that each head reads, of those that hold a visual token."""
        real = by_block(is_visual, self.block).any(axis=-1)
        real = jnp.broadcast_to(real[:, None], (*history.shape[:2], history.shape[3]))
        limit = self.limit
        if limit is not None:
            is_limited = limit < is_visual.sum(axis=1, dtype=jnp.int32)
            limit = jnp.where(is_limited, jnp.maximum(limit // self.block, 1), real.shape[2])
        predicted = self.network(history, real)
        return keep_best(self.keep // self.block, real, predicted, limit=limit)

    def tokens(self, view: View, is_visual: Bool[Array, "b v"], blocks: Keep) -> Keep:
        """Visual tokens of these blocks, empty where a block is not full, and all text."""
        place = jnp.arange(self.block, dtype=jnp.int32)[None, None, None]
        indices = blocks.indices[..., None] * self.block + place
        indices = indices.reshape(*blocks.indices.shape[:2], -1)
        valid = jnp.repeat(blocks.valid, self.block, axis=2) & (indices < view.num_visual)
        indices = jnp.minimum(indices, view.num_visual - 1)
        valid &= jnp.take_along_axis(is_visual[:, None], indices, axis=2)
        text = jnp.arange(view.num_visual, view.valid.shape[1], dtype=jnp.int32)
        shape = (*indices.shape[:2], text.shape[0])
        is_text = view.valid[:, None, view.num_visual :]
        return Keep(
            indices=jnp.concatenate([indices, jnp.broadcast_to(text, shape)], axis=2),
            valid=jnp.concatenate([valid, jnp.broadcast_to(is_text, shape)], axis=2),
        )

    def row(
        self,
        queries: Float[Array, "b s h dk"],
        keys: Float[Array, "b kv n dk"],
        sees: Bool[Array, "b *kv s n"],
        visual: int,
    ) -> Float[Array, "b kv blocks"]:
        """The highest weights on the first `visual` columns, of all rows together."""
        (batch, rows, heads, channels), kv = queries.shape, keys.shape[1]
        by_head = jax.vmap(attention, in_axes=(2, 1, 1 if sees.ndim == 4 else None), out_axes=1)
        grouped = queries.reshape(batch, rows, kv, heads // kv, channels)
        weights = by_head(grouped, keys[:, :, :, None], sees).reshape(batch, heads, rows, -1)
        return pooled(weights[..., :visual], kv, self.block).max(axis=2)


def by_block(array: Shaped[Array, "*batch n"], block: int) -> Shaped[Array, "*batch blocks size"]:
    """The last axis in blocks; what the last one lacks is zero."""
    missing = -array.shape[-1] % block
    array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
    return array.reshape(*array.shape[:-1], -1, block)


def pooled(weights: Float[Array, "b h s n"], kv: int, block: int) -> Float[Array, "b kv s blocks"]:
    """The highest weight in each block, and in each key-value head's group of query heads."""
    batch, _, rows, columns = weights.shape
    of_group = weights.reshape(batch, kv, -1, rows, columns).max(axis=2)
    return by_block(of_group, block).max(axis=-1)


def hit_rate(
    predicted: Float[Array, "*batch blocks"],
    true: Float[Array, "*batch blocks"],
    number: int,
    real: Bool[Array, "*batch blocks"] | None = None,
) -> Float[Array, "*batch"]:
    """Which share of the `number` highest blocks was predicted to be among them, of those that are
    `real` (None: all); 0 where none is.
    """
    real = jnp.ones(true.shape, bool) if real is None else real
    mine, theirs = (
        (rank(jnp.where(real, values, -jnp.inf)) < number) & real for values in (predicted, true)
    )
    hits, wanted = (some.sum(axis=-1, dtype=jnp.float32) for some in (mine & theirs, theirs))
    return hits / jnp.maximum(wanted, 1)
