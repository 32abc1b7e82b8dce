"""The few parts that all models share: projections, norms, activations, RoPE.

Parameters live in Flax NNX modules whose attribute paths are those of the Hugging Face checkpoint;
only the last word differs (`weight` becomes `kernel`, `scale` or `embedding`). Beside each kernel
stand the names of its axes, for whoever maps them to a mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activations by their Hugging Face name."""

HEADS = ("heads", "kv_heads", "vision_heads")
"""Axes that are made of attention heads, which belong together."""


def product(
    multiply: Callable[[Array], Array], rows: Float[Array, "*rows inputs"]
) -> Float[Array, "*rows outputs"]:
    """`multiply(rows)`, a product with a matrix. On a GPU a single row is doubled: its compiler
    would make a sum of products of one, and write what is in between.
    """
    if math.prod(rows.shape[:-1]) > 1:
        return multiply(rows)

    def doubled(rows: Array) -> Array:
        return multiply(jnp.concatenate([rows, rows], axis=-2))[..., :1, :]

    return jax.lax.platform_dependent(rows, cuda=doubled, default=multiply)


class Linear(nnx.Linear):
    """`x @ kernel (+ bias)`. A narrow kernel comes with `kernel_scale`, see `narrow`."""

    kernel_scale: Any  # nnx.Param, or None where the kernel is as wide as the activations

    def __call__(
        self, inputs: Float[Array, "*rows inputs"], out_sharding: Any = None
    ) -> Float[Array, "*rows outputs"]:
        return product(super().__call__ if self.kernel_scale is None else self._widened, inputs)

    def _widened(self, inputs: Array) -> Array:
        # float32 until it is scaled: float16 would overflow
        kernel = self.kernel[...].astype(inputs.dtype)
        out = jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)
        out = (out * _last_axis(self.kernel_scale, out)).astype(inputs.dtype)
        return out if self.bias is None else out + _last_axis(self.bias, out)


def linear(
    inputs: int,
    outputs: int,
    axes: tuple[str, str],
    *,
    rngs: nnx.Rngs,
    bias: bool = False,
    heads: int | None = None,
) -> Linear:
    """`x @ kernel (+ bias)`; `axes` names the kernel's input and output axis. One of `HEADS` has
    room for `heads` of them.
    """
    made = Linear(
        inputs,
        outputs,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"axes": axes, "heads": heads},
        bias_metadata={"axes": axes[1:], "heads": heads},
        rngs=rngs,
    )
    made.kernel_scale = nnx.data(None)
    return made


def embedding(
    rows: int, features: int, *, rngs: nnx.Rngs, axes: tuple[str, str] = ("rows", "channels")
) -> nnx.Embed:
    """A table looked up by row; what comes out has the table's dtype."""
    table = nnx.Embed(
        rows,
        features,
        embedding_init=nnx.initializers.normal(0.02),
        embedding_metadata={"axes": axes},
        rngs=rngs,
    )
    table.dtype = None  # else the dtype it was made with, and bfloat16 weights become float32
    return table


class VisionMlp(nnx.Module):
    """The feed-forward part of a vision tower's layer."""

    def __init__(self, width: int, inner: int, activation: str, *, rngs: nnx.Rngs):
        self.fc1 = linear(width, inner, ("vision_embed", "mlp"), bias=True, rngs=rngs)
        self.fc2 = linear(inner, width, ("mlp", "vision_embed"), bias=True, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "i n d"]) -> Float[Array, "i n d"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class RmsNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32; scaled in the scale's dtype."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features), axes=("norm",))

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        wide = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(square + self.epsilon)).astype(self.scale.dtype)
        return normed * _last_axis(self.scale, x)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(features), axes=("norm",))

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        scale, bias = (_last_axis(p, x).astype(jnp.float32) for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


def _last_axis(parameter: nnx.Param[Array], x: Float[Array, "*rows d"]) -> Float[Array, "*ones d"]:
    return parameter[...].reshape((1,) * (x.ndim - 1) + (-1,))


def gate(initial: float) -> nnx.Param[Array]:
    """A learned scalar that multiplies a branch through tanh."""
    return nnx.Param(jnp.full((1,), initial), axes=("gate",))


def split_heads(x: Float[Array, "b s width"], heads: int) -> Float[Array, "b s heads d"]:
    """Splits the last axis into heads."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "b s heads d"]) -> Float[Array, "b s width"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretching of the long RoPE wavelengths (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base, and how its frequencies are scaled (None: not at all)."""

    theta: float
    scaling: Llama3Scaling | None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Angle per position of each of the `head_dim / 2` channel pairs, float32."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = np.float32(1) / np.float32(self.theta) ** exponents
        if (scaling := self.scaling) is None:
            return frequencies
        wavelengths = 2 * math.pi / frequencies
        turns = scaling.original_max_position_embeddings / wavelengths
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - share) * frequencies / scaling.factor + share * frequencies).astype(np.float32)


def rope_angles(
    positions: Int[Array, "b s"], config: RopeConfig, head_dim: int
) -> tuple[Float[Array, "b s d"], Float[Array, "b s d"]]:
    """Cosine and sine for `rotate`, in float32, both halves of the head alike."""
    frequencies = jnp.asarray(config.frequencies(head_dim))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b s h d"], cos: Float[Array, "b s d"], sin: Float[Array, "b s d"]
) -> Float[Array, "b s h d"]:
    """Applies RoPE in Hugging Face's half-split form (channel i pairs with i + d/2)."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (a.astype(x.dtype)[:, :, None, :] for a in (cos, sin))
    return x * cos + rotated * sin
