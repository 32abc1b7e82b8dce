"""What methods share: attention weights from a view's queries and keys, and choosing the best.

Scores are float32 whatever the model's dtype. Only what a method reads is computed: a view's rows
are cut out *before* the product with the keys.
"""

import abc
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from catp_jax.contract import Attention, Keep, Pruner, Reduction, View
from catp_jax.struct import pytree, static

LOGITS_AT_ONCE = 2**25
"""Attention weights that exist at one time (128 MiB in float32); results don't depend on it."""


Weigh = Callable[[Float[Array, "b h s n"], Bool[Array, "b one s n"]], Float[Array, "b h s n"]]
"""What makes weights of logits, over what each row sees."""


def softmax(
    logits: Float[Array, "b h s n"], sees: Bool[Array, "b one s n"]
) -> Float[Array, "b h s n"]:
    """As the layer weighs."""
    return jax.nn.softmax(logits, axis=-1, where=sees)


def attention(
    queries: Float[Array, "b s h dk"],
    keys: Float[Array, "b n kv dk"],
    sees: Bool[Array, "b s n"],
    weigh: Weigh = softmax,
) -> Float[Array, "b h s n"]:
    """Attention weights over what each row sees; zero throughout in a row that sees nothing."""
    logits = grouped_logits(queries, keys)
    logits = logits.reshape(logits.shape[0], -1, *logits.shape[3:])
    return jnp.where(sees[:, None], weigh(logits, sees[:, None]), 0)


def grouped_logits(
    queries: Float[Array, "b s h dk"], keys: Float[Array, "b n kv dk"]
) -> Float[Array, "b kv g s n"]:
    """What the softmax is of: of each key-value head's group of query heads, in float32."""
    batch, rows, heads, channels = queries.shape
    kv_heads = keys.shape[2]
    queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
    grouped = queries.reshape(batch, rows, kv_heads, heads // kv_heads, channels)
    return jnp.einsum("bskgd,bnkd->bkgsn", grouped, keys)


def evidence_of(view: View) -> Attention:
    """The attention that a view shows. Raises ValueError if it shows none."""
    if view.attention is None:
        raise ValueError(f"there is no attention over visual tokens at site {view.site.name}")
    return view.attention


def attention_received(
    queries: Float[Array, "b s h dk"],
    keys: Float[Array, "b n kv dk"],
    sees: Bool[Array, "b s n"],
    weigh: Weigh = softmax,
) -> Float[Array, "b h n"]:
    """Attention that each column receives, summed over the rows, by head."""
    batch, rows, heads, _ = queries.shape
    columns = keys.shape[1]
    block = max(LOGITS_AT_ONCE // (batch * heads * columns), 1)
    if rows <= block:
        return attention(queries, keys, sees, weigh).sum(axis=2)

    passes = math.ceil(rows / block)
    block = math.ceil(rows / passes)
    padding = passes * block - rows
    queries = jnp.pad(queries, ((0, 0), (0, padding), (0, 0), (0, 0)))
    sees = jnp.pad(sees, ((0, 0), (0, padding), (0, 0)))

    def add(index: Int[Array, ""], total: Float[Array, "b h n"]) -> Float[Array, "b h n"]:
        some = jax.lax.dynamic_slice_in_dim(queries, index * block, block, axis=1)
        mask = jax.lax.dynamic_slice_in_dim(sees, index * block, block, axis=1)
        return total + attention(some, keys, mask, weigh).sum(axis=2)

    nothing = jnp.zeros((batch, heads, columns), jnp.float32)
    return jax.lax.fori_loop(0, passes, add, nothing)


def last_row_attention(view: View) -> Float[Array, "b h n"]:
    """Attention weights of the last row that sees an image, by head."""
    shown = evidence_of(view)
    rows = jnp.arange(view.sees.shape[1], dtype=jnp.int32)
    last = jnp.where(view.sees.any(axis=-1), rows[None], 0).max(axis=1)
    queries = jnp.take_along_axis(shown.queries, last[:, None, None, None], axis=1)
    sees = jnp.take_along_axis(view.sees, last[:, None, None], axis=1)
    return attention(queries, shown.keys, sees)[:, :, 0]


def last_rows(
    is_row: Bool[Array, "b s"], wanted: Int[Array, "b one"], most: int
) -> tuple[Int[Array, "b most"], Bool[Array, "b most"]]:
    """The numbers of each sample's last rows, and which are among the last `wanted`."""
    size = is_row.shape[1]
    number = is_row.sum(axis=1, dtype=jnp.int32, keepdims=True)
    in_order = jnp.argsort(~is_row, axis=1, stable=True).astype(jnp.int32)
    place = number - most + jnp.arange(most, dtype=jnp.int32)[None]
    is_wanted = (place >= jnp.maximum(number - wanted, 0)) & (place < number)
    return jnp.take_along_axis(in_order, jnp.clip(place, 0, size - 1), axis=1), is_wanted


Seed = int | Int[Array, ""] | UInt32[Array, ""] | UInt32[Array, " b"]
"""What draws: one for all samples, or one for each."""


def drawn(seed: Seed, numbers: Int[Array, "b n"]) -> Float[Array, "b n"]:
    """A number between 0 and 1 for each entry, which depends on the seed and on its own alone."""
    seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), numbers.shape[:1])

    def draw(seed: UInt32[Array, ""], which: Int[Array, ""]) -> Float[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), which))

    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(seeds, numbers)


