"""How the benchmarks time: a call that compiles, then medians and spreads of calls that do not."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Run = Callable[[int], np.ndarray]
"""Generates so many tokens and returns them [batch, new]."""

Clock = Callable[[], float]
"""Seconds since some moment."""


def half_range(times: Sequence[float]) -> float:
    """Half the interquartile range."""
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


def milliseconds(
    call: Callable[[], Any], rounds: int, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Median and spread of a call, after one that may compile."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        started = clock()
        jax.block_until_ready(call())
        times.append(1000 * (clock() - started))
    return statistics.median(times), half_range(times)


def measure(
    runs: Mapping[str, Run], new: int, rounds: int, clock: Clock = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Prefill and decode times in ms, medians and half interquartile ranges.

    In a round all take their turn, so that a slow moment hits all alike.
    """

    def seconds(run: Run, new: int) -> float:
        started = clock()
        run(new)
        return clock() - started

    for run in runs.values():
        run(1), run(new)  # compiles
    one: dict[str, list[float]] = {name: [] for name in runs}
    more: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            first = seconds(run, 1)
            one[name].append(1000 * first)
            more[name].append(1000 * (seconds(run, new) - first) / (new - 1))
    return {
        name: {
            "prefill_ms": statistics.median(one[name]),
            "prefill_spread_ms": half_range(one[name]),
            "token_ms": statistics.median(more[name]),
            "token_spread_ms": half_range(more[name]),
        }
        for name in runs
    }
