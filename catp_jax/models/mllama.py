"""Llama 3.2 Vision: a tiled ViT, a projector, and a decoder that cross-attends to its features.

    pixels ─ vision_model ─ multi_modal_projector ─ drop padding tiles ─┐
    tokens ─────────────────────────────────────────── language_model ──┴── lm_head → logits

Images are processed once each, whatever prompt they belong to: `Inputs.pixels` has one entry per
image of the batch, and `tile_index` tells each prompt which of their tiles are its own.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Room, Select, Site, Tiles, keep_at
from catp_jax.models.cache import Slots
from catp_jax.models.cross_decoder import (
    CrossCache,
    CrossDecoder,
    CrossDecoderConfig,
    Front,
    MaskMode,
    Visual,
)
from catp_jax.models.layers import linear
from catp_jax.models.tiled_vit import TiledVit, TiledVitConfig, VisionMode
from catp_jax.struct import AnyArray, pytree, replace, static


@dataclasses.dataclass(frozen=True)
class MllamaConfig:
    """An mllama checkpoint's `config.json`, as far as it shapes the computation."""

    vision: TiledVitConfig
    text: CrossDecoderConfig
    image_token_index: int

    @classmethod
    def llama_3_2_11b(cls) -> "MllamaConfig":
        """Llama 3.2 11B Vision."""
        return cls(TiledVitConfig.llama_3_2(), CrossDecoderConfig.llama_3_2_11b(), 128256)

    @classmethod
    def llama_3_2_90b(cls) -> "MllamaConfig":
        """Llama 3.2 90B Vision."""
        return cls(TiledVitConfig.llama_3_2(), CrossDecoderConfig.llama_3_2_90b(), 128256)


@pytree
class Images:
    """The images of a batch (`i`) and which of their tiles each prompt (`b`) has.

    `tile_index` counts through all images' tiles, `image * max_num_tiles + tile`. A prompt's own
    tiles come first (`tile_valid`); `tile_seen` says which text rows see them. `vision_mode` says
    which of the tower's states are read (None: as the config does).
    """

    vision_mode: VisionMode | None = static(default=None)

    pixels: Float[AnyArray, "i t c height width"]
    aspect_ratio_ids: Int[AnyArray, " i"]
    aspect_ratio_mask: Bool[AnyArray, "i t"]
    tile_index: Int[AnyArray, "b tiles"]
    tile_valid: Bool[AnyArray, "b tiles"]
    tile_seen: Bool[AnyArray, "b s tiles"]


@pytree
class Inputs:
    """Prompts padded on the right to one length, and their images (None: no prompt has one).

    `mask_mode` says what text does that sees no image.
    """

    mask_mode: MaskMode = static(default="meta")
    tokens: Int[AnyArray, "b s"]
    token_valid: Bool[AnyArray, "b s"]
    images: Images | None

    def before(self, place: Int[Array, "b one"]) -> "Inputs":
        """The prompts up to this place, which is not among them, and sees nothing."""
        is_before = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None] < place
        images = self.images
        if images is not None:
            images = replace(images, tile_seen=images.tile_seen & is_before[:, :, None])
        return replace(self, token_valid=self.token_valid & is_before, images=images)


class Mllama(nnx.Module):
    """`MllamaForConditionalGeneration`."""

    sites: ClassVar[frozenset[Site]] = frozenset({Site.CROSS, Site.CACHE, Site.READ})

    def __init__(self, config: MllamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.text.hidden_size
        self.vision_model = TiledVit(config.vision, rngs=rngs)
        self.multi_modal_projector = linear(
            config.vision.output_size, width, ("vision_out", "embed"), bias=True, rngs=rngs
        )
        self.language_model = CrossDecoder(config.text, rngs=rngs)
        self.lm_head = linear(width, config.text.vocab_size, ("embed", "vocab"), rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The number type of the language model, and so of its caches."""
        return self.language_model.embed_tokens.embedding.dtype

    def encode(self, images: Images) -> Visual:
        """Visual tokens of every prompt.

        Rows of padding tiles are dropped here, which changes nothing: cross-attention masks them.
        """
        per_tile, grid = self.config.vision.tokens_per_tile, self.config.vision.grid
        features = self.vision_model(
            jnp.asarray(images.pixels),
            jnp.asarray(images.aspect_ratio_ids),
            jnp.asarray(images.aspect_ratio_mask),
            images.vision_mode,
        )
        features = features.reshape(-1, *features.shape[2:])[images.tile_index]
        batch, tiles = images.tile_index.shape
        numbers = jnp.arange(tiles * per_tile, dtype=jnp.int32)
        return Visual(
            features=self.multi_modal_projector(features).reshape(batch, tiles * per_tile, -1),
            slots=Slots(
                positions=jnp.broadcast_to(numbers, (batch, tiles * per_tile)),
                valid=jnp.repeat(images.tile_valid, per_tile, axis=1),
            ),
            sees=jnp.repeat(images.tile_seen, per_tile, axis=2),
            tiles=Tiles(rows=grid, columns=grid, others=per_tile - grid**2),
        )

    def front(self, inputs: Inputs) -> Front:
        """The prefill up to and including the first cross-attention layer, before any pruning."""
        visual = None if inputs.images is None else self.encode(inputs.images)
        tokens = jnp.asarray(inputs.tokens)
        numbers = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        text = Slots(
            positions=jnp.broadcast_to(numbers, tokens.shape),
            valid=jnp.asarray(inputs.token_valid),
        )
        return self.language_model.front(tokens, text, visual, inputs.mask_mode)

    def back(
        self, front: Front, select: Select, room: Room
    ) -> tuple[Float[Array, "b vocab"], CrossCache]:
        """The rest of the prefill on the kept features: logits of each prompt's next token."""
        hidden, cache = self.language_model.back(front, select, room)
        last = jnp.maximum(cache.tail.next_position - 1, 0)[:, None, None]
        return self.lm_head(jnp.take_along_axis(hidden, last, axis=1)[:, 0]), cache

    def step(
        self, tokens: Int[Array, " r"], cache: CrossCache, select: Select
    ) -> tuple[Float[Array, "r vocab"], CrossCache]:
        """Logits of the token after `tokens`, which take a cache slot."""
        hidden, cache = self.language_model.step(tokens, cache, select)
        return self.lm_head(hidden), cache

    def __call__(self, inputs: Inputs, keep: Keep | None = None) -> Float[Array, "b s vocab"]:
        """Logits of every row, nothing cached: for training and for comparison."""
        select = keep_at(Site.CROSS, keep)
        hidden, _ = self.language_model.back(self.front(inputs), select, Room(new=0))
        return self.lm_head(hidden)