def rank(scores: Float[Array, "... n"]) -> Int[Array, "... n"]:
    """Rank of each entry along the last axis, 0 for the highest; equal ones by lower index."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True)


def check_keep(keep: int) -> None:
    """Raises ValueError for a budget that leaves nothing."""
    if keep < 1:
        raise ValueError(f"pruning wants to keep at least 1 visual token, got keep={keep}")


def keep_best(
    keep: int,
    member: Bool[Array, "b *n"],
    *scores: Float[Array, "b *n"] | Int[Array, "b *n"],
    limit: Int[Array, " b"] | None = None,
) -> Keep:
    """The `keep` members with the highest scores along the last axis, in their original order,
    empty entries last; of scores by head, for each head.

    `limit` leaves fewer to a sample, so that each may have a share of its own tokens.

    Scores decide lexicographically: the second one where the first is equal, and so on; then the
    lower index wins. `keep` larger than the axis keeps everything.

    Raises ValueError if `keep` is below 1.
    """
    check_keep(keep)
    size, last = member.shape[-1], member.ndim - 1
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), member.shape)
    keys = (~member, *(-score for score in scores), index)
    chosen = jax.lax.sort(keys, num_keys=len(keys), dimension=last)[-1][..., : min(keep, size)]
    is_member = jnp.take_along_axis(member, chosen, axis=last)
    if limit is not None:
        place = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, last)
        is_member &= place < limit.reshape(-1, *(1,) * last)
    empty, indices = jax.lax.sort((~is_member, chosen), num_keys=2, dimension=last)
    return Keep(indices=indices, valid=~empty)


def keep_visual(
    view: View,
    keep: int,
    scores: Float[Array, "b n"] | Float[Array, "b kv n"],
    limit: Int[Array, " b"] | None = None,
) -> Keep:
    """The `keep` visual tokens of a view with the highest scores, and all its text, in their order;
    of scores by head, for each head.

    `limit` leaves fewer visual tokens to a sample.
    """
    is_visual, valid = view.valid & (view.numbers >= 0), view.valid
    if scores.ndim > valid.ndim:
        is_visual, valid = (
            jnp.broadcast_to(mask[:, None], scores.shape) for mask in (is_visual, valid)
        )
    if view.num_visual == valid.shape[-1]:
        return keep_best(keep, is_visual, scores, limit=limit)
    keep = min(keep, view.num_visual)
    best = keep_best(
        keep, is_visual[..., : view.num_visual], scores[..., : view.num_visual], limit=limit
    )
    text = jnp.arange(view.num_visual, valid.shape[-1], dtype=jnp.int32)
    text = jnp.broadcast_to(text, (*best.indices.shape[:-1], text.shape[0]))
    return Keep(
        indices=jnp.concatenate([best.indices, text], axis=-1),
        valid=jnp.concatenate([best.valid, valid[..., view.num_visual :]], axis=-1),
    )


@pytree
class Scored(Pruner[tuple[()]]):
    """A method that scores each visual token, without a state, and keeps the `keep` highest; in a
    cache it may score them for each key-value head.

    A method of this kind has `sites`, `site` and `score`. `limit` leaves fewer to a sample, so that
    each may keep a share of its own tokens.
    """

    keep: int = static()
    limit: Int[Array, " b"] | None = None

    @abc.abstractmethod
    def score(self, view: View) -> Float[Array, "b n"] | Float[Array, "b kv n"]:
        """A number for every entry of the view; what stands at text is not read."""

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        return Reduction(tokens=keep_visual(view, self.keep, self.score(view), self.limit)), state
