"""Attention, one function a case, and who computes it.

    attend          many rows, as a prefill has them
    attend_padded   a tower's tokens, of which the last are padding
    attend_blocks   one new token a row, over the blocks of a cache

    xla       any device and number type; the logits, in float32, go through memory
    cudnn     NVIDIA GPUs, 16-bit numbers, many rows; no array of rows × columns
    one_row   NVIDIA GPUs, 16-bit numbers, one row; if asked for

`cudnn` is taken where it is found and does not refuse. A program chooses as it is compiled for a
device: the same call is XLA's on a CPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.models import one_row
from catp_jax.models.blocks import LOWEST, Block, Read

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
    `scale` (None: 1/√d). A row whose mask is all False returns a mean of the values: its caller
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
            logits = jnp.where(mask[:, None, None], logits, LOWEST)
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

    JAX refuses gradients at an odd number of rows or columns: they are taken with one more, which
    nothing sees. With a mask that is so without gradients, too: an even one is what JAX tests.
    """
    given = Operands(queries, keys, values, mask, rows, columns)
    return _differentiable(given, scale)


class Operands(NamedTuple):
    """What `cudnn` computes with."""

    queries: Array
    keys: Array
    values: Array
    mask: Array | None = None
    rows: Array | None = None
    columns: Array | None = None


def _without_gradient(given: Operands, scale: float | None) -> Array:
    return _kernel(given, scale) if given.mask is None else _even(given, scale)


Back = Callable[[Array], tuple[Array, Array, Array]]
"""From the gradient of what comes out to those of queries, keys and values."""


def _with_gradient(given: Operands, scale: float | None) -> tuple[Array, Back]:
    def compute(queries: Array, keys: Array, values: Array) -> Array:
        return _even(given._replace(queries=queries, keys=keys, values=values), scale)

    return jax.vjp(compute, given.queries, given.keys, given.values)


def _gradient(scale: float | None, back: Back, of_out: Array) -> tuple[Operands]:
    return (Operands(*back(of_out)),)


_differentiable = jax.custom_vjp(_without_gradient, nondiff_argnums=(1,))
_differentiable.defvjp(_with_gradient, _gradient)


def _even(given: Operands, scale: float | None) -> Array:
    """The kernel, over one more row and column where their number is odd."""
    queries, keys, values, mask, rows, columns = given
    (batch, size), seen = queries.shape[:2], keys.shape[1]

    def padded(array: Array, *axes: int) -> Array:
        more = [(0, array.shape[n] % 2 if n in axes else 0) for n in range(array.ndim)]
        return jnp.pad(array, more)

    if mask is not None:
        mask = padded(mask, 1, 2)
    elif seen % 2 and columns is None:
        columns = jnp.full(batch, seen, jnp.int32)
    queries, keys, values = (padded(array, 1) for array in (queries, keys, values))
    return _kernel(Operands(queries, keys, values, mask, rows, columns), scale)[:, :size]


def _kernel(given: Operands, scale: float | None) -> Array:
    return jax.nn.dot_product_attention(
        given.queries,
        given.keys,
        given.values,
        mask=None if given.mask is None else given.mask[:, None],
        scale=scale,
        query_seq_lengths=given.rows,
        key_value_seq_lengths=given.columns,
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


def cudnn_refuses(
    queries: Float[Array, "b s h d"],
    keys: Float[Array, "b n kv d"],
) -> str | None:
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


def attend_blocks(
    queries: Float[Array, "r one h d"], reads: Sequence[Read], scale: float | None = None
) -> Float[Array, "r one h d"]:
    """One new token a row attends to several blocks: logits by block, one softmax, in float32.

    `r` is a multiple of a block's `b`: so many rows in succession read the same entry. `scale`
    multiplies the logits (None: 1/√d). A row that sees nothing gets a mean of the values: its
    caller drops it.
    """
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    by_products = functools.partial(_by_products, factor=factor)
    if one_row.refuses(queries, reads) is not None:
        return by_products(queries, reads)
    in_one_kernel = functools.partial(one_row.attend, scale=factor)
    return jax.lax.platform_dependent(queries, list(reads), cuda=in_one_kernel, default=by_products)


def _by_products(
    queries: Float[Array, "r one h d"], reads: Sequence[Read], factor: float
) -> Float[Array, "r one h d"]:
    rows, _, heads, channels = queries.shape
    logits = [_logits(queries, read, factor) for read in reads]
    if len(reads) == 1:  # a softmax that a GPU has in one kernel, which reads the logits once
        out = _summed(jax.nn.softmax(logits[0], axis=-1), reads[0].block)
        return out.astype(reads[0].block.values.dtype)[:, None]
    largest = [part.max(axis=-1).transpose(0, 2, 1, 3).reshape(rows, heads) for part in logits]
    top = jnp.stack(largest).max(axis=0)

    total = jnp.zeros((rows, heads), jnp.float32)
    out = jnp.zeros((rows, heads, channels), jnp.float32)
    for part, read in zip(logits, reads, strict=True):
        batch, kv, each, group, _ = part.shape
        highest = top.reshape(batch, each, kv, group).transpose(0, 2, 1, 3)
        weights = jnp.exp(part - highest[..., None])
        total += weights.sum(axis=-1).transpose(0, 2, 1, 3).reshape(rows, heads)
        out += _summed(weights, read.block)
    return (out / total[..., None]).astype(reads[0].block.values.dtype)[:, None]


def _summed(weights: Float[Array, "b kv each group slots"], block: Block) -> Float[Array, "r h d"]:
    """What rows take of a block's values, in float32."""
    batch, kv, each, group, _ = weights.shape
    summed = jnp.einsum(
        "bkmgn,bknd->bkmgd",
        weights.astype(block.values.dtype),
        block.values,
        preferred_element_type=jnp.float32,
    )
    if block.values_in is not None:
        summed = block.values_in.back(summed)
    return summed.transpose(0, 2, 1, 3, 4).reshape(batch * each, kv * group, -1)


def _logits(
    queries: Float[Array, "r one h d"], read: Read, scale: float
) -> Float[Array, "b kv each group slots"]:
    (rows, _, heads, channels), (batch, kv, slots, _) = queries.shape, read.block.keys.shape
    grouped = queries.reshape(batch, rows // batch, kv, heads // kv, channels)
    if read.block.keys_in is not None:
        grouped = jnp.swapaxes(read.block.keys_in.apply(jnp.swapaxes(grouped, 1, 2)), 1, 2)
    # the barrier keeps XLA from merging the products of two blocks, for which it transposes both,
    # and from writing out for all layers what they see alike
    grouped, keys, seen = jax.lax.optimization_barrier((grouped, read.block.keys, read.seen))
    logits = jnp.einsum("bmkgd,bknd->bkmgn", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits * scale
    if read.bias is not None:
        bias = read.bias.astype(jnp.float32).reshape(batch, -1, kv, heads // kv, slots)
        logits = logits + bias.transpose(0, 2, 1, 3, 4)
    seen = seen.reshape((batch, kv, 1, 1, slots) if seen.ndim == 3 else (batch, 1, -1, 1, slots))
    return jnp.where(seen, logits, LOWEST)
