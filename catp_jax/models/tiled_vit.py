"""Llama 3.2 Vision's image encoder: a ViT over up to four tiles of one image at once.

    tiles → patches → + tile embedding → [CLS | patches] → + position → local layers → global layers
                                                                │ some layers' outputs
                                                                └──────────── joined at the end

Source: the reference implementation in Hugging Face transformers (`models/mllama`). Two properties
of it are kept because the released weights were trained with them:

- Only padding-to-padding attention is masked. Real tokens do attend to padding tiles, so a padding
  tile can be dropped after this encoder, not inside it.
- Tokens are padded to a multiple of 8 per tile inside the encoder and those take part likewise.

In a third one implementations differ: what `intermediate_layers_indices` counts (`VisionMode`).

- "meta": the inputs of those layers, as in Meta's reference code and in transformers until 2025.
  Meta's weights were trained so.
- "hf": their outputs, as in transformers since its refactoring (pull request #39643) and so in what
  the parity tests compare with. A checkpoint that was trained so says it in its config.json:
  `"vision_mode": "hf"` in `vision_config`, which transformers does not read.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.models.attention import attend_padded
from catp_jax.models.layers import (
    LayerNorm,
    VisionMlp,
    embedding,
    gate,
    linear,
    merge_heads,
    split_heads,
)

VisionMode = Literal["hf", "meta"]

OUTER_NORM_EPS = 1e-5  # torch's LayerNorm default, which the reference uses before and after


@dataclasses.dataclass(frozen=True)
class TiledVitConfig:
    """`vision_config` of an mllama checkpoint."""

    hidden_size: int
    hidden_act: str
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    num_channels: int
    intermediate_size: int
    image_size: int
    patch_size: int
    norm_eps: float
    max_num_tiles: int
    intermediate_layers_indices: tuple[int, ...]
    supported_aspect_ratios: tuple[tuple[int, int], ...]
    vision_mode: VisionMode

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """The class token and the patches of one tile."""
        return self.grid**2 + 1

    @property
    def output_size(self) -> int:
        """Channels of the encoder's output: the last layer and the intermediate ones."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    @classmethod
    def llama_3_2(cls) -> "TiledVitConfig":
        """The encoder of Llama 3.2 Vision, the same in 11B and 90B."""
        return cls(
            hidden_size=1280,
            hidden_act="gelu",
            num_hidden_layers=32,
            num_global_layers=8,
            attention_heads=16,
            num_channels=3,
            intermediate_size=5120,
            image_size=560,
            patch_size=14,
            norm_eps=1e-5,
            max_num_tiles=4,
            intermediate_layers_indices=(3, 7, 15, 23, 30),
            supported_aspect_ratios=(
                (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)
            ),
            vision_mode="meta",
        )  # fmt: skip


class TileEmbedding(nnx.Module):
    """Adds one vector per tile, chosen by the image's aspect ratio."""

    def __init__(self, config: TiledVitConfig, *, rngs: nnx.Rngs):
        rows = len(config.supported_aspect_ratios) + 1
        self.embedding = embedding(
            rows, config.max_num_tiles * config.hidden_size, axes=("ratio", "tiles"), rngs=rngs
        )
        self.gate = gate(0.0)

    def __call__(
        self, x: Float[Array, "i t n d"], aspect_ratio_ids: Int[Array, " i"]
    ) -> Float[Array, "i t n d"]:
        added = self.embedding(aspect_ratio_ids).reshape(x.shape[0], x.shape[1], 1, x.shape[3])
        return x + added * jnp.tanh(self.gate[...])[None, None, None]


class PositionEmbedding(nnx.Module):
    """Position within the tile, and — gated against it — position within tile and aspect ratio."""

    def __init__(self, config: TiledVitConfig, *, rngs: nnx.Rngs):
        rows = len(config.supported_aspect_ratios) + 1
        tokens, width = config.tokens_per_tile, config.hidden_size
        self.gate = gate(0.0)
        self.embedding = nnx.Param(
            nnx.initializers.normal(width**-0.5)(rngs.params(), (tokens, width)),
            axes=("tokens", "vision_embed"),
        )
        self.tile_embedding = embedding(
            rows, config.max_num_tiles * tokens * width, axes=("ratio", "tiles"), rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "i t n d"], aspect_ratio_ids: Int[Array, " i"]
    ) -> Float[Array, "i t n d"]:
        share = jnp.tanh(self.gate[...])
        x = x + ((1 - share)[None] * self.embedding[...])[None, None]
        return x + share[None, None, None] * self.tile_embedding(aspect_ratio_ids).reshape(x.shape)


