"""What BLIP-2 and InstructBLIP share: queries read an image, a language model reads the queries.

    pixels ─ vision_model ─ qformer ─ ENTRY ─ language_projection ─┐
    tokens ─ embedding ────────────────────────────────────────────┴─ language_model → logits
                                       └ views: the Q-Former's and the ViT's attention

The projected queries stand in front of the text, where Hugging Face has its image placeholders.
Kept ones close up: after pruning the language model sees a shorter sequence, with no gap in it.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Evidence, Keep, Room, Select, Site, View
from catp_jax.models.cache import Slots
from catp_jax.models.decoder import DecoderCache
from catp_jax.models.layers import linear
from catp_jax.models.llama import Llama, LlamaConfig
from catp_jax.models.opt import Opt, OptConfig
from catp_jax.models.qformer import QFormer, QFormerConfig
from catp_jax.models.t5 import T5, T5Cache, T5Config
from catp_jax.models.vit import Vit, VitConfig
from catp_jax.struct import AnyArray, pytree, replace

LANGUAGE_MODELS: dict[type, type[Opt] | type[T5] | type[Llama]] = {
    OptConfig: Opt,
    T5Config: T5,
    LlamaConfig: Llama,
}
"""By the type of the configuration's `text`."""


@dataclasses.dataclass(frozen=True)
class QueryingConfig:
    """A checkpoint's `config.json`, as far as it shapes the computation.

    `image_token_index` is the placeholder's token, None in checkpoints older than it.
    """

    vision: VitConfig
    qformer: QFormerConfig
    text: OptConfig | T5Config | LlamaConfig
    num_query_tokens: int
    image_token_index: int | None


@pytree
class QueryingInputs:
    """Prompts padded to one length, on either side, and the images of the batch.

    `image_index` says which image each prompt (`b`) has; an image of several is encoded once.
    `begun` are the tokens that a decoder's answers begin with, -1 behind them.
    """

    pixels: Float[AnyArray, "i c height width"]
    image_index: Int[AnyArray, " b"]
    tokens: Int[AnyArray, "b s"]
    token_valid: Bool[AnyArray, "b s"]
    begun: Int[AnyArray, "b begun"] | None = None

    def before(self, place: Int[Array, "b one"]) -> Any:
        """The prompts up to this place, which is not among them."""
        places = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        return replace(self, token_valid=self.token_valid & (places < place))

    def alone(self, row: int) -> Any:
        """One prompt and its image."""
        prompt = jax.tree.map(lambda array: array[row : row + 1], self)
        pixels = self.pixels[self.image_index[row]][None]
        return replace(prompt, pixels=pixels, image_index=jnp.zeros(1, jnp.int32))


@pytree
class QueryingFront:
    """The state of a prefill after the Q-Former; `visual` are the queries' last hidden states."""

    visual: Float[Array, "b q d"]
    tokens: Int[Array, "b s"]
    token_valid: Bool[Array, "b s"]
    begun: Int[Array, "b begun"] | None
    view: View | None


class QueryingModel(nnx.Module):
    """The whole model but for the way that a prompt's queries come about."""

    language_model: Any  # one of LANGUAGE_MODELS

    def __init__(self, config: QueryingConfig, *, rngs: nnx.Rngs):
        self.config = config
        text, width = config.text, config.qformer.hidden_size
        self.vision_model = Vit(config.vision, rngs=rngs)
        self.query_tokens = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, config.num_query_tokens, width)),
            axes=("one", "queries", "qformer_embed"),
        )
        self.qformer = QFormer(config.qformer, rngs=rngs)
        axes = ("qformer_out", "embed")
        self.language_projection = linear(width, text.hidden_size, axes, bias=True, rngs=rngs)
        language_model: Any = LANGUAGE_MODELS[type(text)]
        self.language_model = language_model(text, rngs=rngs)

    @abc.abstractmethod
    def read_images(self, inputs: Any) -> tuple[Float[Array, "b q d"], Evidence]:
        """The last hidden states of each prompt's queries, and how they came about."""

    @property
    def sites(self) -> frozenset[Site]:
        """Where this model can be pruned."""
        return self.language_model.sites | {Site.ENTRY}

    @property
    def dtype(self) -> jnp.dtype:
        """The number type of the language model, and so of its caches."""
        return self.language_projection.kernel.dtype

    def front(self, inputs: Any) -> QueryingFront:
        """The prefill up to and including the Q-Former, before any pruning."""
        visual, evidence = self.read_images(inputs)
        batch, number = visual.shape[:2]
        numbers = jnp.arange(number, dtype=jnp.int32)
        tokens, token_valid = jnp.asarray(inputs.tokens), jnp.asarray(inputs.token_valid)
        sees = jnp.broadcast_to(token_valid[:, :, None], (*token_valid.shape, number))
        view = View(
            site=Site.ENTRY,
            layer=0,
            num_visual=number,
            tokens=visual,
            evidence=evidence,
            numbers=jnp.broadcast_to(numbers, (batch, number)),
            valid=jnp.ones((batch, number), bool),
            sees=sees,
        )
        begun = None if inputs.begun is None else jnp.asarray(inputs.begun)
        return QueryingFront(
            visual=visual, tokens=tokens, token_valid=token_valid, begun=begun, view=view
        )

    def back(
        self, front: QueryingFront, select: Select, room: Room
    ) -> tuple[Float[Array, "b vocab"], DecoderCache | T5Cache]:
        """The language model on the kept queries and the text: logits of each prompt's next token,
        and a cache with `room` for new tokens. `select` may prune further inside it.
        """
        x, slots, numbers = self.sequence(front, select(front.view).tokens)
        num_visual = x.shape[1] - front.tokens.shape[1]
        begun = {} if front.begun is None else {"begun": front.begun}  # with a T5
        return self.language_model.prefill(x, slots, numbers, num_visual, select, room, **begun)

    def step(
        self, tokens: Int[Array, " b"], cache: DecoderCache | T5Cache, select: Select
    ) -> tuple[Float[Array, "b vocab"], DecoderCache | T5Cache]:
        """Logits of the token after `tokens`, which take a cache slot."""
        return self.language_model.step(tokens, cache, select)

    def __call__(
        self,
        inputs: Any,
        keep: Keep | None = None,
        decoder_tokens: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b rows vocab"]:
        """Logits of every row, nothing cached: for training and for comparison.

        Rows are the kept queries and the text; with T5 the `decoder_tokens`, which begin with the
        start token.
        """
        return self.rows(self.front(inputs), keep, decoder_tokens)

    def rows(
        self,
        front: QueryingFront,
        keep: Keep | None = None,
        decoder_tokens: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b rows vocab"]:
        """The same from the state of a prefill."""
        x, slots, _ = self.sequence(front, keep)
        if not isinstance(self.language_model, T5):
            return self.language_model(x, slots)
        if decoder_tokens is None:
            raise ValueError("a model with T5 wants decoder_tokens, the start token first")
        return self.language_model(x, slots, decoder_tokens)

    def sequence(
        self, front: QueryingFront, keep: Keep | None
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
