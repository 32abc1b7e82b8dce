"""Attention of one new token a row in one kernel, which reads a cache's blocks where they lie.

    a program   all rows of a prompt × the query heads of one key-value head
                × its slots in every block, or a part of them

Logits and weights stay in registers; where slots are divided, each part leaves its sum, its largest
logit and its total, which are merged. XLA writes the logits in float32 and reads them, then writes
and reads the weights: of Llama's images a tenth of the cache again, with five beams half of it.

Off unless `USE_KERNEL` is set: it was compiled for GPUs and run by an interpreter, never on a GPU.
Its compiler is Pallas's Triton backend, which jax 0.11 and later warn will be removed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jaxtyping import Array, Bool, Float

from catp_jax.models.blocks import LOWEST, Read

USE_KERNEL = False
"""True, before a program is compiled: so new tokens attend on NVIDIA GPUs, in 16 bits."""

COLUMNS = 64
"""Slots that a program looks at together."""

PROGRAMS = 264
"""Slots are divided as long as there are no more programs: two for each of an H100's processors."""

SHORTEST = 256
"""Slots of a part at least."""

MOST_ROWS, MOST_CHANNELS = 64, 128
"""Of a program: what registers and shared memory have room for."""


def refuses(queries: Float[Array, "r one h d"], reads: Sequence[Read]) -> str | None:
    """Why the kernel does not compute this attention; None: it does, on a GPU."""
    if not USE_KERNEL:
        return "USE_KERNEL is False"
    if any(read.block.keys_in or read.block.values_in for read in reads):
        return "it reads all channels"
    arrays = [queries, *jax.tree.leaves([read.block for read in reads])]
    dtypes = {str(array.dtype) for array in arrays}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"its numbers have 16 bits, these are {' and '.join(sorted(dtypes))}"
    batch, kv, _, channels = reads[0].block.keys.shape
    rows = queries.shape[0] * queries.shape[2] // (batch * kv)
    if rows > MOST_ROWS or channels > MOST_CHANNELS:
        return (
            f"it has room for {MOST_ROWS} × {MOST_CHANNELS} queries, these are {rows} × {channels}"
        )
    return None


def attend(
    queries: Float[Array, "r one h d"],
    reads: Sequence[Read],
    scale: float,
    is_interpreted: bool = False,
) -> Float[Array, "r one h d"]:
    """`attention.attend_blocks`; interpreted: on any device, with any numbers, slowly."""
    (rows, one, heads, channels), (batch, kv, _, _) = queries.shape, reads[0].block.keys.shape
    each, group = rows // batch, heads // kv
    grouped = queries.reshape(batch, each, kv, group, channels).transpose(0, 2, 1, 3, 4)
    operands = [grouped.reshape(batch, kv, each * group, channels)]
    for read in reads:
        added = _added(read.seen, read.bias, batch, kv, each, group)
        operands += [read.block.keys, read.block.values, added]
    out = _on_any_mesh(operands, scale, is_interpreted)
    out = out.reshape(batch, kv, each, group, channels).transpose(0, 2, 1, 3, 4)
    return out.reshape(rows, one, heads, channels)


def _added(
    seen: Bool[Array, "rows slots"] | Bool[Array, "b kv slots"],
    bias: Float[Array, "others h slots"] | None,
    batch: int,
    kv: int,
    each: int,
    group: int,
) -> Float[Array, "b _ _ slots"]:
    """What is added to a block's logits, by key-value head and row, or for all of them."""
    slots = seen.shape[-1]
    if seen.ndim == 3:
        seen = seen[:, :, None]
    else:
        seen = seen.reshape(batch, 1, -1, slots)
        seen = jnp.repeat(seen, group, axis=2) if seen.shape[2] > 1 else seen
    plus = jnp.zeros((), jnp.float32)
    if bias is not None:
        plus = bias.astype(jnp.float32).reshape(batch, -1, kv, group, slots)
        plus = jnp.broadcast_to(plus, (batch, each, kv, group, slots)).transpose(0, 2, 1, 3, 4)
        plus = plus.reshape(batch, kv, each * group, slots)
    return jnp.where(seen, plus, LOWEST)


def _on_any_mesh(operands: Sequence[Array], scale: float, is_interpreted: bool) -> Array:
    """Each device has prompts, key-value heads and rows of its own, and all slots and channels."""

    def compute(*operands: Array) -> Array:
        return _on_one_device(operands, scale, is_interpreted)

    def partition(mesh: Any, given: Any, made: Any) -> Any:
        return mesh, compute, made.sharding, tuple(array.sharding for array in given)

    rule, wholes = ["b k m d"], ["d"]
    for number, added in enumerate(operands[3::3]):
        slots, (_, heads, rows, _) = f"n{number}", added.shape
        head, row = "k" if heads > 1 else f"k{number}", "m" if rows > 1 else f"m{number}"
        rule += [f"b k {slots} d", f"b k {slots} d", f"b {head} {row} {slots}"]
        wholes.append(slots)
    call = custom_partitioning(compute)
    call.def_partition(
        partition=partition,
        sharding_rule=f"{', '.join(rule)} -> b k m d",
        need_replication_factors=tuple(wholes),
    )
    return call(*operands)


