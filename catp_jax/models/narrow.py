"""Weights of 8 bits: a decode step reads half as many bytes of them as in bfloat16.

    kernel [inputs, outputs]  ≈  narrow kernel [inputs, outputs] × kernel_scale [outputs]

Each output channel has its own scale, so that its largest weight is the largest number there is.
Products are of the activations' number type; the scale multiplies what comes out. The language
model's layers are narrowed: what a step reads. Its head, embeddings, norms, and all that reads
images (vision tower, Q-Former, projections) stay as they are.
"""

import functools
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from catp_jax.models.layers import Linear

Weights = Literal["int8", "float8"]
"""int8: rounded to 255 even steps. float8: `e4m3`, of three bits of fraction."""

DTYPES = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}
LARGEST = {"int8": 127.0, "float8": 448.0}
SCALE = "kernel_scale"


def check(weights: str | None) -> None:
    """Raises ValueError if weights cannot be of that kind; None: as they are."""
    if weights not in (None, *get_args(Weights)):
        raise ValueError(
            f"weights is {' or '.join(map(repr, get_args(Weights)))}, or None for weights as "
            f"dtype has them; got {weights!r}"
        )


def narrow(
    kernel: Float[Array, "inputs outputs"], weights: Weights
) -> tuple[Shaped[Array, "inputs outputs"], Float[Array, " outputs"]]:
    """The narrow kernel and its scales, on the kernel's devices."""
    out = None
    if isinstance(kernel.sharding, NamedSharding):
        spec = PartitionSpec(*(*kernel.sharding.spec, None, None)[1:2])
        out = (kernel.sharding, NamedSharding(kernel.sharding.mesh, spec))
    return _program(weights, out)(kernel)


@functools.cache
def _program(weights: Weights, out: Any) -> Any:
    return jax.jit(functools.partial(_narrow, weights=weights), out_shardings=out)


def _narrow(kernel: Array, weights: Weights) -> tuple[Array, Array]:
    wide = kernel.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=0)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST[weights]
    scaled = wide / scale[None]
    return (jnp.round(scaled) if weights == "int8" else scaled).astype(DTYPES[weights]), scale


def is_narrowed(parameter: str) -> bool:
    """Whether a parameter, by its name, is a kernel that is narrowed."""
    *path, last = parameter.split(".")
    return last == "kernel" and path[0] == "language_model" and path[-1] != "lm_head"


def narrow_type(arrays: Iterable[Any]) -> str | None:
    """What kind of narrow weights are among a model's arrays; None: there are none."""
    kinds = {str(jnp.dtype(DTYPES[name])): name for name in DTYPES}
    return next((kinds[str(x.dtype)] for x in arrays if str(x.dtype) in kinds), None)


def with_scales(model: Any, weights: Weights) -> Any:
    """An abstract model whose narrowed kernels are of 8 bits, with scales beside them."""
    linears: list[tuple[Any, Any]] = [
        (path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Linear)
    ]
    for path, module in linears:
        if is_narrowed(".".join(map(str, (*path, "kernel")))):
            metadata, shape = module.kernel.get_metadata(), module.kernel.shape
            module.kernel = module.kernel.replace(jax.ShapeDtypeStruct(shape, DTYPES[weights]))
            scale = jax.ShapeDtypeStruct(shape[1:], jnp.float32)
            axes = {"axes": metadata["axes"][1:], "heads": metadata.get("heads")}
            module.kernel_scale = nnx.Param(scale, **axes)
    return model
