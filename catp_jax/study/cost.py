"""What pruning saves: bytes of cache and FLOPs of the prefill's matrix products, exact anywhere;
times.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from catp_jax.generation import generate as programs
from catp_jax.study.records import Cost, GpuCost
from catp_jax.study.results import median_and_spread
from catp_jax.targets import compile_for
from catp_jax.targets.products import matrix_flops

ROUNDS = 5  # prefills timed of each setting
STEPS = 8  # at most, after each


def sizes(
    network: Any, pruners: Any, inputs: Any, batch: int, new_slots: int, num_beams: int = 1
) -> Cost:
    """What follows from shapes: one question's share of everything that decoding keeps, with room
    for `new_slots` tokens, and of the prefill.

    The beams of a prompt share what it left.
    """
    traced = programs.prefill.trace(network, pruners, inputs, new_slots=new_slots)
    cache = traced.out_info.cache
    if num_beams > 1:
        cache = jax.eval_shape(lambda cache: cache.spread(num_beams), cache)
    leaves = jax.tree.leaves(cache)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return Cost(cache_bytes=size // batch, prefill_flops=matrix_flops(traced) / batch)


def measure(
    network: Any,
    given: Sequence[tuple[Any, Any]],
    batch: int,
    new_slots: int,
    num_beams: int = 1,
) -> list[Cost]:
    """The costs of pruners, each with its inputs, and times.

    Everything is compiled first; then the settings take turns, so that what else the machine does
    meets all alike.
    """
    costs = [sizes(network, *some, batch, new_slots, num_beams) for some in given]
    compiled = in_parallel(partial(_compile, network=network, new_slots=new_slots), given, network)
    steps = min(STEPS, new_slots)
    prefills: list[list[float]] = [[] for _ in given]
    tokens: list[list[float]] = [[] for _ in given]
    for turn in range(-1, ROUNDS):  # the first is not counted
        for number, (pruners, inputs) in enumerate(given):
            started = time.perf_counter()
            start = jax.block_until_ready(compiled[number](network, pruners, inputs))
            prefill = time.perf_counter() - started
            answered = _step_times(network, pruners, start, steps)
            if turn >= 0:
                prefills[number].append(1000 * prefill)
                tokens[number] += answered
    out = []
    for number, cost in enumerate(costs):
        prefill_ms, prefill_spread = median_and_spread(prefills[number])
        token_ms, token_spread = median_and_spread(tokens[number])
        out.append(
            dataclasses.replace(
                cost,
                prefill_ms=prefill_ms,
                prefill_spread=prefill_spread,
                token_ms=token_ms,
                token_spread=token_spread,
            )
        )
    return out


def on_gpu(
    target: str, network: Any, given: Sequence[tuple[Any, Any]], new_slots: int
) -> list[GpuCost]:
    """What a prefill and a step after it would cost on a GPU that need not be there: of pruners,
    each with its inputs. What differs in seeds alone is compiled once.

    Raises ValueError if its compiler is not installed, and for a model on several devices.
    """
    if any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(network)):
        raise ValueError(f"the cost on {target} is that of one device, and the model is on several")
    keys = [str(jax.tree.map(jnp.shape, some)) for some in given]
    made = {
        key: _on_gpu(target, network, *some, new_slots)
        for key, some in dict(zip(keys, given, strict=True)).items()
    }
    return [made[key] for key in keys]


def _on_gpu(target: str, network: Any, pruners: Any, inputs: Any, new_slots: int) -> GpuCost:
    given = network, pruners, inputs
    start = jax.eval_shape(partial(programs.prefill, new_slots=new_slots), *given)
    prefill = compile_for(target, programs.prefill, *given, new_slots=new_slots)
    tokens = jax.ShapeDtypeStruct(start.logits.shape[:1], jnp.int32)
    states = start.selection.states
    step = compile_for(target, programs.step, network, pruners, tokens, start.cache, states)
    return GpuCost(target, prefill.moved, prefill.flops, step.moved)


def in_parallel(call: Callable[[Any], Any], items: Iterable[Any], network: Any) -> list[Any]:
    """`call` of each item, in a few threads: XLA compiles outside of Python's lock.

    One by one if `network` is on several devices, which have to meet in the same order everywhere.
    """
    if any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(network)):
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(call, items))


def _compile(given: tuple[Any, Any], *, network: Any, new_slots: int) -> Any:
    pruners, inputs = given
    return programs.prefill.lower(network, pruners, inputs, new_slots=new_slots).compile()


def _step_times(network: Any, pruners: Any, start: Any, steps: int) -> list[float]:
    """Milliseconds of each greedy step; uses up the cache."""
    logits, cache, states, times = start.logits, start.cache, start.selection.states, []
    for _ in range(steps):
        token = jax.block_until_ready(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        started = time.perf_counter()
        out = programs.step(network, pruners, token, cache, states)
        logits, cache, states = jax.block_until_ready(out)
        times.append(1000 * (time.perf_counter() - started))
    return times
