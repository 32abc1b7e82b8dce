"""How a BLIP-2 answers questions about scenes in training, from what its Q-Former makes of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from catp_jax.contract import Keep, Site, View, run_pruners
from catp_jax.models.blip2 import Blip2
from catp_jax.models.cache import causal_mask
from catp_jax.models.opt import Opt
from catp_jax.models.querying import QueryingFront
from catp_jax.struct import replace
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
    return told(model, batch, keep)[0]


def told(
    model: Blip2, batch: SceneBatch, keep: Keep | None = None
) -> tuple[Float[Array, "i q rows vocab"], list[Float[Array, "i q s d"]]]:
    """The same, and what each layer makes of the words, as the norm behind the last one has it."""
    if isinstance(model.language_model, Opt):
        return _in_one_row(model, model.language_model, batch, keep)
    language: Any = model.language_model
    rows, shape = batch.rows, batch.rows.tokens.shape

    def repeated(tree: Any) -> Any:
        return jax.tree.map(lambda array: jnp.repeat(array, shape[1], axis=0), tree)

    front = QueryingFront(
        visual=repeated(batch.features),
        tokens=rows.tokens.reshape(-1, shape[-1]),
        token_valid=rows.token_valid.reshape(-1, shape[-1]),
        begun=None,
        view=None,
    )
    x, slots, _ = model.sequence(front, repeated(keep))
    norm = language.encoder.final_layer_norm
    states = [norm(state) for state in language.encoder_states(x, slots)]
    decoder: Any = rows.decoder_tokens
    logits = language.decode(states[-1], slots, decoder.reshape(-1, decoder.shape[-1]))
    words = [state[:, -shape[-1] :].reshape(*shape, -1) for state in states]
    return logits.reshape(*rows.targets.shape, -1), words


def _in_one_row(
    model: Blip2, language: Opt, batch: SceneBatch, keep: Keep | None
) -> tuple[Float[Array, "i q s vocab"], list[Float[Array, "i q s d"]]]:
    """All questions about an image stand behind its tokens, each of which is read once. A question
    sees them and itself, and its positions are as if it stood alone.
    """
    tokens, token_valid = batch.rows.tokens, batch.rows.token_valid
    images, each, length = tokens.shape
    front = QueryingFront(
        visual=batch.features,
        tokens=tokens.reshape(images, -1),
        token_valid=token_valid.reshape(images, -1),
        begun=None,
        view=None,
    )
    x, slots, _ = model.sequence(front, keep)
    num_visual = x.shape[1] - each * length

    words = token_valid.sum(axis=2, dtype=jnp.int32)
    before = jnp.repeat(jnp.cumsum(words, axis=1) - words, length, axis=1)  # in other questions
    before = jnp.pad(before, ((0, 0), (num_visual, 0)))
    slots = replace(slots, positions=jnp.maximum(slots.positions - before, 0))
    asked = jnp.repeat(jnp.arange(each, dtype=jnp.int32), length)
    asked = jnp.concatenate([jnp.full(num_visual, -1, jnp.int32), asked])
    is_seen = (asked[:, None] == asked[None]) | (asked == -1)[None]
    mask = causal_mask(slots, slots) & is_seen[None]
    x, states = language.placed(x, slots.positions), []
    for layer in language.layers_at(slots.positions):
        x, _, _ = layer(x, mask=mask)
        states.append(language.model.decoder.final_layer_norm(x[:, num_visual:]))
    logits = language.logits(x[:, num_visual:]).reshape(*tokens.shape, -1)
    return logits, [state.reshape(*tokens.shape, -1) for state in states]


def shown(features: Float[Array, "i n d"]) -> View:
    """What a model shows of some images at its entry, evidence aside."""
    images, tokens, _ = features.shape
    numbers = jnp.arange(tokens, dtype=jnp.int32)
    return View(
        site=Site.ENTRY,
        layer=0,
        num_visual=tokens,
        tokens=features,
        numbers=jnp.broadcast_to(numbers, (images, tokens)),
        valid=jnp.ones((images, tokens), bool),
        sees=jnp.ones((images, 1, tokens), bool),
    )


def left_by(method: Any, view: View) -> Any:
    """What a method for the entry that needs no evidence leaves of the tokens shown."""
    return run_pruners((method,), view)[0].tokens


def answered(model: Blip2, method: Any = None) -> Callable[[SceneBatch], Float[Array, "i q"]]:
    """1 where greedy decoding would give exactly the answer, of what a method leaves, see
    `left_by` (None: of all tokens).
    """
    graph, state = nnx.split(model)
    return lambda batch: _is_right(graph, state, method, batch)


@functools.partial(jax.jit, static_argnums=0)
def _is_right(graph: nnx.GraphDef, state: Any, method: Any, batch: SceneBatch) -> Array:
    keep = None if method is None else left_by(method, shown(batch.features))
    return is_answered(answer_logits(nnx.merge(graph, state), batch, keep), batch.rows.targets)
