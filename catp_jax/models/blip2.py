"""BLIP-2: a ViT, a Q-Former whose queries read it, and a language model that reads the queries.

Source: Li et al., "BLIP-2", arXiv 2301.12597; Hugging Face transformers (`models/blip_2`).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import Attention, Evidence
from catp_jax.models.opt import Opt, OptConfig
from catp_jax.models.qformer import QFormerConfig
from catp_jax.models.querying import QueryingConfig, QueryingInputs, QueryingModel
from catp_jax.models.t5 import T5, T5Config
from catp_jax.models.vit import VitConfig
from catp_jax.struct import pytree


@dataclasses.dataclass(frozen=True)
class Blip2Config(QueryingConfig):
    """A BLIP-2 checkpoint's `config.json`, as far as it shapes the computation."""

    text: OptConfig | T5Config

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
class Blip2Inputs(QueryingInputs):
    """A batch for BLIP-2."""


class Blip2(QueryingModel):
    """`Blip2ForConditionalGeneration`. Each image is read once, whatever is asked about it."""

    config: Blip2Config
    language_model: Opt | T5

    def encode(
        self, pixels: Float[Array, "i c height width"]
    ) -> tuple[Float[Array, "i q d"], Evidence]:
        """The queries' last hidden states of every image, in float32, and how they came about."""
        image, vision = self.vision_model(pixels)
        queries = self.query_tokens[...].astype(jnp.float32)
        queries = jnp.broadcast_to(queries, (image.shape[0], *queries.shape[1:]))
        x, among, cross = self.qformer(queries, queries.shape[1], image)
        return x, Evidence(cross=cross, among=among, vision=vision)

    def read_images(self, inputs: Blip2Inputs) -> tuple[Float[Array, "b q d"], Evidence]:
        """The last hidden states of each prompt's queries, and how they came about."""
        visual, evidence = self.encode(jnp.asarray(inputs.pixels))
        index = jnp.asarray(inputs.image_index)

        def of_prompts(attention: Attention) -> Attention:
            return Attention(queries=attention.queries[index], keys=attention.keys[index])

        return visual[index], Evidence(
            cross=tuple(of_prompts(layer) for layer in evidence.cross),
            among=tuple(of_prompts(layer) for layer in evidence.among),
            vision=of_prompts(evidence.vision),
        )
