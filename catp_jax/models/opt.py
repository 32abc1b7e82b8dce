"""OPT, the decoder-only language model of BLIP-2 opt-2.7b and opt-6.7b.

Learned positions count the tokens that are no padding, pre-norm layers, ReLU. OPT-350m, which is
built otherwise, is not in any BLIP-2 and not supported.

Source: Zhang et al., "OPT", arXiv 2205.01068; Hugging Face transformers (`models/opt`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.models.blocks import Block, KeysValues
from catp_jax.models.cache import Past
from catp_jax.models.caching import Among, attend_prompt
from catp_jax.models.decoder import Decoder, Layer
from catp_jax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    embedding,
    linear,
    merge_heads,
    product,
    split_heads,
)

OFFSET = 2  # the first rows of the table of positions are unused
NORM_EPS = 1e-5  # torch's default, which no config.json names


@dataclasses.dataclass(frozen=True)
class OptConfig:
    """`text_config` of a BLIP-2 checkpoint with OPT."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    ffn_dim: int
    max_position_embeddings: int
    activation_function: str
    tie_word_embeddings: bool

    @classmethod
    def opt_2_7b(cls) -> "OptConfig":
        """OPT 2.7B as in BLIP-2."""
        return cls(
            vocab_size=50304,
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            ffn_dim=10240,
            max_position_embeddings=2048,
            activation_function="relu",
            tie_word_embeddings=True,
        )

    @classmethod
    def opt_6_7b(cls) -> "OptConfig":
        """OPT 6.7B as in BLIP-2."""
        return dataclasses.replace(cls.opt_2_7b(), hidden_size=4096, ffn_dim=16384)


class OptAttention(nnx.Module):
    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        options: dict[str, Any] = {"bias": True, "heads": self.heads, "rngs": rngs}
        self.q_proj = linear(width, width, ("embed", "heads"), **options)
        self.k_proj = linear(width, width, ("embed", "kv_heads"), **options)
        self.v_proj = linear(width, width, ("embed", "kv_heads"), **options)
        self.out_proj = linear(width, width, ("heads", "embed"), **options)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s n"] | None,
        past: Past | None,
        among: Among | None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s h dk"], KeysValues | Block]:
        queries, keys, values = (
            split_heads(project(x), self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        new = KeysValues(keys=keys, values=values)
        if past is None:
            attended, cache = attend_prompt(queries, new, mask, among), new
        else:
            attended, cache = past.attend(queries, new)
        return self.out_proj(merge_heads(attended)), queries, cache


class OptLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.ffn_dim
        self.self_attn = OptAttention(config, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(width, NORM_EPS)
        self.fc1 = linear(width, inner, ("embed", "mlp"), bias=True, rngs=rngs)
        self.fc2 = linear(inner, width, ("mlp", "embed"), bias=True, rngs=rngs)
        self.final_layer_norm = LayerNorm(width, NORM_EPS)
        self.activation = config.activation_function

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s n"] | None,
        past: Past | None = None,
        among: Among | None = None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s h dk"], KeysValues | Block]:
        """The layer's output, its queries, and its keys and values: the rows' own, or the past's
        tail with them.
        """
        attended, queries, cache = self.self_attn(self.self_attn_layer_norm(x), mask, past, among)
        x = x + attended
        fed = ACTIVATIONS[self.activation](self.fc1(self.final_layer_norm(x)))
        return x + self.fc2(fed), queries, cache


class OptDecoder(nnx.Module):
    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs):
        width, places = config.hidden_size, config.max_position_embeddings + OFFSET
        self.embed_tokens = embedding(config.vocab_size, width, rngs=rngs)
        self.embed_positions = embedding(places, width, rngs=rngs)
        self.final_layer_norm = LayerNorm(width, NORM_EPS)
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List([OptLayer(config, rngs=rngs) for _ in layers])


class OptModel(nnx.Module):
    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs):
        self.decoder = OptDecoder(config, rngs=rngs)


class Opt(Decoder):
    """`OPTForCausalLM`: `language_model` of a BLIP-2 checkpoint."""

    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.model = OptModel(config, rngs=rngs)
        if not config.tie_word_embeddings:
            axes = ("embed", "vocab")
            self.lm_head = linear(config.hidden_size, config.vocab_size, axes, rngs=rngs)

    def embed(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Word embeddings, without positions."""
        return self.model.decoder.embed_tokens(tokens)

    def placed(
        self, x: Float[Array, "b s d"], positions: Int[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        """Embeddings of words and positions."""
        return x + self.model.decoder.embed_positions(positions + OFFSET)

    def layers_at(self, positions: Int[Array, "b s"]) -> Sequence[Layer]:
        """The layers, which know nothing of positions."""
        return list(self.model.decoder.layers)

    def logits(self, x: Float[Array, "b s d"]) -> Float[Array, "b s vocab"]:
        """Scores of the next token from the last layer's output."""
        x = self.model.decoder.final_layer_norm(x)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        table = self.model.decoder.embed_tokens.embedding[...]
        return product(lambda x: jnp.einsum("bsd,vd->bsv", x, table), x)
