"""Tiny random InstructBLIP models, in transformers and converted to ours, and inputs for both.

As `tiny_blip2`, whose sizes they have; each prompt is there twice, in the language model's tokens
and in other ones, of another number, for the Q-Former.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import InstructBlipConfig as HfConfig
from transformers import InstructBlipForConditionalGeneration

from catp_jax.models.instructblip import InstructBlipInputs
from convert import load_hf
from tests.parity import tiny_blip2
from tests.parity.tiny import randomize
from tests.parity.tiny_blip2 import QFORMER, QUERIES, T5, VISION, Side

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "vicuna": {"text_config": LLAMA, "image_token_index": 49},
    "vicuna grouped": {
        "qformer_config": QFORMER | {"cross_attention_frequency": 1, "layer_norm_eps": 1e-3},
        "text_config": LLAMA | {"num_key_value_heads": 2, "rms_norm_eps": 1e-3},
        "image_token_index": 48,
    },
    "t5": {"text_config": T5, "image_token_index": 49},
    "t5 untied": {
        "qformer_config": QFORMER | {"cross_attention_frequency": 3},
        "text_config": T5 | {"tie_word_embeddings": False, "dense_act_fn": "gelu"},
        "image_token_index": 47,
    },
}
VICUNAS = tuple(name for name in CONFIGS if name.startswith("vicuna"))
T5S = tuple(name for name in CONFIGS if name.startswith("t5"))


def tiny_hf_config(name: str) -> HfConfig:
    """transformers' configuration of one of the tiny models."""
    parts = {"vision_config": VISION, "qformer_config": QFORMER, **CONFIGS[name]}
    parts = {key: dict(part) if isinstance(part, dict) else part for key, part in parts.items()}
    return HfConfig(num_query_tokens=QUERIES, attn_implementation="eager", **parts)


@functools.cache
def tiny_hf(name: str) -> Any:
    """A random model in transformers."""
    hf = InstructBlipForConditionalGeneration(tiny_hf_config(name)).eval()
    if name == "t5 untied":  # transformers ties every T5 that it makes, whatever its config says
        head = hf.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    randomize(hf, seed=sorted(CONFIGS).index(name))
    for key, parameter in hf.named_parameters():
        if key.endswith("Attention.q.weight"):  # of T5, whose logits nothing else scales
            parameter.data /= T5["d_kv"] ** 0.5
    return hf


@functools.cache
def tiny(name: str) -> tuple[Any, Any, Any]:
    """A random model in transformers, the same one saved by it and read by our converter."""
    hf = tiny_hf(name)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        ours, _ = load_hf(Path(folder))
    return hf, ours, ours.config


@dataclasses.dataclass(frozen=True)
class Prompts(tiny_blip2.Prompts):
    """Random images and prompts; `instructed` are their lengths in the Q-Former's tokens."""

    instructed: tuple[int, ...] = (4, 8, 5)

    def instruction(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens for the Q-Former, padded on the right, and which are none of the padding."""
        longest = max(self.instructed)
        rng = np.random.default_rng(self.seed + 2)
        tokens = rng.integers(1, 45, (len(self.instructed), longest)).astype(np.int32)
        valid = np.arange(longest)[None] < np.asarray(self.instructed)[:, None]
        return np.where(valid, tokens, 0), valid

    def hf(self, side: Side) -> dict[str, torch.Tensor]:
        """For transformers."""
        tokens, valid = self.instruction()
        return super().hf(side) | {
            "qformer_input_ids": torch.from_numpy(tokens.astype(np.int64)),
            "qformer_attention_mask": torch.from_numpy(valid.astype(np.int64)),
        }

    def ours(self, side: Side) -> InstructBlipInputs:
        """For our model."""
        inputs, (tokens, valid) = super().ours(side), self.instruction()
        return InstructBlipInputs(
            pixels=inputs.pixels,
            image_index=inputs.image_index,
            tokens=inputs.tokens,
            token_valid=inputs.token_valid,
            instruction=jnp.asarray(tokens),
            instruction_valid=jnp.asarray(valid),
        )
