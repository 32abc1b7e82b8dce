"""A tiny random Llama 3.2 Vision, and a batch with every kind of prompt in it.

Sizes differ from each other (6 query heads, 3 KV heads, 4 channels, 10 tokens a tile, 5 prompts),
so that a mixed-up axis cannot pass, and every gate and norm is set, so that no branch is idle.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import convert
from catp_jax.models.cross_decoder import CrossDecoderConfig, MaskMode
from catp_jax.models.layers import Llama3Scaling, RopeConfig
from catp_jax.models.mllama import Mllama, MllamaConfig
from catp_jax.models.tiled_vit import TiledVitConfig
from catp_jax.readers.mllama_packing import MllamaPacked, ProcessedImage, pack

VISION = TiledVitConfig(
    hidden_size=16,
    hidden_act="gelu",
    num_hidden_layers=1,
    num_global_layers=1,
    attention_heads=2,
    num_channels=3,
    intermediate_size=24,
    image_size=12,
    patch_size=4,
    norm_eps=1e-5,
    max_num_tiles=4,
    intermediate_layers_indices=(0,),
    supported_aspect_ratios=TiledVitConfig.llama_3_2().supported_aspect_ratios,
    vision_mode="meta",
)
TEXT = CrossDecoderConfig(
    vocab_size=50,
    hidden_size=24,
    hidden_act="silu",
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=32,
    rope=RopeConfig(10000.0, Llama3Scaling(8.0, 1.0, 4.0, 16)),
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    cross_attention_layers=(0, 2),
)
CONFIG = MllamaConfig(vision=VISION, text=TEXT, image_token_index=50)
PER_TILE = VISION.tokens_per_tile
IMAGE = CONFIG.image_token_index
NEVER = jnp.asarray([IMAGE], jnp.int32)  # an end token that the head cannot produce
PAD = jnp.asarray(0, jnp.int32)

RATIO_IDS = {1: 1, 2: 2, 3: 3, 4: 6}  # an aspect ratio of so many tiles; 4 as 2×2


@functools.cache
def random_mllama() -> Mllama:
    """The model, the same in every test."""
    shapes = convert.abstract(CONFIG)  # not below, where its draws would be computed
    with jax.ensure_compile_time_eval():  # a first call may come while something is traced
        return randomized(shapes, seed=1)


def randomized(model: Mllama, seed: int) -> Mllama:
    """`model`, which may be abstract, with all parameters drawn anew, none of them at rest."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, old: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "gate" in name and old.shape == (1,):
            new = rng.choice([-1, 1]) * rng.uniform(0.4, 0.9, old.shape)
        elif "scale" in name:
            new = rng.uniform(0.5, 1.8, old.shape)
        elif "kernel" in name:
            new = rng.normal(size=old.shape) * 1.2 / np.sqrt(old.shape[0])
        else:
            new = rng.normal(size=old.shape) * 0.6
        return jnp.asarray(new, old.dtype)

    return jax.tree_util.tree_map_with_path(draw, model)


def picture(tiles: int, seed: int) -> ProcessedImage:
    """An image of so many tiles, zeros in the padding tiles, as the processor leaves it."""
    size = (VISION.max_num_tiles, VISION.num_channels, VISION.image_size, VISION.image_size)
    pixels = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    pixels[tiles:] = 0
    return ProcessedImage(pixels, RATIO_IDS[tiles], tiles)


PROMPTS = (
    (1, 2, IMAGE, 3, 4, 5),  # text before the image
    (IMAGE, 3, 7),
    (1, 2, 3, 8),  # no image
    (IMAGE, IMAGE, 4, IMAGE, 9, 8, 7),  # three images, two of them in one span
    (11, IMAGE, 6, 5, 4, 3, 2, 9, 8),
)
PICTURES = (
    (picture(1, 10),),
    (picture(4, 11),),
    (),
    (picture(2, 12), picture(1, 13), picture(4, 14)),
    (picture(2, 15),),
)
AVAILABLE = (PER_TILE, 4 * PER_TILE, 0, 7 * PER_TILE, 2 * PER_TILE)
ROOM = 8 * PER_TILE  # visual tokens per prompt in the packed batch


def packed(rows: Sequence[int] = range(5), mode: MaskMode = "meta") -> MllamaPacked:
    """These prompts of the mixed batch, in this order."""
    return pack([PROMPTS[row] for row in rows], [PICTURES[row] for row in rows], CONFIG, mode)
