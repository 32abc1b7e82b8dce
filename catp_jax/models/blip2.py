"""BLIP-2: a ViT, a Q-Former whose queries read it, and a language model that reads the queries.

    pixels ─ vision_model ─ qformer ─ ENTRY ─ language_projection ─┐
    tokens ─ embedding ────────────────────────────────────────────┴─ language_model → logits
                                       └ views: the Q-Former's and the ViT's attention

The projected queries stand in front of the text, where Hugging Face has its image placeholders.
Kept ones close up: after pruning the language model sees a shorter sequence, with no gap in it.

Source: Li et al., "BLIP-2", arXiv 2301.12597; Hugging Face transformers (`models/blip_2`).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Attention, Evidence, Keep, Select, Site, View
from catp_jax.models.cache import Slots
from catp_jax.models.layers import linear
from catp_jax.models.opt import Opt, OptCache, OptConfig
from catp_jax.models.qformer import QFormer, QFormerConfig
from catp_jax.models.t5 import T5, T5Cache, T5Config
from catp_jax.models.vit import Vit, VitConfig
from catp_jax.struct import pytree


@dataclasses.dataclass(frozen=True)
class Blip2Config:
    """A BLIP-2 checkpoint's `config.json`, as far as it shapes the computation.

    `image_token_index` is the placeholder's token, None in checkpoints older than it.
    """

    vision: VitConfig
    qformer: QFormerConfig
    text: OptConfig | T5Config
    num_query_tokens: int
    image_token_index: int | None

    @classmethod
    def opt_2_7b(cls) -> "Blip2Config":
        """BLIP-2 opt-2.7b."""
        return cls(VitConfig.eva_vit_g(), QFormerConfig.blip2(), OptConfig.opt_2_7b(), 32, 50265)

    @classmethod
    def opt_6_7b(cls) -> "Blip2Config":
        """BLIP-2 opt-6.7b."""
        return dataclasses.replace(cls.opt_2_7b(), text=OptConfig.opt_6_7b())

    @classmethod
    def flan_t5_xl(cls) -> "Blip2Config":
        """BLIP-2 flan-t5-xl."""
        return cls(VitConfig.eva_vit_g(), QFormerConfig.blip2(), T5Config.flan_t5_xl(), 32, 32100)

    @classmethod
    def flan_t5_xxl(cls) -> "Blip2Config":
        """BLIP-2 flan-t5-xxl."""
        return dataclasses.replace(cls.flan_t5_xl(), text=T5Config.flan_t5_xxl())


@pytree
class Blip2Inputs:
    """Prompts padded to one length, on either side, and the images of the batch.

    `image_index` says which image each prompt (`b`) has; an image of several is encoded once.
    """

    pixels: Float[Array, "i c height width"]
    image_index: Int[Array, " b"]
    tokens: Int[Array, "b s"]
    token_valid: Bool[Array, "b s"]


@pytree
class Blip2Front:
    """The state of a prefill after the Q-Former; `visual` are the queries' last hidden states."""

    visual: Float[Array, "b q d"]
    tokens: Int[Array, "b s"]
    token_valid: Bool[Array, "b s"]
    view: View | None


