"""What a generation's arrays and products amount to, from shapes alone: nothing is compiled."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
from catp_jax import checkpoint
from catp_jax.models.blip2 import Blip2Config, Blip2Inputs
from catp_jax.models.blocks import Block
from catp_jax.models.instructblip import InstructBlipConfig, InstructBlipInputs
from catp_jax.models.mllama import Images, Inputs, MllamaConfig
from catp_jax.models.querying import QueryingConfig, QueryingInputs
from convert.families import family_of
from convert.reader import cast, with_dtypes

PRESETS: Mapping[str, Callable[[], Any]] = {
    "Llama-3.2-11B-Vision": MllamaConfig.llama_3_2_11b,
    "Llama-3.2-90B-Vision": MllamaConfig.llama_3_2_90b,
    "blip2-opt-2.7b": Blip2Config.opt_2_7b,
    "blip2-opt-6.7b": Blip2Config.opt_6_7b,
    "blip2-flan-t5-xl": Blip2Config.flan_t5_xl,
    "blip2-flan-t5-xxl": Blip2Config.flan_t5_xxl,
    "instructblip-vicuna-7b": InstructBlipConfig.vicuna_7b,
    "instructblip-vicuna-13b": InstructBlipConfig.vicuna_13b,
    "instructblip-flan-t5-xl": InstructBlipConfig.flan_t5_xl,
    "instructblip-flan-t5-xxl": InstructBlipConfig.flan_t5_xxl,
}
"""Configurations by the names of the published checkpoints."""


def find_config(model: str | Path, ignore_config: Sequence[str] = ()) -> Any:
    """A configuration by its checkpoint's name, or a folder's, whose config.json is read without
    the keys `ignore_config`. Raises ValueError for others.
    """
    if str(model) in PRESETS:
        return PRESETS[str(model)]()
    if not Path(model).is_dir():
        raise ValueError(f"{model} is no folder and none of {', '.join(PRESETS)}")
    return convert.read_config(Path(model), ignore_config)


def abstract_model(config: Any, dtype: Any) -> Any:
    """The abstract model in the number types that a load at `dtype` gives."""
    model, family = convert.abstract(config), family_of(config)
    names = checkpoint.names(model)
    return with_dtypes(model, {name: cast(family, name, np.dtype(dtype)) for name in names})


def inputs_of(config: Any, batch: int, tiles: int | None, prompt: int) -> tuple[Any, int]:
    """Abstract inputs of prompts with an image each, and the visual tokens of one."""
    if isinstance(config, MllamaConfig):
        most = config.vision.max_num_tiles
        tiles = most if tiles is None else tiles
        if not 1 <= tiles <= most:
            raise ValueError(f"an image has 1 to {most} tiles, got {tiles}")
        make = partial(_mllama_inputs, config, batch, tiles, prompt)
        return jax.eval_shape(make), tiles * config.vision.tokens_per_tile
    if tiles is not None:
        raise ValueError("only images of Llama Vision have tiles")
    if not isinstance(config, QueryingConfig):
        raise ValueError("this model matches images and texts; a model that writes text is wanted")
    make = partial(_querying_inputs, config, batch, prompt)
    return jax.eval_shape(make), config.num_query_tokens


def _mllama_inputs(config: MllamaConfig, batch: int, tiles: int, prompt: int) -> Inputs:
    most, side = config.vision.max_num_tiles, config.vision.image_size
    return Inputs(
        tokens=jnp.zeros((batch, prompt), jnp.int32),
        token_valid=jnp.ones((batch, prompt), bool),
        images=Images(
            pixels=jnp.zeros((batch, most, 3, side, side), jnp.float32),
            aspect_ratio_ids=jnp.zeros((batch,), jnp.int32),
            aspect_ratio_mask=jnp.ones((batch, most), bool),
            tile_index=jnp.zeros((batch, tiles), jnp.int32),
            tile_valid=jnp.ones((batch, tiles), bool),
            tile_seen=jnp.ones((batch, prompt, tiles), bool),
        ),
    )


def _querying_inputs(config: QueryingConfig, batch: int, prompt: int) -> QueryingInputs:
    side = config.vision.image_size
    tokens, valid = jnp.zeros((batch, prompt), jnp.int32), jnp.ones((batch, prompt), bool)
    both: dict[str, Any] = {
        "pixels": jnp.zeros((batch, 3, side, side), jnp.float32),
        "image_index": jnp.zeros((batch,), jnp.int32),
        "tokens": tokens,
        "token_valid": valid,
    }
    if isinstance(config, InstructBlipConfig):
        return InstructBlipInputs(**both, instruction=tokens, instruction_valid=valid)
    return Blip2Inputs(**both)


def shard_bytes(tree: Any) -> int:
    """Bytes of placed arrays that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def caches(state: Any) -> tuple[list[Block], list[Block]]:
    """The blocks of self- and of cross-attention in a model's cache."""
    own: list[Block] = []
    cross: list[Block] = []
    leaves = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, Block)
    )
    for path, leaf in leaves:
        if isinstance(leaf, Block):
            is_cross = jax.tree_util.keystr(path[:1], simple=True) == "cross"
            (cross if is_cross else own).append(leaf)
    return own, cross
