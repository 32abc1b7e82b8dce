"""Llama 3.2 Vision's text decoder: Llama layers with gated cross-attention layers in between.

    tokens → self … self ─ CROSS ─ self … self ─ cross ─ self … → norm
                            │ views: the first cross-attention layer shows its queries and keys
                            └ everything after it sees only the kept visual features

The prefill is two functions cut at that layer (`front`, `back`), so that a caller may run them as
one program or look at the scores in between. `step` adds one token.

Source: Hugging Face transformers (`models/mllama`). Rows of text that see no image exist (text
before the first image, samples without one). What cross-attention does to them is the `MaskMode`:

- "meta": nothing, as in Meta's reference implementation.
- "hf": as in transformers: they attend to every visual token there is, padding included, and only
  the feed-forward branch is dropped. The result then depends on the padding of the batch. Pruning
  at the first cross-attention layer never keeps padding, so with it such rows differ from
  transformers even at a full budget; a cache has what new tokens read, padding included.
"""

import dataclasses
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Reduction, Room, Select, Site, Tiles, View, keep_columns
from catp_jax.models.attention import attend, attend_blocks
from catp_jax.models.blocks import KeysValues
from catp_jax.models.cache import (
    Cache,
    Prompt,
    PromptLayer,
    Slots,
    Tail,
    by_layer,
    causal_mask,
)
from catp_jax.models.caching import Shown, Stretch
from catp_jax.models.layers import (
    Llama3Scaling,
    RmsNorm,
    RopeConfig,
    embedding,
    gate,
    merge_heads,
    rope_angles,
    split_heads,
)
from catp_jax.models.llama import AttentionProjections, LlamaConfig, LlamaMlp, SelfLayer
from catp_jax.struct import pytree, replace, static

MaskMode = Literal["meta", "hf"]

EXTRA_EMBEDDINGS = 8  # rows of the embedding beyond the vocabulary; the image token is the first


@dataclasses.dataclass(frozen=True)
class CrossDecoderConfig(LlamaConfig):
    """`text_config` of an mllama checkpoint."""

    cross_attention_layers: tuple[int, ...]

    @classmethod
    def llama_3_2_11b(cls) -> "CrossDecoderConfig":
        """The decoder of Llama 3.2 11B Vision."""
        return cls(
            vocab_size=128256,
            hidden_size=4096,
            hidden_act="silu",
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            rope=RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),
            rms_norm_eps=1e-5,
            max_position_embeddings=131072,
            cross_attention_layers=tuple(range(3, 40, 5)),
        )

    @classmethod
    def llama_3_2_90b(cls) -> "CrossDecoderConfig":
        """The decoder of Llama 3.2 90B Vision."""
        return dataclasses.replace(
            cls.llama_3_2_11b(),
            hidden_size=8192,
            num_hidden_layers=100,
            num_attention_heads=64,
            intermediate_size=28672,
            cross_attention_layers=tuple(range(3, 100, 5)),
        )


@pytree
class Visual:
    """The visual tokens of a batch, tiles without padding first, and who sees them.

    `slots.positions` counts visual tokens through the sample's tiles, `sees` is False in rows of
    text padding and for tiles that a row's image span does not cover. `tiles` says how those
    that are counted lie.
    """

    features: Float[Array, "b n d"]
    slots: Slots
    sees: Bool[Array, "b s n"]
    tiles: Tiles | None = None

    def keep(self, keep: Keep) -> "Visual":
        """The kept tokens, the mask gathered with them."""
        return Visual(
            features=keep.apply(self.features),
            slots=self.slots.keep(keep),
            sees=keep_columns(self.sees, keep),
            tiles=None if self.tiles is None else self.tiles.pruned(),
        )


@pytree
class Branches:
    """Which branches of a cross-attention layer a row takes: attention, feed-forward."""

    attends: Bool[Array, "r s"]
    feeds: Bool[Array, "r s"]


@pytree
class CrossCache(Cache):
    """`text`: the self-attention layers. `cross`: the cross-attention layers, of which new tokens
    take `branches`; none if no sample of the batch has an image.
    """

    text: tuple[Prompt, ...]
    cross: tuple[Prompt, ...] = ()
    branches: Branches | None = None


def cross_mask(
    sees: Bool[Array, "b s n"], valid: Bool[Array, "b n"], mode: MaskMode
) -> tuple[Bool[Array, "b s n"], Branches]:
    """What the rows of a prompt attend to in cross-attention layers, and what they take of them."""
    sees = sees & valid[:, None, :]
    has_image = sees.any(axis=-1)
    if mode == "meta":
        return sees, Branches(attends=has_image, feeds=has_image)
    everything = jnp.where(has_image[:, :, None], sees, valid[:, None, :])
    return everything, Branches(attends=everything.any(axis=-1), feeds=has_image)