class Blip2(nnx.Module):
    """`Blip2ForConditionalGeneration`."""

    def __init__(self, config: Blip2Config, *, rngs: nnx.Rngs):
        self.config = config
        text, width = config.text, config.qformer.hidden_size
        self.vision_model = Vit(config.vision, rngs=rngs)
        self.query_tokens = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, config.num_query_tokens, width)),
            axes=("one", "queries", "qformer_embed"),
        )
        self.qformer = QFormer(config.qformer, rngs=rngs)
        into = text.hidden_size if isinstance(text, OptConfig) else text.d_model
        axes = ("qformer_embed", "embed")
        self.language_projection = linear(width, into, axes, bias=True, rngs=rngs)
        self.language_model = (
            Opt(text, rngs=rngs) if isinstance(text, OptConfig) else T5(text, rngs=rngs)
        )

    @property
    def sites(self) -> frozenset[Site]:
        """Where this model can be pruned."""
        return self.language_model.sites | {Site.ENTRY}

    @property
    def dtype(self) -> jnp.dtype:
        """The number type of the language model, and so of its caches."""
        return self.language_projection.kernel.dtype

    def encode(
        self, pixels: Float[Array, "i c height width"]
    ) -> tuple[Float[Array, "i q d"], Evidence]:
        """The queries' last hidden states of every image, in float32, and how they came about."""
        image, vision = self.vision_model(pixels)
        queries = self.query_tokens[...].astype(jnp.float32)
        queries = jnp.broadcast_to(queries, (image.shape[0], *queries.shape[1:]))
        x, among, cross = self.qformer(queries, queries.shape[1], image)
        return x, Evidence(cross=cross, among=among, vision=vision)

    def front(self, inputs: Blip2Inputs) -> Blip2Front:
        """The prefill up to and including the Q-Former, before any pruning."""
        visual, evidence = self.encode(inputs.pixels)
        own = inputs.image_index

        def of_prompts(attention: Attention) -> Attention:
            return Attention(queries=attention.queries[own], keys=attention.keys[own])

        visual = visual[own]
        batch, number = visual.shape[:2]
        numbers = jnp.arange(number, dtype=jnp.int32)
        sees = jnp.broadcast_to(inputs.token_valid[:, :, None], (*inputs.token_valid.shape, number))
        view = View(
            site=Site.ENTRY,
            layer=0,
            num_visual=number,
            tokens=visual,
            attention=None,
            values=None,
            evidence=Evidence(
                cross=tuple(of_prompts(layer) for layer in evidence.cross),
                among=tuple(of_prompts(layer) for layer in evidence.among),
                vision=of_prompts(evidence.vision),
            ),
            numbers=jnp.broadcast_to(numbers, (batch, number)),
            valid=jnp.ones((batch, number), bool),
            sees=sees,
        )
        return Blip2Front(
            visual=visual, tokens=inputs.tokens, token_valid=inputs.token_valid, view=view
        )

    def back(
        self, front: Blip2Front, keep: Keep | None, select: Select, new_slots: int
    ) -> tuple[Float[Array, "b vocab"], OptCache | T5Cache]:
        """The language model on the kept queries and the text: logits of each prompt's next token,
        and a cache with room for `new_slots` tokens. `select` may prune further inside it.
        """
        x, slots, numbers = self._sequence(front, keep)
        num_visual = x.shape[1] - front.tokens.shape[1]
        return self.language_model.prefill(x, slots, numbers, num_visual, select, new_slots)

    def step(
        self, tokens: Int[Array, " b"], cache: OptCache | T5Cache
    ) -> tuple[Float[Array, "b vocab"], OptCache | T5Cache]:
        """Logits of the token after `tokens`, which take a cache slot."""
        return self.language_model.step(tokens, cache)  # type: ignore[arg-type]

    def __call__(
        self,
        inputs: Blip2Inputs,
        keep: Keep | None = None,
        decoder_tokens: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b rows vocab"]:
        """Logits of every row, nothing cached: for training and for comparison.

        With OPT, rows are the kept queries and the text; with T5 the `decoder_tokens`, which begin
        with the start token.
        """
        x, slots, _ = self._sequence(self.front(inputs), keep)
        if isinstance(self.language_model, Opt):
            return self.language_model(x, slots)
        if decoder_tokens is None:
            raise ValueError("a BLIP-2 with T5 wants decoder_tokens, the start token first")
        return self.language_model(x, slots, decoder_tokens)

    def _sequence(
        self, front: Blip2Front, keep: Keep | None
    ) -> tuple[Float[Array, "b n d"], Slots, Int[Array, "b n"]]:
        """What the language model reads: embedded queries and text, their slots, their numbers."""
        visual = front.visual
        batch, number = visual.shape[:2]
        numbers = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (batch, number))
        valid = jnp.ones((batch, number), bool)
        if keep is not None:
            visual, numbers, valid = keep.apply(visual), keep.apply(numbers), keep.valid
        visual = visual.astype(self.vision_model.post_layernorm.scale.dtype)
        text = self.language_model.embed(front.tokens)
        x = jnp.concatenate([self.language_projection(visual).astype(text.dtype), text], axis=1)
        valid = jnp.concatenate([valid, front.token_valid], axis=1)
        positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
        numbers = jnp.concatenate([numbers, jnp.full_like(front.tokens, -1)], axis=1)
        return x, Slots(positions=positions, valid=valid), jnp.where(valid, numbers, -1)
