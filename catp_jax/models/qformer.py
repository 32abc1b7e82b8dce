"""The Q-Former: learned queries that read an image through cross-attention, BERT-style.

    queries ─ LayerNorm ─┬ self-attention ─ cross-attention to the image ─ feed-forward (queries) ┬─
    text    ─ LayerNorm ─┘ (together)       (every second layer)       ─ feed-forward (text)      ┘

Layers are post-norm. Text goes in only where the checkpoint has a branch for it (image-text
retrieval, InstructBLIP). Numbers here have the type of the Q-Former's own weights, which may be
wider than the rest: BLIP-2's stay float32, as in transformers.

Source: Li et al., "BLIP-2", arXiv 2301.12597; Hugging Face transformers (`models/blip_2`).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Attention
from catp_jax.models.attention import attend, scaled
from catp_jax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    embedding,
    linear,
    merge_heads,
    split_heads,
)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """`qformer_config` of a BLIP-2 checkpoint; `vocab_size` and `max_position_embeddings` count
    only with `use_qformer_text_input`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    layer_norm_eps: float
    cross_attention_frequency: int
    encoder_hidden_size: int
    use_qformer_text_input: bool

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have cross-attention."""
        return tuple(range(0, self.num_hidden_layers, self.cross_attention_frequency))

    @classmethod
    def blip2(cls) -> "QFormerConfig":
        """The Q-Former of all BLIP-2 checkpoints that generate text."""
        return cls(
            vocab_size=30522,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            hidden_act="gelu",
            max_position_embeddings=512,
            layer_norm_eps=1e-12,
            cross_attention_frequency=2,
            encoder_hidden_size=1408,
            use_qformer_text_input=False,
        )


class QFormerProjections(nnx.Module):
    """Queries from one sequence, keys and values from another or the same."""

    def __init__(self, config: QFormerConfig, source: int, *, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        axes = ("qformer_embed", "qformer_inner")
        self.query = linear(width, width, axes, bias=True, rngs=rngs)
        axes = axes if source == width else ("vision_embed", "qformer_inner")
        self.key = linear(source, width, axes, bias=True, rngs=rngs)
        self.value = linear(source, width, axes, bias=True, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        source: Float[Array, "b m e"],
        mask: Bool[Array, "b s m"] | None,
    ) -> tuple[Float[Array, "b s d"], Attention]:
        queries, keys = (
            split_heads(self.query(x), self.heads),
            split_heads(self.key(source), self.heads),
        )
        values = split_heads(self.value(source), self.heads)
        attended = merge_heads(attend(queries, keys, values, mask))
        return attended, Attention(queries=scaled(queries), keys=keys)


class AddAndNorm(nnx.Module):
    """A projection back to the residual stream, and the norm after it."""

    def __init__(self, inputs: int, config: QFormerConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.dense = linear(inputs, width, ("qformer_inner", "qformer_embed"), bias=True, rngs=rngs)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)

    def __call__(
        self, x: Float[Array, "b s m"], residual: Float[Array, "b s d"]
    ) -> Float[Array, "b s d"]:
        return self.LayerNorm(self.dense(x) + residual)


class QFormerAttention(nnx.Module):
    def __init__(self, config: QFormerConfig, source: int, *, rngs: nnx.Rngs):
        self.attention = QFormerProjections(config, source, rngs=rngs)
        self.output = AddAndNorm(config.hidden_size, config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        source: Float[Array, "b m e"],
        mask: Bool[Array, "b s m"] | None,
    ) -> tuple[Float[Array, "b s d"], Attention]:
        attended, attention = self.attention(x, source, mask)
        return self.output(attended, x), attention


class Intermediate(nnx.Module):
    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.dense = linear(width, inner, ("qformer_embed", "qformer_inner"), bias=True, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s m"]:
        return ACTIVATIONS[self.activation](self.dense(x))


class QFormerLayer(nnx.Module):
    """Self-attention, cross-attention of the queries if this layer has it, feed-forward."""

    def __init__(self, config: QFormerConfig, number: int, *, rngs: nnx.Rngs):
        inner = config.intermediate_size
        self.attention = QFormerAttention(config, config.hidden_size, rngs=rngs)
        self.has_cross_attention = number in config.cross_layers
        if self.has_cross_attention:
            self.crossattention = QFormerAttention(config, config.encoder_hidden_size, rngs=rngs)
        if config.use_qformer_text_input:
            self.intermediate = Intermediate(config, rngs=rngs)
            self.output = AddAndNorm(inner, config, rngs=rngs)
        self.intermediate_query = Intermediate(config, rngs=rngs)
        self.output_query = AddAndNorm(inner, config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        queries: int,
        mask: Bool[Array, "b s s"] | None,
        image: Float[Array, "b n e"] | None,
    ) -> tuple[Float[Array, "b s d"], Attention, Attention | None]:
        """`queries`: how many of the rows are queries; they come first."""
        x, among = self.attention(x, x, mask)
        query, text = x[:, :queries], x[:, queries:]
        cross, parts = None, []
        if queries:
            if self.has_cross_attention and image is not None:
                query, cross = self.crossattention(query, image, None)
            parts.append(self.output_query(self.intermediate_query(query), query))
        if text.shape[1]:
            parts.append(self.output(self.intermediate(text), text))
        return jnp.concatenate(parts, axis=1), among, cross


class QFormerEncoder(nnx.Module):
    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        layers = range(config.num_hidden_layers)
        self.layer = nnx.List([QFormerLayer(config, number, rngs=rngs) for number in layers])


class QFormer(nnx.Module):
    """`qformer` of a BLIP-2 or InstructBLIP checkpoint."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = QFormerEncoder(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        queries: int,
        image: Float[Array, "b n e"] | None,
        valid: Bool[Array, "b s"] | None = None,
    ) -> tuple[Float[Array, "b s d"], tuple[Attention, ...], tuple[Attention, ...]]:
        """`x`: query tokens, then embedded text, of which `valid` says what is no padding.

        Returns the last hidden states, the self-attention by layer and the cross-attention by
        cross-attention layer.
        """
        dtype = self.layernorm.scale.dtype
        x = self.layernorm(x.astype(dtype))
        image = None if image is None else image.astype(dtype)
        mask = None
        if valid is not None:
            mask = jnp.broadcast_to(valid[:, None], (*valid.shape, valid.shape[1]))
        among, cross = [], []
        for layer in self.encoder.layer:
            x, attended, seen = layer(x, queries, mask, image)
            among.append(attended)
            if seen is not None:
                cross.append(seen)
        return x, tuple(among), tuple(cross)


class TextEmbeddings(nnx.Module):
    """Words and their positions, for Q-Formers that read text."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        width, places = config.hidden_size, config.max_position_embeddings
        axes = ("rows", "channels")
        self.word_embeddings = embedding(config.vocab_size, width, axes=axes, rngs=rngs)
        axes = ("rows", "channels")
        self.position_embeddings = embedding(places, width, axes=axes, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        last = self.position_embeddings.num_embeddings - 1
        # padding, which nobody sees, may go on after the last position
        places = jnp.minimum(jnp.arange(tokens.shape[1], dtype=jnp.int32), last)[None]
        x = self.word_embeddings(tokens) + self.position_embeddings(places)
        return x.astype(jnp.float32)
