"""T5 v1.1, the encoder-decoder language model of BLIP-2 flan-t5-xl and flan-t5-xxl.

    embeddings → encoder ──────────────┐
    start token, new tokens → decoder ─┴ (self-, cross-attention, gated feed-forward) → head

No positions but a learned bias on the logits, which depends on the distance of two tokens and which
all layers of a stack share; RMS norms; logits are not divided by √d.

Its states outgrow float16. There, as in transformers, a feed-forward's last product is in float32,
and so are the states from the first one on.

Source: Raffel et al., "T5", arXiv 1910.10683; Hugging Face transformers (`models/t5`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Room, Select, Site, keep_all
from catp_jax.models.attention import attend, attend_blocks
from catp_jax.models.blocks import Block, KeysValues
from catp_jax.models.cache import (
    Cache,
    Past,
    Prompt,
    PromptLayer,
    Slots,
    Tail,
    by_layer,
    causal_mask,
)
from catp_jax.models.layers import (
    ACTIVATIONS,
    RmsNorm,
    embedding,
    linear,
    merge_heads,
    product,
    split_heads,
)
from catp_jax.struct import pytree, replace


@dataclasses.dataclass(frozen=True)
class T5Config:
    """`text_config` of a BLIP-2 checkpoint with T5 v1.1.

    `tie_word_embeddings`: the head is the embedding's transpose. `scale_decoder_outputs`: the
    head's input is divided by √d_model, as the first T5 did with its tied head.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    dense_act_fn: str
    tie_word_embeddings: bool
    scale_decoder_outputs: bool
    decoder_start_token_id: int

    @property
    def hidden_size(self) -> int:
        """Channels of an embedding, by the name that other language models have for it."""
        return self.d_model

    @classmethod
    def flan_t5_xl(cls) -> "T5Config":
        """Flan-T5 XL as in BLIP-2, which has the exact gelu where Flan-T5 itself has gelu_new."""
        return cls(
            vocab_size=32128,
            d_model=2048,
            d_kv=64,
            d_ff=5120,
            num_layers=24,
            num_decoder_layers=24,
            num_heads=32,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            layer_norm_epsilon=1e-6,
            dense_act_fn="gelu",
            tie_word_embeddings=False,
            scale_decoder_outputs=False,
            decoder_start_token_id=0,
        )

    @classmethod
    def flan_t5_xxl(cls) -> "T5Config":
        """Flan-T5 XXL as in BLIP-2."""
        return dataclasses.replace(cls.flan_t5_xl(), d_model=4096, d_ff=10240, num_heads=64)


@pytree
class T5Cache(Cache):
    """The decoder's own tokens are the tail; `cross` is the encoder's output as cross-attention
    sees it.
    """

    cross: Prompt