def _on_one_device(operands: Sequence[Array], scale: float, is_interpreted: bool) -> Array:
    # here, so that the package does without them: one is to go, and both are slow to import
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    queries, *blocks = operands
    (batch, kv, rows, channels), dtype = queries.shape, blocks[1].dtype
    sizes = [keys.shape[2] for keys in blocks[::3]]
    parts = max(min(PROGRAMS // (batch * kv), max(sizes) // SHORTEST), 1)
    each = [pl.cdiv(pl.cdiv(size, parts), COLUMNS) * COLUMNS for size in sizes]
    # in powers of two, and 16 at least, as tensor cores want them; what is beyond is masked
    wide, deep = (max(pl.next_power_of_2(size), 16) for size in (rows, channels))

    def spec(array: Array, *last: int) -> Any:
        by_head = array.shape[1] > 1
        return pl.BlockSpec(
            (None, None, *last), lambda number, head, part: (number, head if by_head else 0, 0, 0)
        )

    specs = [spec(queries, wide, deep)]
    for number, size in enumerate(each):
        keys, values, added = blocks[3 * number : 3 * number + 3]
        specs += [spec(array, size * parts, deep) for array in (keys, values)]
        specs.append(spec(added, wide if added.shape[2] > 1 else 1, size * parts))
    shape = (batch, kv, parts, rows)
    made = [jax.ShapeDtypeStruct((*shape, channels), dtype if parts == 1 else jnp.float32)]
    if parts > 1:  # its largest logits and totals
        made += [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    out, *rest = pl.pallas_call(
        functools.partial(
            _program, sizes=tuple(zip(sizes, each, strict=True)), scale=scale, size=(rows, channels)
        ),
        grid=(batch, kv, parts),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec(
                (None, None, None, wide, deep)[: array.ndim],
                lambda number, head, part, ones=array.ndim - 3: (number, head, part, *(0,) * ones),
            )
            for array in made
        ],
        out_shape=made,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=is_interpreted,
        name="one_row",
    )(*operands)
    if parts == 1:
        return out[:, :, 0]
    top, total = rest
    share = jnp.exp(top - top.max(axis=2, keepdims=True))
    out, total = (out * share[..., None]).sum(axis=2), (total * share).sum(axis=2)
    return (out / total[..., None]).astype(dtype)


def _program(
    queries_ref: Any,
    *refs: Any,
    sizes: tuple[tuple[int, int], ...],
    scale: float,
    size: tuple[int, int],
) -> None:
    """One part of one key-value head of one prompt: a softmax whose largest logit grows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    blocks, (out_ref, *rest) = refs[: 3 * len(sizes)], refs[3 * len(sizes) :]
    wide, deep = queries_ref.shape
    is_row, is_channel = jnp.arange(wide) < size[0], jnp.arange(deep) < size[1]
    is_query = is_row[:, None] & is_channel[None]
    queries = triton.load(queries_ref, mask=is_query, other=0.0)
    part = pl.program_id(2)

    def columns(number: int, step: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        keys_ref, values_ref, added_ref = blocks[3 * number : 3 * number + 3]
        out, top, total = state
        slots, each = sizes[number]
        first = part * each + step * COLUMNS
        taken, is_slot = pl.ds(first, COLUMNS), first + jnp.arange(COLUMNS) < slots
        is_stored = is_slot[:, None] & is_channel[None]
        keys = triton.load(keys_ref.at[taken, :], mask=is_stored, other=0.0)
        is_added = is_slot[None]
        if added_ref.shape[0] > 1:
            is_added = is_added & is_row[:, None]
        added = triton.load(added_ref.at[:, taken], mask=is_added, other=0.0)
        logits = triton.dot(queries, keys.T) * scale + added
        logits = jnp.where(is_slot[None], logits, -jnp.inf)
        highest = jnp.maximum(top, logits.max(axis=1))
        left, weights = jnp.exp(top - highest), jnp.exp(logits - highest[:, None])
        values = triton.load(values_ref.at[taken, :], mask=is_stored, other=0.0)
        out = out * left[:, None] + triton.dot(weights.astype(values.dtype), values)
        return out, highest, total * left + weights.sum(axis=1)

    state = (
        jnp.zeros((wide, deep), jnp.float32),
        jnp.full(wide, LOWEST, jnp.float32),
        jnp.zeros(wide, jnp.float32),
    )
    for number, (slots, each) in enumerate(sizes):
        left = slots - part * each
        steps = jnp.clip(pl.cdiv(left, COLUMNS), 0, each // COLUMNS)
        state = jax.lax.fori_loop(0, steps, functools.partial(columns, number), state)
    out, top, total = state
    if rest:
        for ref, array in zip(rest, (top, total), strict=True):
            triton.store(ref, array, mask=is_row)
    else:
        out = out / total[:, None]
    triton.store(out_ref, out.astype(out_ref.dtype), mask=is_query)
