"""What does one call of a compiled program cost before any of its work?

Regime: the tree of Llama 3.2 11B (906 arrays) at tiny widths, and programs that do next to nothing,
so that only the hand-over of the arguments is timed; median of 30 calls. Floor: the same arrays as
a plain list. Wall times are of the host; compare them within one run.

    python benchmarks/call_overhead.py

The last line is one JSON object.
"""

import dataclasses
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from catp_jax.models.frozen import freeze
from catp_jax.models.mllama import Mllama, MllamaConfig


def milliseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    real = MllamaConfig.llama_3_2_11b()
    tiny = {"hidden_size": 32, "intermediate_size": 8}
    config = dataclasses.replace(
        real,
        text=dataclasses.replace(
            real.text, vocab_size=16, num_attention_heads=2, num_key_value_heads=1, **tiny
        ),
        vision=dataclasses.replace(real.vision, attention_heads=2, image_size=28, **tiny),
    )
    model = Mllama(config, rngs=nnx.Rngs(0))
    frozen, arrays = freeze(model), jax.tree.leaves(model)
    program = jax.jit(lambda tree, x: x + 1)
    x = jnp.ones(())
    result = {
        "benchmark": "call_overhead",
        "arrays": len(arrays),
        "module_ms": milliseconds(lambda: program(model, x)),
        "frozen_ms": milliseconds(lambda: program(frozen, x)),
        "list_ms": milliseconds(lambda: program(arrays, x)),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
    }
    print(f"an NNX module  {result['module_ms']:7.2f} ms")
    print(f"frozen         {result['frozen_ms']:7.2f} ms")
    print(f"a plain list   {result['list_ms']:7.2f} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