class VisionAttention(nnx.Module):
    def __init__(self, config: TiledVitConfig, *, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.attention_heads
        options: dict[str, Any] = {"heads": self.heads, "rngs": rngs}
        self.q_proj = linear(width, width, ("vision_embed", "vision_heads"), **options)
        self.k_proj = linear(width, width, ("vision_embed", "vision_heads"), **options)
        self.v_proj = linear(width, width, ("vision_embed", "vision_heads"), **options)
        self.o_proj = linear(width, width, ("vision_heads", "vision_embed"), **options)

    def __call__(self, x: Float[Array, "i n d"], real: Int[Array, " i"]) -> Float[Array, "i n d"]:
        queries, keys, values = (
            split_heads(project(x), self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(merge_heads(attend_padded(queries, keys, values, real)))


class VisionLayer(nnx.Module):
    """Pre-norm transformer layer; in the global encoder both branches are gated."""

    def __init__(self, config: TiledVitConfig, is_gated: bool, *, rngs: nnx.Rngs):
        self.self_attn = VisionAttention(config, rngs=rngs)
        width, inner = config.hidden_size, config.intermediate_size
        self.mlp = VisionMlp(width, inner, config.hidden_act, rngs=rngs)
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.is_gated = is_gated
        if is_gated:
            self.gate_attn = gate(jnp.pi / 4)
            self.gate_ffn = gate(jnp.pi / 4)

    def __call__(self, x: Float[Array, "i n d"], real: Int[Array, " i"]) -> Float[Array, "i n d"]:
        attended = self.self_attn(self.input_layernorm(x), real)
        x = x + (self._gated(self.gate_attn, attended) if self.is_gated else attended)
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + (self._gated(self.gate_ffn, fed) if self.is_gated else fed)

    @staticmethod
    def _gated(gate: nnx.Param[Array], x: Float[Array, "i n d"]) -> Float[Array, "i n d"]:
        return jnp.tanh(gate[...])[None, None] * x


class VisionEncoder(nnx.Module):
    """A stack of layers over tokens of which those from `real` on are padding; returns its input
    and what each layer put out.
    """

    def __init__(self, config: TiledVitConfig, depth: int, is_gated: bool, *, rngs: nnx.Rngs):
        self.layers = nnx.List([VisionLayer(config, is_gated, rngs=rngs) for _ in range(depth)])

    def __call__(
        self, x: Float[Array, "i n d"], real: Int[Array, " i"]
    ) -> list[Float[Array, "i n d"]]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], real))
        return states


class TiledVit(nnx.Module):
    """`vision_model` of an mllama checkpoint."""

    def __init__(self, config: TiledVitConfig, *, rngs: nnx.Rngs):
        self.config = config
        patch = config.num_channels * config.patch_size**2
        width = config.hidden_size
        self.patch_embedding = linear(patch, width, ("patch", "vision_embed"), rngs=rngs)
        self.class_embedding = nnx.Param(
            nnx.initializers.normal(width**-0.5)(rngs.params(), (width,)), axes=("vision_embed",)
        )
        self.gated_positional_embedding = PositionEmbedding(config, rngs=rngs)
        self.pre_tile_positional_embedding = TileEmbedding(config, rngs=rngs)
        self.post_tile_positional_embedding = TileEmbedding(config, rngs=rngs)
        self.layernorm_pre = LayerNorm(width, OUTER_NORM_EPS)
        self.layernorm_post = LayerNorm(width, OUTER_NORM_EPS)
        self.transformer = VisionEncoder(config, config.num_hidden_layers, False, rngs=rngs)
        self.global_transformer = VisionEncoder(config, config.num_global_layers, True, rngs=rngs)

    def __call__(
        self,
        pixels: Float[Array, "i t c height width"],
        aspect_ratio_ids: Int[Array, " i"],
        aspect_ratio_mask: Bool[Array, "i t"],
        mode: VisionMode | None = None,
    ) -> Float[Array, "i t n out"]:
        """Features of every token of every tile: the last layer's channels, then — channel by
        channel — the intermediate layers' (`d0 of layer 3, d0 of layer 7, …, d1 of layer 3, …`).

        `mode` says which layers' states these are (None: as the config does).
        """
        config = self.config
        images, tiles, tokens = pixels.shape[0], config.max_num_tiles, config.tokens_per_tile
        padded = -(-tokens // 8) * 8

        x = self.patch_embedding(self._patches(pixels.astype(self.patch_embedding.kernel.dtype)))
        x = self.pre_tile_positional_embedding(x, aspect_ratio_ids)
        classes = jnp.broadcast_to(self.class_embedding[...], (images, tiles, 1, x.shape[-1]))
        x = jnp.concatenate([classes, x], axis=2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, aspect_ratio_ids))

        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))
        is_real = aspect_ratio_mask[:, :, None] & (jnp.arange(padded) < tokens)[None, None]
        is_real = is_real.reshape(images, tiles * padded)
        real = is_real.sum(axis=1, dtype=jnp.int32)
        # inside the layers padding comes last, so that their attention takes a length for a mask
        order = jnp.argsort(~is_real, axis=1, stable=True)
        places = jnp.argsort(order, axis=1)

        local = self.transformer(_rows(x.reshape(images, tiles * padded, -1), order), real)
        x = _rows(self.layernorm_post(local[-1]), places).reshape(images, tiles, padded, -1)
        x = self.post_tile_positional_embedding(x, aspect_ratio_ids)
        x = _rows(x.reshape(images, tiles * padded, -1), order)
        x = self.global_transformer(x, real)[-1]

        shift = 1 if (mode or config.vision_mode) == "hf" else 0
        between = [local[index + shift] for index in config.intermediate_layers_indices]
        x = jnp.concatenate([x, jnp.stack(between, axis=-1).reshape(*x.shape[:-1], -1)], axis=-1)
        return _rows(x, places).reshape(images, tiles, padded, -1)[:, :, :tokens]

    def _patches(self, pixels: Float[Array, "i t c height width"]) -> Float[Array, "i t g cpp"]:
        """Each patch flattened channel-first, the order of a torch convolution kernel."""
        images, tiles, channels, _, _ = pixels.shape
        grid, patch = self.config.grid, self.config.patch_size
        x = pixels.reshape(images, tiles, channels, grid, patch, grid, patch)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(images, tiles, grid * grid, channels * patch * patch)


def _rows(x: Float[Array, "i n d"], order: Int[Array, "i n"]) -> Float[Array, "i n d"]:
    return jnp.take_along_axis(x, order[:, :, None], axis=1)