class CrossAttention(AttentionProjections):
    """Attention from text to visual features; queries and keys are normed per head, no RoPE."""

    def __init__(self, config: CrossDecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps)

    def queries(self, x: Float[Array, "b s d"]) -> Float[Array, "b s h dk"]:
        """The rows' queries, normed, not scaled."""
        return self.q_norm(split_heads(self.q_proj(x), self.heads))

    def project(self, features: Float[Array, "b n d"]) -> KeysValues:
        """The features' keys and values."""
        return KeysValues(
            keys=self.k_norm(split_heads(self.k_proj(features), self.kv_heads)),
            values=split_heads(self.v_proj(features), self.kv_heads),
        )

    def __call__(
        self,
        x: Float[Array, "r s d"],
        visual: KeysValues | PromptLayer,
        mask: Bool[Array, "b s n"] | None,
    ) -> Float[Array, "r s d"]:
        queries = self.queries(x)
        if isinstance(visual, PromptLayer):
            attended = attend_blocks(queries, visual.reads(queries))
        else:
            attended = attend(queries, visual.keys, visual.values, mask)
        return self.o_proj(merge_heads(attended))


class CrossLayer(nnx.Module):
    """A gated cross-attention layer; both gates start at zero, where it is the identity."""

    def __init__(self, config: CrossDecoderConfig, *, rngs: nnx.Rngs):
        self.cross_attn = CrossAttention(config, rngs=rngs)
        self.mlp = LlamaMlp(config, rngs=rngs)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = gate(0.0)
        self.cross_attn_mlp_gate = gate(0.0)

    def __call__(
        self,
        x: Float[Array, "r s d"],
        visual: KeysValues | PromptLayer,
        mask: Bool[Array, "b s n"] | None,
        branches: Branches,
    ) -> Float[Array, "r s d"]:
        attended = self.cross_attn(self.input_layernorm(x), visual, mask)
        x = x + self._gated(self.cross_attn_attn_gate, branches.attends, attended)
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + self._gated(self.cross_attn_mlp_gate, branches.feeds, fed)

    def shown(self, x: Float[Array, "b s d"], features: Float[Array, "b n d"]) -> Shown:
        """What the layer makes of the features, and the rows' queries."""
        queries = self.cross_attn.queries(self.input_layernorm(x))
        return Shown(queries=queries, made=self.cross_attn.project(features))

    @staticmethod
    def _gated(
        gate: nnx.Param[Array], rows: Bool[Array, "b s"], x: Float[Array, "b s d"]
    ) -> Float[Array, "b s d"]:
        return jnp.tanh(gate[...])[None, None] * rows[:, :, None].astype(x.dtype) * x


@pytree
class Front:
    """The state of a prefill right after the first cross-attention layer.

    `before` has the layers in front of it, `cross` itself. `view` is what pruners look at. The last
    three are None if the batch has no image.
    """

    mode: MaskMode = static()
    hidden: Float[Array, "b s d"]
    text: Slots
    before: tuple[Shown, ...]
    cross: Shown | None = None
    visual: Visual | None = None
    view: View | None = None


