"""Attention of many rows at once, as a prefill has it: one function a case, and who computes it.

    xla     any device and number type; the logits, in float32, go through memory
    cudnn   NVIDIA GPUs, 16-bit numbers; no array of rows × columns

`cudnn` is taken where it is found and does not refuse. A program chooses as it is compiled for a
device: the same call is XLA's on a CPU. (One new token a row is another matter: `cache`.)
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

USE_CUDNN = True
"""False, before a program is compiled: XLA computes all attention."""

LOGITS_AT_ONCE = 2**27
"""Attention logits that exist at one time (512 MiB in float32); more rows go block by block."""


def scaled(queries: Float[Array, "b s h d"]) -> Float[Array, "b s h d"]:
    """Queries as `contract.Attention` has them: over √d, in float32."""
    return queries.astype(jnp.float32) * queries.shape[-1] ** -0.5


def attend(
    queries: Float[Array, "b s h d"],
    keys: Float[Array, "b n kv d"],
    values: Float[Array, "b n kv d"],
    mask: Bool[Array, "b s n"] | None,
    bias: Float[Array, "#b h s n"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """Dot-product attention, softmax in float32; `kv` divides `h` (grouped queries).

    `mask` None: every row sees every column. `bias` is added to the logits, which are multiplied by
    `scale` (None: 1/√d). A row whose mask is all False returns the mean of the values: its caller
    drops it.
    """
    if bias is not None or cudnn_refuses(queries, keys) is not None:
        return xla(queries, keys, values, mask, bias, scale)
    return jax.lax.platform_dependent(
        queries,
        keys,
        values,
        mask,
        cuda=functools.partial(cudnn, scale=scale),
        default=functools.partial(xla, scale=scale),
    )


def attend_padded(
    queries: Float[Array, "b n h d"],
    keys: Float[Array, "b n h d"],
    values: Float[Array, "b n h d"],
    real: Int[Array, " b"],
) -> Float[Array, "b n h d"]:
    """Attention among tokens of which those from `real` on are padding, in the way of Llama 3.2
    Vision's tower: what is real attends to everything, padding to what is real.

            columns  real  padding
    rows    real      ▒▒     ▒▒
            padding   ▒▒
    """
    if cudnn_refuses(queries, keys) is not None:
        return _xla_padded(queries, keys, values, real)
    return jax.lax.platform_dependent(
        queries, keys, values, real, cuda=_cudnn_padded, default=_xla_padded
    )


def xla(
    queries: Float[Array, "b s h d"],
    keys: Float[Array, "b n kv d"],
    values: Float[Array, "b n kv d"],
    mask: Bool[Array, "b s n"] | None,
    bias: Float[Array, "#b h s n"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """`attend` on any device: logits go through memory, of some rows at a time."""
    batch, rows, heads, channels = queries.shape
    kv, factor = keys.shape[2], channels**-0.5 if scale is None else scale
    turned_keys, turned_values = _heads_first(keys, values)

    def attend_some(queries: Array, mask: Array | None, bias: Array | None) -> Array:
        (turned,) = _heads_first(queries)
        grouped = turned.reshape(batch, kv, heads // kv, -1, channels)
        logits = jnp.einsum(
            "bkgsd,bknd->bkgsn", grouped, turned_keys, preferred_element_type=jnp.float32
        )
        logits = logits * factor
        if bias is not None:
            bias = bias.astype(jnp.float32)
            logits += bias.reshape(bias.shape[0], kv, heads // kv, *bias.shape[2:])
        if mask is not None:
            # finite, so that a row that sees nothing is no NaN
            lowest = -0.7 * jnp.finfo(jnp.float32).max
            logits = jnp.where(mask[:, None, None], logits, lowest)
        weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
        summed = jnp.einsum("bkgsn,bknd->bkgsd", weights, turned_values)
        return jnp.swapaxes(summed.reshape(turned.shape), 1, 2)

    block = max(LOGITS_AT_ONCE // (batch * heads * keys.shape[1]), 1)
    if rows <= block:
        return attend_some(queries, mask, bias)

    def blocks(x: Array | None, axis: int = 1) -> Array | None:
        if x is None:
            return None
        padding = [(0, -rows % block if number == axis else 0) for number in range(x.ndim)]
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    parts = (blocks(queries), blocks(mask), blocks(bias, axis=2))
    out = jax.lax.map(lambda some: attend_some(*some), parts)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *queries.shape[2:])[:, :rows]


def _heads_first(*arrays: Float[Array, "b s h d"]) -> list[Float[Array, "b h s d"]]:
    """Heads before rows; on a CPU in memory, too, where XLA's products of strided matrices take
    twice the time.
    """
    return jax.lax.platform_dependent(
        [jnp.swapaxes(array, 1, 2) for array in arrays],
        cpu=jax.lax.optimization_barrier,
        default=lambda arrays: arrays,
    )


def _xla_padded(queries: Array, keys: Array, values: Array, real: Array) -> Array:
    is_real = jnp.arange(queries.shape[1], dtype=jnp.int32)[None] < real[:, None]
    return xla(queries, keys, values, is_real[:, :, None] | is_real[:, None])


def cudnn(
    queries: Float[Array, "b s h d"],
    keys: Float[Array, "b n kv d"],
    values: Float[Array, "b n kv d"],
    mask: Bool[Array, "b s n"] | None = None,
    rows: Int[Array, " b"] | None = None,
    columns: Int[Array, " b"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """`attend` in one kernel, over the first `columns`; what it gives after the first `rows` is not
    to be read.
    """
    return jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        mask=None if mask is None else mask[:, None],
        scale=scale,
        query_seq_lengths=rows,
        key_value_seq_lengths=columns,
        implementation="cudnn",
    )


def _cudnn_padded(queries: Array, keys: Array, values: Array, real: Array) -> Array:
    size = queries.shape[1]
    # the kernel stops early at the last row that is wanted, so padding comes first in the second
    # call; lengths of nothing are not asked for
    everything = jnp.maximum(real, size)  # split over devices as `real` is, which a constant is not
    at_least = jnp.maximum(real, 1)
    seen = cudnn(queries, keys, values, rows=at_least, columns=everything)
    rest = jnp.maximum(size - real, 1)
    padding = cudnn(queries[:, ::-1], keys, values, rows=rest, columns=at_least)
    is_real = jnp.arange(size, dtype=jnp.int32)[None] < real[:, None]
    return jnp.where(is_real[:, :, None, None], seen, padding[:, ::-1])


def cudnn_refuses(queries: Float[Array, "b s h d"], keys: Float[Array, "b n kv d"]) -> str | None:
    """Why cuDNN does not compute this attention; None: it does, on a GPU."""
    if not USE_CUDNN:
        return "USE_CUDNN is False"
    if queries.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its numbers have 16 bits, these are {queries.dtype}"
    mesh = jax.sharding.get_abstract_mesh()
    if queries.shape[2] != keys.shape[2] and dict(mesh.shape).get("group", 1) > 1:
        return "the mesh splits the queries of a key-value head over several devices"
    return _cudnn_lacks(queries.shape[-1])


@functools.cache
def _cudnn_lacks(channels: int) -> str | None:
    some = jax.ShapeDtypeStruct((1, 8, 1, channels), jnp.bfloat16)
    try:
        jax.eval_shape(cudnn, some, some, some)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return None