def buckets(config: T5Config, is_bidirectional: bool) -> np.ndarray:
    """The bucket of each distance 0 … max_distance to an earlier token, int32; all larger distances
    share the last. Later tokens have as many buckets of their own, if they are seen.
    """
    number = config.relative_attention_num_buckets // (2 if is_bidirectional else 1)
    exact, farthest = number // 2, config.relative_attention_max_distance
    distance = np.arange(farthest + 1, dtype=np.float32)
    # the float32 nearest to each logarithm: a distance on the border of two buckets depends on it
    ratio = np.maximum(distance, 1) / np.float32(exact)
    share = np.log(ratio.astype(np.float64)).astype(np.float32) / np.float32(
        np.log(farthest / exact)
    )
    large = exact + (share * np.float32(number - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(large, number - 1)).astype(np.int32)


def add(x: Float[Array, "b s d"], more: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """The sum, as wide as the wider of the two."""
    wide = max(x.dtype, more.dtype, key=lambda dtype: dtype.itemsize)
    return x.astype(wide) + more.astype(wide)


class T5Attention(nnx.Module):
    """Attention without scaling; the first of a stack owns the bias that all its layers add."""

    def __init__(
        self, config: T5Config, has_relative_attention_bias: bool = False, *, rngs: nnx.Rngs
    ):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads, self.config = config.num_heads, config
        options: dict[str, Any] = {"heads": self.heads, "rngs": rngs}
        self.q = linear(width, inner, ("embed", "heads"), **options)
        self.k = linear(width, inner, ("embed", "kv_heads"), **options)
        self.v = linear(width, inner, ("embed", "kv_heads"), **options)
        self.o = linear(inner, width, ("heads", "embed"), **options)
        if has_relative_attention_bias:
            rows = config.relative_attention_num_buckets
            axes = ("buckets", "heads")
            self.relative_attention_bias = embedding(rows, self.heads, axes=axes, rngs=rngs)

    def bias(
        self, rows: Int[Array, "b s"], columns: Int[Array, "b n"], is_bidirectional: bool
    ) -> Float[Array, "b h s n"]:
        """What is added to the logits, from the positions of rows and columns."""
        table = jnp.asarray(buckets(self.config, is_bidirectional))
        ahead = columns[:, None, :] - rows[:, :, None]
        distance = jnp.abs(ahead) if is_bidirectional else jnp.maximum(-ahead, 0)
        bucket = table[jnp.minimum(distance, table.shape[0] - 1)]
        if is_bidirectional:
            half = self.config.relative_attention_num_buckets // 2
            bucket = bucket + half * (ahead > 0).astype(jnp.int32)
        return jnp.moveaxis(self.relative_attention_bias(bucket), -1, 1)

    def project(self, x: Float[Array, "b n d"]) -> KeysValues:
        """Keys and values of what is attended to."""
        return KeysValues(
            keys=split_heads(self.k(x), self.heads), values=split_heads(self.v(x), self.heads)
        )

    def queries(self, x: Float[Array, "b s d"]) -> Float[Array, "b s h dk"]:
        """The rows' queries, which are not scaled."""
        return split_heads(self.q(x), self.heads)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        source: KeysValues,
        mask: Bool[Array, "b s n"],
        bias: Float[Array, "b h s n"] | None,
    ) -> Float[Array, "b s d"]:
        attended = attend(self.queries(x), source.keys, source.values, mask, bias, scale=1.0)
        return self.o(merge_heads(attended))


class T5SelfAttention(nnx.Module):
    """Self-attention over its own rows, or over a past that they join."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool, *, rngs: nnx.Rngs):
        self.SelfAttention = T5Attention(config, has_relative_attention_bias, rngs=rngs)
        self.layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s n"],
        bias: Float[Array, "b h s n"],
    ) -> Float[Array, "b s d"]:
        normed = self.layer_norm(x)
        projected = self.SelfAttention.project(normed)
        return add(x, self.SelfAttention(normed, projected, mask, bias))

    def step(
        self, x: Float[Array, "r one d"], past: Past, bias: Float[Array, "b h slots"]
    ) -> tuple[Float[Array, "r one d"], Block]:
        """One new token a row, and the tail with it."""
        normed, attention = self.layer_norm(x), self.SelfAttention
        queries, new = attention.queries(normed), attention.project(normed)
        attended, tail = past.attend(queries, new, bias, scale=1.0)
        return add(x, attention.o(merge_heads(attended))), tail


class T5CrossAttention(nnx.Module):
    """Attention to the encoder's output."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.EncDecAttention = T5Attention(config, rngs=rngs)
        self.layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(
        self, x: Float[Array, "b s d"], encoded: KeysValues, mask: Bool[Array, "b s n"]
    ) -> Float[Array, "b s d"]:
        return add(x, self.EncDecAttention(self.layer_norm(x), encoded, mask, None))

    def step(self, x: Float[Array, "r one d"], encoded: PromptLayer) -> Float[Array, "r one d"]:
        """One new token a row."""
        queries = self.EncDecAttention.queries(self.layer_norm(x))
        attended = attend_blocks(queries, encoded.reads(queries), scale=1.0)
        return add(x, self.EncDecAttention.o(merge_heads(attended)))


class T5GatedMlp(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        width, inner = config.d_model, config.d_ff
        self.wi_0 = linear(width, inner, ("embed", "mlp"), rngs=rngs)
        self.wi_1 = linear(width, inner, ("embed", "mlp"), rngs=rngs)
        self.wo = linear(inner, width, ("mlp", "embed"), rngs=rngs)
        self.activation = config.dense_act_fn

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        gate, up = ACTIVATIONS[self.activation](self.wi_0(x)), self.wi_1(x)
        wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        return self.wo(gate.astype(wide) * up.astype(wide))


class T5FeedForward(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.DenseReluDense = T5GatedMlp(config, rngs=rngs)
        self.layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return add(x, self.DenseReluDense(self.layer_norm(x)))


class T5Block(nnx.Module):
    """A layer, its parts in a list as in the checkpoint."""

    def __init__(self, config: T5Config, number: int, is_decoder: bool, *, rngs: nnx.Rngs):
        parts: list[nnx.Module] = [T5SelfAttention(config, number == 0, rngs=rngs)]
        if is_decoder:
            parts.append(T5CrossAttention(config, rngs=rngs))
        self.layer: nnx.List[Any] = nnx.List([*parts, T5FeedForward(config, rngs=rngs)])


class T5Stack(nnx.Module):
    def __init__(self, config: T5Config, depth: int, is_decoder: bool, *, rngs: nnx.Rngs):
        self.block = nnx.List(
            [T5Block(config, number, is_decoder, rngs=rngs) for number in range(depth)]
        )
        self.final_layer_norm = RmsNorm(config.d_model, config.layer_norm_epsilon)
        self.is_bidirectional = not is_decoder

    def bias(self, rows: Int[Array, "b s"], columns: Int[Array, "b n"]) -> Float[Array, "b h s n"]:
        """The bias on the logits of self-attention, the same in all layers."""
        first = self.block[0].layer[0].SelfAttention
        return first.bias(rows, columns, self.is_bidirectional)


class T5(nnx.Module):
    """`T5ForConditionalGeneration`: `language_model` of a BLIP-2 checkpoint."""

    sites = frozenset[Site]()

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.shared = embedding(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = T5Stack(config, config.num_layers, False, rngs=rngs)
        self.decoder = T5Stack(config, config.num_decoder_layers, True, rngs=rngs)
        if not config.tie_word_embeddings:
            axes = ("embed", "vocab")
            self.lm_head = linear(config.d_model, config.vocab_size, axes, rngs=rngs)

    def embed(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Word embeddings."""
        return self.shared(tokens)

    def logits(self, x: Float[Array, "b s d"]) -> Float[Array, "b s vocab"]:
        """Scores of the next token from the last decoder layer's output."""
        x = self.decoder.final_layer_norm(x)
        if self.config.scale_decoder_outputs:
            x = x * self.config.d_model**-0.5
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        table = self.shared.embedding[...]
        return product(lambda x: jnp.einsum("bsd,vd->bsv", x, table), x)

    def encode(self, x: Float[Array, "b n d"], slots: Slots) -> Float[Array, "b n d"]:
        """The encoder's output; padding is seen by nobody."""
        return self.encoder.final_layer_norm(self.encoder_states(x, slots)[-1])

    def encoder_states(self, x: Float[Array, "b n d"], slots: Slots) -> list[Float[Array, "b n d"]]:
        """The states after each of the encoder's layers, without a norm."""
        mask = jnp.broadcast_to(slots.valid[:, None], (*x.shape[:2], x.shape[1]))
        bias, states = self.encoder.bias(slots.positions, slots.positions), []
        for block in self.encoder.block:
            attention, feed_forward = block.layer
            x = feed_forward(attention(x, mask, bias))
            states.append(x)
        return states

    def prefill(
        self,
        x: Float[Array, "b n d"],
        slots: Slots,
        numbers: Int[Array, "b n"],
        num_visual: int,
        select: Select,
        room: Room,
        begun: Int[Array, "b begun"] | None = None,
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Encodes the prompt and runs the start token, and those that an answer has `begun` with:
        logits of the first new token, and a cache with `room` for new tokens. Nothing is
        pruned between the layers.
        """
        encoded = self.encode(x, slots)
        made = [block.layer[1].EncDecAttention.project(encoded) for block in self.decoder.block]
        cross = Prompt.of(dict(enumerate(made)), numbers, slots.valid, num_visual)
        nowhere = jnp.zeros(x.shape[0], jnp.int32)
        there = 0 if begun is None else begun.shape[1]
        cache = T5Cache(tail=Tail.empty([cross], nowhere, room.after(1 + there)), cross=cross)
        start = jnp.full((x.shape[0],), self.config.decoder_start_token_id)
        logits, cache = self.step(start, cache, select)
        if begun is None:
            return logits, cache

        def grow(last: tuple[Array, T5Cache], tokens: Array) -> tuple[tuple[Array, T5Cache], None]:
            (logits, cache), is_there = last, tokens >= 0
            grown, after = self.step(jnp.where(is_there, tokens, 0), cache, select)
            after = replace(after, tail=after.tail.where(is_there, cache.tail))
            return (jnp.where(is_there[:, None], grown, logits), after), None

        return jax.lax.scan(grow, (logits, cache), begun.T)[0]

    def step(
        self, tokens: Int[Array, " b"], cache: T5Cache, select: Select
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Adds one token to every sample. The caller sees to it that a slot is left.

        Nothing is pruned in a step: `select` is not asked.
        """
        x, written = self.embed(tokens[:, None].astype(jnp.int32)), []
        tail = cache.tail.opened()
        batch = tail.next_slot.shape[0]
        # the rows of a prompt are equally long
        position = tail.next_position.reshape(batch, -1)[:, :1]
        bias = self.decoder.bias(position, tail.positions)[:, :, 0]
        pasts = tail.pasts([None] * len(tail.blocks))
        encoded = by_layer([cache.cross], keep_all)
        for block, past, prompt in zip(self.decoder.block, pasts, encoded, strict=True):
            attention, cross_attention, feed_forward = block.layer
            x, grown = attention.step(x, past, bias)
            x = feed_forward(cross_attention.step(x, prompt))
            written.append(grown)
        return self.logits(x)[:, 0], replace(cache, tail=tail.closed(written))

    def __call__(
        self, x: Float[Array, "b n d"], slots: Slots, decoder_tokens: Int[Array, "b t"]
    ) -> Float[Array, "b t vocab"]:
        """Logits after each decoder token (the start token first), nothing cached."""
        return self.decode(self.encode(x, slots), slots, decoder_tokens)

    def decode(
        self, encoded: Float[Array, "b n d"], slots: Slots, decoder_tokens: Int[Array, "b t"]
    ) -> Float[Array, "b t vocab"]:
        """Logits after each decoder token, from the encoder's output; nothing cached."""
        x = self.embed(decoder_tokens)
        places = jnp.arange(x.shape[1], dtype=jnp.int32)
        places = jnp.broadcast_to(places, decoder_tokens.shape)
        rows = Slots(positions=places, valid=jnp.ones_like(places, bool))
        mask, bias = causal_mask(rows, rows), self.decoder.bias(places, places)
        seen = jnp.broadcast_to(slots.valid[:, None], (*x.shape[:2], encoded.shape[1]))
        for block in self.decoder.block:
            attention, cross_attention, feed_forward = block.layer
            x = attention(x, mask, bias)
            cross = cross_attention.EncDecAttention.project(encoded)
            x = feed_forward(cross_attention(x, cross, seen))
        return self.logits(x)
