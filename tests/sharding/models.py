"""Tiny random models whose axes divide by 8, and fewer KV heads than that."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

import convert
from catp_jax.models.blip2 import Blip2Config
from catp_jax.models.frozen import freeze
from catp_jax.models.instructblip import InstructBlipConfig
from catp_jax.models.layers import RopeConfig
from catp_jax.models.llama import LlamaConfig
from catp_jax.models.mllama import MllamaConfig
from catp_jax.readers.blip2_packing import pack as pack_blip2
from catp_jax.readers.blip2_packing import pack_instructions
from catp_jax.readers.mllama_packing import pack as pack_mllama
from catp_jax.sharding.place import Sharded, place, sharded
from tests import random_blip2 as blip2
from tests import random_mllama as mllama

VIT = dataclasses.replace(blip2.VISION, hidden_size=24, intermediate_size=40, num_attention_heads=8)
QFORMER = dataclasses.replace(
    blip2.QFORMER, num_hidden_layers=2, hidden_size=24, encoder_hidden_size=24
)  # 3 heads
OPT = dataclasses.replace(
    blip2.OPT,
    num_hidden_layers=2,
    vocab_size=72,
    hidden_size=32,
    num_attention_heads=8,
    ffn_dim=48,
)
T5 = dataclasses.replace(
    blip2.T5,
    num_layers=1,
    num_decoder_layers=2,
    vocab_size=72,
    d_model=32,
    num_heads=8,
    d_kv=6,
    d_ff=40,
)
LLAMA = LlamaConfig(
    vocab_size=72,
    hidden_size=32,
    hidden_act="silu",
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=48,
    rope=RopeConfig(50.0, None),
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
READING = dataclasses.replace(QFORMER, use_qformer_text_input=True)
MLLAMA = MllamaConfig(
    vision=dataclasses.replace(
        mllama.VISION, hidden_size=24, attention_heads=8, intermediate_size=40
    ),
    text=dataclasses.replace(
        mllama.TEXT,
        num_hidden_layers=3,
        cross_attention_layers=(0, 2),
        vocab_size=80,  # and 88 rows in the embedding
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=48,
    ),
    image_token_index=80,
)
CONFIGS: dict[str, Any] = {
    "mllama": MLLAMA,
    "opt": Blip2Config(VIT, QFORMER, OPT, blip2.QUERIES, 71),
    "t5": Blip2Config(VIT, QFORMER, T5, blip2.QUERIES, 71),
    "vicuna": InstructBlipConfig(VIT, READING, LLAMA, blip2.QUERIES, 71),
}


@functools.cache
def model(kind: str) -> Any:
    """The model, every parameter drawn."""
    return mllama.randomized(convert.abstract(CONFIGS[kind]), seed=3)


def inputs(kind: str, answers: Sequence[Sequence[int]] = ((),) * 8) -> Any:
    """Eight prompts of different lengths about eight images, or some; answers stand behind them."""
    if kind != "mllama":
        photos = [blip2.photo(seed) for seed in range(8)]
        asked = [tuple(range(3, 5 + seed)) for seed in range(8)]
        prompts = [(*one, *answer) for one, answer in zip(asked, answers, strict=True)]
        if kind == "vicuna":
            instructions = [prompt[1:] for prompt in asked]
            return pack_instructions(prompts, instructions, photos, CONFIGS[kind]).inputs
        return pack_blip2(prompts, photos, CONFIGS[kind]).inputs
    rows = [0, 1, 2, 4, 0, 1, 2, 4]  # two without an image
    swap = {mllama.IMAGE: MLLAMA.image_token_index}
    prompts = [
        (*(swap.get(token, token) for token in mllama.PROMPTS[row]), *answer)
        for row, answer in zip(rows, answers, strict=True)
    ]
    return pack_mllama(prompts, [mllama.PICTURES[row] for row in rows], MLLAMA).inputs


def on_mesh(kind: str, mesh: Mesh) -> Sharded:
    """The model with its parameters where the rules want them."""
    network = model(kind)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network)
    shardings = jax.tree.map(lambda struct: struct.sharding, place(abstract, mesh))
    # from the host: what is on a device already is split by programs, one for each shape
    return sharded(freeze(jax.device_put(jax.device_get(network), shardings)))
