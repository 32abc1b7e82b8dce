"""How a Llama Vision answers in training: many questions an image, all at once."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import convert
from catp_jax.contract import Keep, Room, Site, keep_at
from catp_jax.models.cache import Slots
from catp_jax.models.cross_decoder import Visual
from catp_jax.models.mllama import Mllama
from catp_jax.training.tokenizer import BOS, EOS, EOT, PAD, write_processor


def answer_logits(
    model: Mllama,
    visual: Visual,
    tokens: Int[Array, "i q s"],
    token_valid: Bool[Array, "i q s"],
    is_first_open: Bool[Array, " q"] | None = None,
    kept: Int[Array, "i q k"] | None = None,
) -> Float[Array, "i q s vocab"]:
    """Logits of every row of every question about the images that `visual` shows.

    `kept` are the visual tokens that each question's later layers see (None: all). Where
    `is_first_open` is False, the first cross-attention layer is skipped.
    """
    graph, state = nnx.split(model)
    first = model.language_model.first_cross

    def one(tokens: Array, valid: Array, is_open: Array | None, kept: Array | None) -> Array:
        model = nnx.merge(graph, state)
        if is_open is not None:
            layer = model.language_model.layers[first]
            for name in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
                value = getattr(layer, name)[...]
                setattr(layer, name, nnx.Param(value * is_open.astype(value.dtype)[None]))
        keep = None if kept is None else Keep(indices=kept, valid=jnp.ones_like(kept, bool))
        numbers = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        text = Slots(positions=jnp.broadcast_to(numbers, tokens.shape), valid=valid)
        front = model.language_model.front(tokens, text, visual, "meta")
        hidden, _ = model.language_model.back(front, keep_at(Site.CROSS, keep), Room(new=0))
        return model.lm_head(hidden)

    axes = (1, 1, None if is_first_open is None else 0, None if kept is None else 1)
    return jax.vmap(one, in_axes=axes, out_axes=1)(tokens, token_valid, is_first_open, kept)


def say_what_is_seen(
    model: Mllama,
    reading: Float[Array, "out w"],
    words: list[int],
    places: Float[Array, "out p"] | None = None,
) -> None:
    """Starts the decoder where a visual token looks like the words for what it shows.

    The projector maps what the tower's heads read (`reading`, a column for each of the `words`) to
    the words' embeddings, what other heads read (`places`) to embeddings of no word, and in
    cross-attention keys start as their group's first queries: from the outset a row that says "red"
    attends to what is red. Without this, yes/no questions are answered unseen for very long.
    """
    embeddings = model.language_model.embed_tokens.embedding[...][jnp.array(words)]
    if places is not None:
        nameless = jax.random.normal(jax.random.key(0), (places.shape[1], embeddings.shape[1]))
        embeddings = jnp.concatenate([embeddings, embeddings.std() * nameless])
        reading = jnp.concatenate([reading, places], axis=1)
    projector = model.multi_modal_projector.kernel
    projector[...] = reading @ embeddings / 16 + 0.1 * projector[...]  # readings reach about 16
    config = model.config.text
    group = config.num_attention_heads // config.num_key_value_heads
    for index in config.cross_attention_layers:
        attention = model.language_model.layers[index].cross_attn
        queries = attention.q_proj.kernel[...].reshape(config.hidden_size, -1, config.head_dim)
        attention.k_proj.kernel[...] = queries[:, ::group].reshape(config.hidden_size, -1)


def write(model: Mllama, processor: Any, out: Path, dtype: str | None = None) -> None:
    """Writes the new folder `out` in Hugging Face format, with all that goes beside the weights.

    These are stored as `dtype` (None: as they are); whatever it is, they are read as what they are.
    """
    bos, eos, eot, pad = processor.tokenizer.convert_tokens_to_ids([BOS, EOS, EOT, PAD])
    ends = {"bos_token_id": bos, "eos_token_id": [eos, eot], "pad_token_id": pad}
    with tempfile.TemporaryDirectory() as beside:
        write_processor(processor, Path(beside))
        text = json.dumps(ends | {"do_sample": False}, indent=2)
        (Path(beside) / "generation_config.json").write_text(text + "\n")
        config = convert.config_json(model.config, **ends)
        convert.write_hf(model, config, out, side_files=beside, dtype=dtype)