class CrossDecoder(nnx.Module):
    """`language_model` of an mllama checkpoint, without its head."""

    def __init__(self, config: CrossDecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = embedding(
            config.vocab_size + EXTRA_EMBEDDINGS, config.hidden_size, rngs=rngs
        )
        self.layers: nnx.List[Any] = nnx.List(
            [
                (CrossLayer if index in config.cross_attention_layers else SelfLayer)(
                    config, rngs=rngs
                )
                for index in range(config.num_hidden_layers)
            ]
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def first_cross(self) -> int:
        """Number of the first cross-attention layer, where visual features are pruned."""
        return self.config.cross_attention_layers[0]

    def front(
        self,
        tokens: Int[Array, "b s"],
        text: Slots,
        visual: Visual | None,
        mode: MaskMode,
    ) -> Front:
        """Runs the prompt through the first cross-attention layer, which attends to everything."""
        x = self.embed_tokens(tokens)
        rope, mask = self._rope(text.positions), causal_mask(text, text)
        before: list[Shown] = []
        for layer in self.layers[: self.first_cross]:
            x, queries, made = layer(x, rope, mask)
            before.append(Shown(queries=queries, made=made))
        front = Front(mode=mode, hidden=x, text=text, before=tuple(before))
        if visual is None:
            return front
        layer = self.layers[self.first_cross]
        first = layer.shown(x, visual.features)
        view = View(
            site=Site.CROSS,
            layer=self.first_cross,
            num_visual=visual.features.shape[1],
            tokens=visual.features,
            attention=first.attention,
            values=first.made.values,
            numbers=visual.slots.positions,
            valid=visual.slots.valid & visual.sees.any(axis=1),
            sees=visual.sees & visual.slots.valid[:, None, :],
            tiles=visual.tiles,
        )
        x = layer(x, first.made, *cross_mask(visual.sees, visual.slots.valid, mode))
        return replace(front, hidden=x, cross=first, visual=visual, view=view)

    def back(
        self, front: Front, select: Select, room: Room
    ) -> tuple[Float[Array, "b s d"], CrossCache]:
        """Runs the rest of the prompt over the kept features.

        Returns the last hidden states and a cache with `room` for new tokens.
        """
        x, text, visual, first = front.hidden, front.text, front.visual, front.cross
        if (
            (keep := select(front.view).tokens) is not None
            and visual is not None
            and first is not None
        ):
            visual, project = visual.keep(keep), self.layers[self.first_cross].cross_attn.project
            made = project(visual.features) if keep.merges else first.made.keep(keep)
            first = replace(first, made=made)
        rope, mask = self._rope(text.positions), causal_mask(text, text)
        length = text.valid.sum(axis=1, dtype=jnp.int32)
        last = jnp.maximum(length - 1, 0)[:, None]
        layers, cross = dict(enumerate(front.before)), dict[int, Shown]()
        shrinks: dict[int, Reduction] = {}
        images, branches = None, None
        if visual is not None and first is not None:
            images, branches = self._images(visual, front.mode, last, select)
            cross[self.first_cross] = first
            shrinks[self.first_cross] = images.ask(self.first_cross, first)
        for number in range(self.first_cross + 1, len(self.layers)):
            layer = self.layers[number]
            if isinstance(layer, SelfLayer):
                x, queries, made = layer(x, rope, mask)
                layers[number] = Shown(queries=queries, made=cast(KeysValues, made))
            elif visual is not None and images is not None and branches is not None:
                cross[number] = layer.shown(x, visual.features)
                shrinks[number] = images.ask(number, cross[number])
                made, seen = cross[number].made, images.mask
                if (among := shrinks[number].among) is not None:
                    made, seen = made.keep(among), keep_columns(seen, among)
                x = layer(x, made, seen, branches)
        of_text = Stretch(
            select=select,
            num_visual=0,
            numbers=jnp.full_like(text.positions, -1),
            mask=mask,
            sees=mask & text.valid[:, :, None],
            read=text.valid,
        )
        shrinks |= {number: of_text.ask(number, shown) for number, shown in layers.items()}
        prompt = of_text.cached(layers, shrinks)
        cache = CrossCache(tail=Tail.empty(prompt, length, room), text=prompt)
        if images is not None and branches is not None:
            taken = jax.tree.map(lambda rows: jnp.take_along_axis(rows, last, axis=1), branches)
            cache = replace(cache, cross=images.cached(cross, shrinks), branches=taken)
        return self.norm(x), cache

    def _images(
        self, visual: Visual, mode: MaskMode, last: Int[Array, "b one"], select: Select
    ) -> tuple[Stretch, Branches]:
        """What cross-attention layers read, and what their rows take of it. New tokens see what the
        row `last` sees.
        """
        mask, branches = cross_mask(visual.sees, visual.slots.valid, mode)
        stretch = Stretch(
            select=select,
            num_visual=visual.features.shape[1],
            numbers=visual.slots.positions,
            mask=mask,
            sees=visual.sees & visual.slots.valid[:, None],
            read=jnp.take_along_axis(mask, last[:, :, None], axis=1)[:, 0],
            tiles=visual.tiles,
        )
        return stretch, branches

    def step(
        self, tokens: Int[Array, " r"], cache: CrossCache, select: Select
    ) -> tuple[Float[Array, "r d"], CrossCache]:
        """Adds one token to every row. The caller sees to it that a slot is left."""
        x = self.embed_tokens(tokens[:, None])
        tail, written = cache.tail.opened(), []
        rope = self._rope(tail.next_position[:, None])
        rows = tail.seen.shape[0] // tail.positions.shape[0]
        branches = jax.tree.map(lambda taken: jnp.repeat(taken, rows, axis=0), cache.branches)
        cross = iter(by_layer(cache.cross, select))
        pasts = iter(tail.pasts(by_layer(cache.text, select)))
        for layer in self.layers:
            if isinstance(layer, SelfLayer):
                x, _, block = layer(x, rope, None, next(pasts))
                written.append(block)
            elif branches is not None:
                x = layer(x, next(cross), None, branches)
        return self.norm(x)[:, 0], replace(cache, tail=tail.closed(written))

    def _rope(
        self, positions: Int[Array, "b s"]
    ) -> tuple[Float[Array, "b s dk"], Float[Array, "b s dk"]]:
        return rope_angles(positions, self.config.rope, self.config.head_dim)
