"""Tiny random BLIP-2 models, in transformers and converted to ours, and inputs for both.

    hf, ours, config = tiny("opt")
    prompts = Prompts(config, seed=0)
    logits = hf(**prompts.hf("left")).logits
    logits = ours(prompts.ours("left"))

Sizes differ from one another, so that a mixed-up axis cannot pass, and every parameter is drawn
anew: as transformers initialises them, query tokens and biases would be zero, norms one, and the
vision model next to nothing. Attention is the eager kind, which hands out its weights.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import torch
from transformers import Blip2Config as HfConfig
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from catp_jax.models.blip2 import Blip2Inputs
from convert import load_hf
from tests.parity.tiny import randomize

IMAGES, QUERIES = 3, 7
VISION: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}
QFORMER: dict[str, Any] = {
    "vocab_size": 45,
    "hidden_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "intermediate_size": 28,
    "max_position_embeddings": 26,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 36,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 24,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 34,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    # so few and so near that short sequences have tokens in all of them
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"text_config": OPT, "image_token_index": 49},
    # Cross-attention in every layer, no biases of queries, keys and values, another activation.
    "opt untied": {
        "vision_config": VISION | {"qkv_bias": False, "hidden_act": "quick_gelu"},
        "qformer_config": QFORMER | {"cross_attention_frequency": 1, "layer_norm_eps": 1e-3},
        "text_config": OPT | {"tie_word_embeddings": False, "activation_function": "gelu"},
        "image_token_index": 48,
    },
    "t5": {
        "qformer_config": QFORMER | {"cross_attention_frequency": 3, "hidden_act": "gelu_new"},
        "text_config": T5,
        "image_token_index": 49,
    },
    # As Flan-T5: a head of its own, and an input to it that is not scaled.
    "t5 untied": {
        "text_config": T5 | {"tie_word_embeddings": False, "dense_act_fn": "gelu", "num_heads": 2},
        "image_token_index": 47,
    },
    "retrieval": {
        "qformer_config": QFORMER | {"use_qformer_text_input": True},
        "image_text_hidden_size": 10,
    },
    "retrieval marked": {
        "qformer_config": QFORMER
        | {"use_qformer_text_input": True, "cross_attention_frequency": 3},
        "image_text_hidden_size": 18,
        "image_token_index": 44,
    },
}
GENERATING = tuple(name for name in CONFIGS if not name.startswith("retrieval"))
RETRIEVING = tuple(name for name in CONFIGS if name.startswith("retrieval"))


def tiny_hf_config(name: str) -> HfConfig:
    """transformers' configuration of one of the tiny models."""
    parts = {"vision_config": VISION, "qformer_config": QFORMER, **CONFIGS[name]}
    parts = {key: dict(part) if isinstance(part, dict) else part for key, part in parts.items()}
    return HfConfig(num_query_tokens=QUERIES, attn_implementation="eager", **parts)


@functools.cache
def tiny_hf(name: str) -> Any:
    """A random model in transformers."""
    kind = Blip2ForImageTextRetrieval if name in RETRIEVING else Blip2ForConditionalGeneration
    hf = kind(tiny_hf_config(name)).eval()
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


Side = Literal["left", "right"]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Random images and prompts of different lengths; each prompt has an image of its own."""

    config: Any
    seed: int
    lengths: tuple[int, ...] = (6, 2, 9)

    def pixels(self) -> np.ndarray:
        """[image, 3, size, size]."""
        side = self.config.vision.image_size
        shape = (len(self.lengths), 3, side, side)
        return np.random.default_rng(self.seed).normal(size=shape).astype(np.float32)

    def tokens(self, side: Side) -> tuple[np.ndarray, np.ndarray]:
        """Padded tokens, and which are none of the padding. Placeholders do not occur."""
        longest = max(self.lengths)
        rng = np.random.default_rng(self.seed + 1)
        tokens = rng.integers(2, 40, (len(self.lengths), longest)).astype(np.int32)
        number, lengths = np.arange(longest)[None], np.asarray(self.lengths)[:, None]
        valid = number < lengths if side == "right" else number >= longest - lengths
        return np.where(valid, tokens, 1), valid

    def hf(self, side: Side) -> dict[str, torch.Tensor]:
        """For transformers, whose placeholders stand between the left padding and the text."""
        tokens, valid = self.tokens(side)
        queries = self.config.num_query_tokens
        rows, mask = [], []
        for row, own in zip(tokens, valid, strict=True):
            marks = np.full(queries, self.config.image_token_index)
            padding = np.full((~own).sum(), 1)
            parts = [marks, row[own]]
            kept = [np.ones(queries + own.sum(), int)]
            place = 0 if side == "left" else len(parts)
            parts.insert(place, padding)
            kept.insert(min(place, 1), np.zeros_like(padding))
            rows.append(np.concatenate(parts))
            mask.append(np.concatenate(kept))
        return {
            "pixel_values": torch.from_numpy(self.pixels()),
            "input_ids": torch.from_numpy(np.stack(rows).astype(np.int64)),
            "attention_mask": torch.from_numpy(np.stack(mask).astype(np.int64)),
        }

    def ours(self, side: Side) -> Blip2Inputs:
        """For our model, whose queries stand before the padding."""
        tokens, valid = self.tokens(side)
        return Blip2Inputs(
            pixels=jnp.asarray(self.pixels()),
            image_index=jnp.arange(len(self.lengths), dtype=jnp.int32),
            tokens=jnp.asarray(tokens),
            token_valid=jnp.asarray(valid),
        )
