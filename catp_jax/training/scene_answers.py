"""How a BLIP-2 answers questions about scenes in training, from what its Q-Former makes of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from catp_jax.contract import Keep
from catp_jax.models.blip2 import Blip2
from catp_jax.models.cache import Slots, causal_mask
from catp_jax.models.opt import Opt
from catp_jax.models.querying import QueryingFront
from catp_jax.training.blip2_data import Text
from catp_jax.training.scene_bank import Asking, Rows, SceneBatch
from catp_jax.training.scoring import is_answered

TEXT_LENGTH = 16  # the longest list with its answers, in tokens, also of a decoder


def rows_of(text: Text) -> Callable[[Asking, int], Rows]:
    """How questions become tokens."""

    def rows(asked: Asking, each: int) -> Rows:
        made = text.rows(asked, each, TEXT_LENGTH, TEXT_LENGTH)
        tokens, valid, targets, decoder = map(jnp.asarray, made)
        return Rows(
            tokens=tokens,
            token_valid=valid,
            targets=targets,
            decoder_tokens=None if text.start is None else decoder,
        )

    return rows


def answer_logits(
    model: Blip2, batch: SceneBatch, keep: Keep | None = None
) -> Float[Array, "i q rows vocab"]:
    """Logits of the rows that the targets speak of; each image's questions read what is left of its
    tokens (None: all).
    """
    if isinstance(model.language_model, Opt):
        return _in_one_row(model, model.language_model, batch, keep)
    rows, each = batch.rows, batch.rows.tokens.shape[1]

    def flat(array: Array) -> Array:
        return array.reshape(-1, array.shape[-1])

    def repeated(tree: Any) -> Any:
        return jax.tree.map(lambda array: jnp.repeat(array, each, axis=0), tree)

    front = QueryingFront(
        visual=repeated(batch.features),
        tokens=flat(rows.tokens),
        token_valid=flat(rows.token_valid),
        begun=None,
        view=None,
    )
    decoder = None if rows.decoder_tokens is None else flat(rows.decoder_tokens)
    logits = model.rows(front, repeated(keep), decoder)
    return logits.reshape(*rows.targets.shape, -1)


def _in_one_row(
    model: Blip2, language: Opt, batch: SceneBatch, keep: Keep | None
) -> Float[Array, "i q s vocab"]:
    """All questions about an image stand behind its tokens, each of which is read once. A question
    sees them and itself, and its positions are as if it stood alone.
    """
    visual, tokens, token_valid = batch.features, batch.rows.tokens, batch.rows.token_valid
    valid = jnp.ones(visual.shape[:2], bool)
    if keep is not None:
        visual, valid = keep.apply(visual), keep.valid
    images, each, length = tokens.shape
    text = language.embed(tokens.reshape(images, -1))
    x = jnp.concatenate([model.language_projection(visual).astype(text.dtype), text], axis=1)

    place = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    behind = place[:, -1, None, None] + jnp.cumsum(token_valid, axis=2, dtype=jnp.int32)
    slots = Slots(
        positions=jnp.maximum(jnp.concatenate([place, behind.reshape(images, -1)], axis=1) - 1, 0),
        valid=jnp.concatenate([valid, token_valid.reshape(images, -1)], axis=1),
    )
    asked = jnp.repeat(jnp.arange(each, dtype=jnp.int32), length)
    asked = jnp.concatenate([jnp.full(visual.shape[1], -1, jnp.int32), asked])
    is_seen = (asked[:, None] == asked[None]) | (asked == -1)[None]
    mask = causal_mask(slots, slots) & is_seen[None]
    x = language.placed(x, slots.positions)
    for layer in language.layers_at(slots.positions):
        x, _, _ = layer(x, mask=mask)
    return language.logits(x[:, visual.shape[1] :]).reshape(*tokens.shape, -1)


def answered(model: Blip2) -> Callable[[SceneBatch], Array]:
    """1 where greedy decoding would give exactly the answer."""
    graph, state = nnx.split(model)

    @jax.jit
    def is_right(state: Any, batch: SceneBatch) -> Array:
        return is_answered(answer_logits(nnx.merge(graph, state), batch), batch.rows.targets)

    return lambda batch: is_right(state, batch)
