"""Where the mini BLIP-2s' training starts: their sizes, their first weights."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from catp_jax.models.blip2 import Blip2, Blip2Config
from catp_jax.models.opt import Opt, OptConfig
from catp_jax.models.qformer import QFormerConfig
from catp_jax.models.t5 import T5Config
from catp_jax.models.vit import VitConfig

VOCABULARY = 384
POSITIONS = 512
QUERIES = 32
WORD = 0.1  # the size of OPT's word embeddings at the start


def mini_config(which: str) -> Blip2Config:
    """About 1.2 M parameters, of the kind "opt" or "t5"."""
    texts = {
        "opt": OptConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            ffn_dim=192,
            max_position_embeddings=POSITIONS,
            activation_function="relu",
            tie_word_embeddings=True,
        ),
        "t5": T5Config(
            vocab_size=VOCABULARY,
            d_model=96,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=6,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            layer_norm_epsilon=1e-6,
            dense_act_fn="gelu",
            tie_word_embeddings=False,
            scale_decoder_outputs=False,
            decoder_start_token_id=0,
        ),
    }
    if which not in texts:
        raise ValueError(f"a mini BLIP-2 is of the kind {' or '.join(texts)}, not {which!r}")
    return Blip2Config(
        vision=VitConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            qkv_bias=True,
        ),
        qformer=QFormerConfig(
            vocab_size=30522,
            hidden_size=64,
            num_hidden_layers=12,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_act="gelu",
            max_position_embeddings=POSITIONS,
            layer_norm_eps=1e-12,
            cross_attention_frequency=2,
            encoder_hidden_size=96,
            use_qformer_text_input=False,
        ),
        text=texts[which],
        num_query_tokens=QUERIES,
        image_token_index=VOCABULARY - 1,
    )


def initialise(config: Blip2Config, seed: int) -> Blip2:
    """A model drawn anew: kernels by their fan-in, and branches small beside what they add to.

    Every array draws from a key of its own, so that what both kinds have is the same in both.
    """
    model = Blip2(config, rngs=nnx.Rngs(seed))
    root, text = jax.random.key(seed), config.text
    if isinstance(text, OptConfig):
        depth, word = text.num_hidden_layers, WORD
    else:
        depth, word = text.num_layers + text.num_decoder_layers, 1.0
    branches = {  # where a branch ends, and how much smaller it starts
        "qformer": (("output",), (2 * config.qformer.num_hidden_layers) ** -0.5),
        "language_model": (("out_proj", "fc2", "['o']", "wo"), word * (2 * depth) ** -0.5),
    }

    def draw(path: tuple, x: Array) -> Array:
        name = jax.tree_util.keystr(path)
        noise = jax.random.normal(jax.random.fold_in(root, zlib.crc32(name.encode())), x.shape)
        if "query_tokens" in name:
            return noise
        if "embed_tokens" in name or "shared" in name:
            return word * noise
        if "kernel" not in name:
            return 0.02 * noise if "embedding" in name and "bias'" not in name else x
        scale = x.shape[0] ** -0.5
        for part, (ends, small) in branches.items():
            if part in name and any(end in name for end in ends):
                scale *= small
        if isinstance(text, T5Config) and ("['q']" in name or "['k']" in name):
            scale *= text.d_kv**-0.25  # T5 does not divide logits by √d_kv
        return noise * scale

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map_with_path(draw, state))


def say_what_is_seen(
    model: Blip2,
    reading: Float[Array, "d w"],
    words: list[int],
    places: Float[Array, "d p"] | None = None,
) -> None:
    """Starts the language model where a query looks like the words for what it has seen.

    The projection maps what the heads of the stage before read, a column of `reading` for each of
    the `words`, to the words' embeddings, what else is read (`places`) to embeddings of no word,
    and in self-attention keys start as queries: from the outset a row that says "red" attends to
    queries that have seen red. The projection's bias starts as a word of its own, which says
    "query": how much of it a row gets tells how well its word fits the image. Without this, yes/no
    questions are answered unseen for very long.
    """
    language, projection = model.language_model, model.language_projection
    if isinstance(language, Opt):
        embeddings = language.model.decoder.embed_tokens.embedding[...]
        for layer in language.model.decoder.layers:
            layer.self_attn.k_proj.kernel[...] = layer.self_attn.q_proj.kernel[...]
    else:
        embeddings = language.shared.embedding[...]
        for block in language.encoder.block:
            attention = block.layer[0].SelfAttention
            attention.k.kernel[...] = attention.q.kernel[...]
    said = embeddings[jnp.array(words)]
    if places is not None:
        nameless = jax.random.normal(jax.random.key(0), (places.shape[1], embeddings.shape[1]))
        said = jnp.concatenate([said, embeddings.std() * nameless])
        reading = jnp.concatenate([reading, places], axis=1)
    seen = reading @ said
    projection.kernel[...] = seen / 8 + 0.1 * embeddings.std() * projection.kernel[...]
    projection.bias = nnx.Param(  # its type allows None, so that it cannot be written into
        embeddings.std() * jax.random.normal(jax.random.key(len(words)), embeddings.shape[1:]),
        axes=("embed",),
    )
