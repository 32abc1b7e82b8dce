"""BLIP-2 for matching images and texts: which text belongs to which image.

    ITC  query states and the text's first state, projected, normalised: the best query's cosine
    ITM  queries and text go through the Q-Former together; a head says "fits not" or "fits"

ITC compares every image with every text at the cost of encoding each once; ITM reads a pair
together, which is slower and better.

Source: Li et al., "BLIP-2", arXiv 2301.12597, section 3.1; Hugging Face transformers
(`Blip2ForImageTextRetrieval`).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.models.layers import linear
from catp_jax.models.qformer import QFormer, QFormerConfig, TextEmbeddings
from catp_jax.models.vit import Vit, VitConfig


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """`config.json` of a `Blip2ForImageTextRetrieval`, as far as it shapes the computation."""

    vision: VitConfig
    qformer: QFormerConfig
    num_query_tokens: int
    image_text_hidden_size: int
    image_token_index: int | None

    @classmethod
    def itm_vit_g(cls) -> "RetrievalConfig":
        """blip2-itm-vit-g."""
        qformer = dataclasses.replace(
            QFormerConfig.blip2(), vocab_size=30523, use_qformer_text_input=True
        )
        return cls(VitConfig.eva_vit_g(), qformer, 32, 256, None)


class Blip2Retrieval(nnx.Module):
    """`Blip2ForImageTextRetrieval`."""

    def __init__(self, config: RetrievalConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, shared = config.qformer.hidden_size, config.image_text_hidden_size
        self.vision_model = Vit(config.vision, rngs=rngs)
        self.query_tokens = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, config.num_query_tokens, width)),
            axes=("one", "queries", "qformer_embed"),
        )
        self.embeddings = TextEmbeddings(config.qformer, rngs=rngs)
        self.qformer = QFormer(config.qformer, rngs=rngs)
        axes = ("qformer_embed", "shared")
        self.vision_projection = linear(width, shared, axes, bias=True, rngs=rngs)
        self.text_projection = linear(width, shared, axes, bias=True, rngs=rngs)
        self.itm_head = linear(width, 2, ("qformer_embed", "classes"), bias=True, rngs=rngs)

    def image_features(
        self, pixels: Float[Array, "i c height width"]
    ) -> Float[Array, "i q shared"]:
        """One unit vector for each query of each image."""
        image, _ = self.vision_model(pixels)
        queries = self._queries(image.shape[0])
        x, _, _ = self.qformer(queries, queries.shape[1], image)
        return _unit(self.vision_projection(x.astype(self._dtype)))

    def text_features(
        self, tokens: Int[Array, "t s"], valid: Bool[Array, "t s"]
    ) -> Float[Array, "t shared"]:
        """One unit vector for each text, padded on the right."""
        x, _, _ = self.qformer(self.embeddings(tokens), 0, None, valid)
        return _unit(self.text_projection(x[:, 0].astype(self._dtype)))

    def itc(
        self,
        pixels: Float[Array, "i c height width"],
        tokens: Int[Array, "t s"],
        valid: Bool[Array, "t s"],
    ) -> Float[Array, "i t"]:
        """Image-text contrastive scores: cosines from -1 to 1, of every image with every text."""
        similar = jnp.einsum(
            "iqd,td->iqt", self.image_features(pixels), self.text_features(tokens, valid)
        )
        return similar.max(axis=1)

    def itm(
        self,
        pixels: Float[Array, "i c height width"],
        tokens: Int[Array, "i s"],
        valid: Bool[Array, "i s"],
    ) -> Float[Array, "i two"]:
        """Image-text matching logits (fits not, fits) of each image with its own text."""
        return self.match(self.image_tokens(pixels), tokens, valid)

    def image_tokens(self, pixels: Float[Array, "i c height width"]) -> Float[Array, "i n d"]:
        """What `match` reads of an image, the same for all texts."""
        return self.vision_model(pixels)[0]

    def match(
        self,
        image: Float[Array, "i n d"],
        tokens: Int[Array, "i s"],
        valid: Bool[Array, "i s"],
    ) -> Float[Array, "i two"]:
        """`itm` from image tokens."""
        queries = self._queries(image.shape[0])
        number = queries.shape[1]
        x = jnp.concatenate([queries, self.embeddings(tokens)], axis=1)
        everything = jnp.concatenate([jnp.ones((valid.shape[0], number), bool), valid], axis=1)
        x, _, _ = self.qformer(x, number, image, everything)
        return self.itm_head(x[:, :number].astype(self._dtype)).mean(axis=1)

    @property
    def _dtype(self) -> jnp.dtype:
        return self.itm_head.kernel.dtype

    def _queries(self, images: int) -> Float[Array, "i q d"]:
        queries = self.query_tokens[...].astype(jnp.float32)
        return jnp.broadcast_to(queries, (images, *queries.shape[1:]))


def _unit(x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
