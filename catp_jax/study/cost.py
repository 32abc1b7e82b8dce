"""What a model's caches and programs cost, from shapes and compiled programs: exact anywhere."""

from typing import Any

import jax.numpy as jnp

from catp_jax.models.mllama import MllamaConfig


def cross_bytes_per_token(config: MllamaConfig, dtype: Any) -> int:
    """Bytes of cross-attention keys and values that one visual token takes over all layers."""
    text = config.text
    layers = len(text.cross_attention_layers)
    return 2 * layers * text.num_key_value_heads * text.head_dim * jnp.dtype(dtype).itemsize
