"""BLIP-2's image encoder: EVA's ViT-g, a plain pre-norm vision transformer.

Source: Li et al., "BLIP-2", arXiv 2301.12597; Hugging Face transformers (`models/blip_2`).
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from catp_jax.contract import Attention
from catp_jax.models.attention import attend, scaled
from catp_jax.models.layers import (
    LayerNorm,
    VisionMlp,
    linear,
    merge_heads,
    split_heads,
)


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """`vision_config` of a BLIP-2 checkpoint."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    qkv_bias: bool

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return self.grid**2 + 1

    @classmethod
    def eva_vit_g(cls) -> "VitConfig":
        """The encoder of all BLIP-2 checkpoints."""
        return cls(
            hidden_size=1408,
            intermediate_size=6144,
            num_hidden_layers=39,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            qkv_bias=True,
        )


class VitEmbeddings(nnx.Module):
    """Patches, a class token before them, and their positions."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.hidden_size, 3 * config.patch_size**2
        draw = nnx.initializers.normal(0.02)
        self.class_embedding = nnx.Param(
            draw(rngs.params(), (1, 1, width)), axes=("one", "one", "vision_embed")
        )
        self.patch_embedding = linear(patch, width, ("patch", "vision_embed"), bias=True, rngs=rngs)
        self.position_embedding = nnx.Param(
            draw(rngs.params(), (1, config.tokens, width)), axes=("one", "tokens", "vision_embed")
        )

    def __call__(self, pixels: Float[Array, "i c height width"]) -> Float[Array, "i n d"]:
        grid, patch = self.config.grid, self.config.patch_size
        x = pixels.astype(self.patch_embedding.kernel.dtype)
        images, channels = x.shape[:2]
        # each patch flattened channel first, the order of a torch convolution kernel
        x = x.reshape(images, channels, grid, patch, grid, patch).transpose(0, 2, 4, 1, 3, 5)
        x = self.patch_embedding(x.reshape(images, grid * grid, -1))
        classes = jnp.broadcast_to(self.class_embedding[...], (images, 1, x.shape[-1]))
        return jnp.concatenate([classes.astype(x.dtype), x], axis=1) + self.position_embedding[...]


class VitAttention(nnx.Module):
    """Self-attention with queries, keys and values from one projection."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        axes = ("vision_embed", "qkv", "vision_heads")
        # side by side and not one after the other, so that heads can be split over devices
        self.qkv = nnx.LinearGeneral(
            width,
            (3, width),
            use_bias=config.qkv_bias,
            kernel_init=nnx.initializers.normal(0.02),
            kernel_metadata={"axes": axes, "heads": self.heads},
            bias_metadata={"axes": axes[1:], "heads": self.heads},
            rngs=rngs,
        )
        axes, heads = ("vision_heads", "vision_embed"), self.heads
        self.projection = linear(width, width, axes, bias=True, heads=heads, rngs=rngs)

    def __call__(self, x: Float[Array, "i n d"]) -> tuple[Float[Array, "i n d"], Attention]:
        x = self.qkv(x)
        queries, keys, values = (split_heads(x[:, :, part], self.heads) for part in range(3))
        attended = self.projection(merge_heads(attend(queries, keys, values, None)))
        return attended, Attention(queries=scaled(queries), keys=keys)


class VitLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.self_attn = VitAttention(config, rngs=rngs)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        width, inner = config.hidden_size, config.intermediate_size
        self.mlp = VisionMlp(width, inner, config.hidden_act, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: Float[Array, "i n d"]) -> tuple[Float[Array, "i n d"], Attention]:
        attended, attention = self.self_attn(self.layer_norm1(x))
        x = x + attended
        return x + self.mlp(self.layer_norm2(x)), attention


class VitEncoder(nnx.Module):
    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        depth = config.num_hidden_layers
        self.layers = nnx.List([VitLayer(config, rngs=rngs) for _ in range(depth)])


class Vit(nnx.Module):
    """`vision_model` of a BLIP-2 checkpoint."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = VitEmbeddings(config, rngs=rngs)
        self.encoder = VitEncoder(config, rngs=rngs)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, pixels: Float[Array, "i c height width"]
    ) -> tuple[Float[Array, "i n d"], Attention]:
        """Image tokens, the class token first, and the last layer's attention."""
        x = self.embeddings(pixels)
        attention = None
        for layer in self.encoder.layers:
            x, attention = layer(x)
        if attention is None:
            raise ValueError("an image encoder has at least one layer")
        return self.post_layernorm(x), attention
