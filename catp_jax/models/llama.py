"""Llama, the decoder-only language model of InstructBLIP's Vicunas.

Rotary positions, RMS norms, grouped queries, a gated feed-forward; the head is no embedding's
transpose. The layers are those of Llama 3.2 Vision's text decoder too.

Source: Touvron et al., "LLaMA", arXiv 2302.13971; Hugging Face transformers (`models/llama`).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.models.blocks import Block, KeysValues
from catp_jax.models.cache import Past
from catp_jax.models.caching import Among, attend_prompt
from catp_jax.models.decoder import Decoder, Layer
from catp_jax.models.layers import (
    ACTIVATIONS,
    RmsNorm,
    RopeConfig,
    embedding,
    linear,
    merge_heads,
    rope_angles,
    rotate,
    split_heads,
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama's part of a config.json."""

    vocab_size: int
    hidden_size: int
    hidden_act: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    rope: RopeConfig
    rms_norm_eps: float
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def vicuna_7b(cls) -> "LlamaConfig":
        """Vicuna 7B as in InstructBLIP."""
        return LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            hidden_act="silu",
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            intermediate_size=11008,
            rope=RopeConfig(10000.0, None),
            rms_norm_eps=1e-6,
            max_position_embeddings=2048,
        )

    @classmethod
    def vicuna_13b(cls) -> "LlamaConfig":
        """Vicuna 13B as in InstructBLIP."""
        return dataclasses.replace(
            LlamaConfig.vicuna_7b(),
            hidden_size=5120,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
            intermediate_size=13824,
        )


class LlamaMlp(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(width, inner, ("embed", "mlp"), rngs=rngs)
        self.up_proj = linear(width, inner, ("embed", "mlp"), rngs=rngs)
        self.down_proj = linear(inner, width, ("mlp", "embed"), rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class AttentionProjections(nnx.Module):
    """The four projections of grouped-query attention."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, head = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        options: dict[str, Any] = {"heads": self.kv_heads, "rngs": rngs}
        self.k_proj = linear(width, self.kv_heads * head, ("embed", "kv_heads"), **options)
        self.v_proj = linear(width, self.kv_heads * head, ("embed", "kv_heads"), **options)
        options = {"heads": self.heads, "rngs": rngs}
        self.q_proj = linear(width, self.heads * head, ("embed", "heads"), **options)
        self.o_proj = linear(self.heads * head, width, ("heads", "embed"), **options)


class SelfAttention(AttentionProjections):
    """Rotary self-attention, over its own rows or over a past that they join."""

    def __call__(
        self,
        x: Float[Array, "b s d"],
        rope: tuple[Float[Array, "b s dk"], Float[Array, "b s dk"]],
        mask: Bool[Array, "b s n"] | None,
        past: Past | None,
        among: Among | None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s h dk"], KeysValues | Block]:
        queries = rotate(split_heads(self.q_proj(x), self.heads), *rope)
        keys = rotate(split_heads(self.k_proj(x), self.kv_heads), *rope)
        new = KeysValues(keys=keys, values=split_heads(self.v_proj(x), self.kv_heads))
        if past is None:
            attended, cache = attend_prompt(queries, new, mask, among), new
        else:
            attended, cache = past.attend(queries, new)
        return self.o_proj(merge_heads(attended)), queries, cache


class SelfLayer(nnx.Module):
    """A Llama layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.mlp = LlamaMlp(config, rngs=rngs)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        rope: tuple[Float[Array, "b s dk"], Float[Array, "b s dk"]],
        mask: Bool[Array, "b s n"] | None,
        past: Past | None = None,
        among: Among | None = None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s h dk"], KeysValues | Block]:
        """The layer's output, its queries, and its keys and values: the rows' own, or the past's
        tail with them.
        """
        normed = self.input_layernorm(x)
        attended, queries, cache = self.self_attn(normed, rope, mask, past, among)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), queries, cache


class LlamaModel(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([SelfLayer(config, rngs=rngs) for _ in layers])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class Llama(Decoder):
    """`LlamaForCausalLM`: `language_model` of an InstructBLIP checkpoint."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.model = LlamaModel(config, rngs=rngs)
        axes = ("embed", "vocab")
        self.lm_head = linear(config.hidden_size, config.vocab_size, axes, rngs=rngs)

    def embed(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Word embeddings."""
        return self.model.embed_tokens(tokens)

    def placed(
        self, x: Float[Array, "b s d"], positions: Int[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        """The embeddings as they are: positions come in with queries and keys."""
        return x

    def layers_at(self, positions: Int[Array, "b s"]) -> Sequence[Layer]:
        """The layers, turning queries and keys by these positions."""
        rope = rope_angles(positions, self.config.rope, self.config.head_dim)
        return [partial(layer, rope=rope) for layer in self.model.layers]

    def logits(self, x: Float[Array, "b s d"]) -> Float[Array, "b s vocab"]:
        """Scores of the next token from the last layer's output."""
        return self.lm_head(self.model.norm(x))
