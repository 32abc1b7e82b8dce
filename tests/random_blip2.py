"""Tiny random BLIP-2 models, with OPT and with T5, and a batch of prompts of different lengths.

Sizes differ from each other (7 queries, 3 heads in the Q-Former, 4 in the language model, 10 image
tokens), so that a mixed-up axis cannot pass, and every parameter is drawn, so that no branch idles.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import convert
from catp_jax.models.blip2 import Blip2, Blip2Config, Blip2Inputs
from catp_jax.models.opt import OptConfig
from catp_jax.models.qformer import QFormerConfig
from catp_jax.models.t5 import T5Config
from catp_jax.models.vit import VitConfig
from catp_jax.readers.blip2_packing import pack
from catp_jax.readers.packing import Packed

QUERIES = 7
VISION = VitConfig(
    hidden_size=12,
    intermediate_size=18,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    qkv_bias=True,
)
QFORMER = QFormerConfig(
    vocab_size=40,
    hidden_size=15,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=20,
    hidden_act="gelu",
    max_position_embeddings=20,
    layer_norm_eps=1e-12,
    cross_attention_frequency=2,
    encoder_hidden_size=VISION.hidden_size,
    use_qformer_text_input=False,
)
CROSS_LAYERS = 2  # of the Q-Former: layers 0 and 2
OPT = OptConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=24,
    max_position_embeddings=120,
    activation_function="relu",
    tie_word_embeddings=False,  # else a random model says its last token again
)
T5 = T5Config(
    vocab_size=50,
    d_model=16,
    d_kv=6,
    d_ff=22,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=9,
    layer_norm_epsilon=1e-6,
    dense_act_fn="gelu_new",
    tie_word_embeddings=False,
    scale_decoder_outputs=False,
    decoder_start_token_id=0,
)
Kind = Literal["opt", "t5"]
KINDS: tuple[Kind, ...] = ("opt", "t5")
CONFIGS = {
    "opt": Blip2Config(VISION, QFORMER, OPT, QUERIES, 49),
    "t5": Blip2Config(VISION, QFORMER, T5, QUERIES, 49),
}
NEVER = jnp.asarray([60], jnp.int32)  # an end token that the head cannot produce
PAD = jnp.asarray(1, jnp.int32)


@functools.cache
def random_blip2(kind: Kind) -> Blip2:
    """The model, the same in every test."""
    rng = np.random.default_rng(2)

    def draw(path: tuple, old: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            new = rng.uniform(0.5, 1.8, old.shape)
        elif "kernel" in name:
            new = rng.normal(size=old.shape) * 1.5 / np.sqrt(old.shape[0])
        elif "bias" in name:
            new = rng.normal(size=old.shape) * 0.2
        else:
            new = rng.normal(size=old.shape) * 0.6
        return jnp.asarray(new, old.dtype)

    shapes = convert.abstract(CONFIGS[kind])  # not below, where its draws would be computed
    with jax.ensure_compile_time_eval():  # a first call may come while something is traced
        return jax.tree_util.tree_map_with_path(draw, shapes)


def photo(seed: int) -> np.ndarray:
    """A random image as the processor leaves it."""
    size = (3, VISION.image_size, VISION.image_size)
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


# The first two look at the same image.
PHOTOS = (photo(1), photo(2), photo(3))
PROMPTS = ((5, 6, 7, 8, 9), (11,), (2, 3, 4, 2, 3, 4, 9, 9, 20, 21), (30, 31))
IMAGES = (PHOTOS[0], PHOTOS[0], PHOTOS[1], PHOTOS[2])


def packed(rows: Sequence[int] = range(4), kind: Kind = "opt") -> Packed[Blip2Inputs]:
    """These prompts of the batch, in this order."""
    return pack([PROMPTS[row] for row in rows], [IMAGES[row] for row in rows], CONFIGS[kind])
