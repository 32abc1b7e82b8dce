"""Does every mesh give the tokens of one device, unpruned and with every method?

Regime: tiny random models (Llama Vision, BLIP-2 with OPT and with T5, InstructBLIP with Vicuna) in
float32 on eight forced CPU devices, 8 prompts, greedy. For each mesh of up to eight devices: the
share of tokens that are the same, and the largest difference of the first logits over the largest
logit.

Goal: all tokens the same, 1e-4; the exit code is 1 if that is missed. The last line is one JSON
object.

    python benchmarks/mesh_matrix.py
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' models

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from catp_jax.contract import keep_all
from catp_jax.generation import generate as programs
from catp_jax.models.frozen import freeze
from catp_jax.pruning import make
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import kv_heads, place_inputs, replicate
from tests.sharding.cases import CASES, SITES, SIZES, name_of
from tests.sharding.models import CONFIGS, inputs, model, on_mesh

NEW = 3  # tokens


@partial(jax.jit, static_argnames="length")
def answer(network: Any, every: Any, batch: Any, length: int) -> Any:
    """Greedy tokens and first logits under each tuple of pruners; they share the front."""
    out = []
    for pruners in every:
        start = programs.prefill_with(network, pruners, batch, length)
        logits, cache, tokens = start.logits, start.cache, []
        for _ in range(length):
            tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
            logits, cache = network.step(tokens[-1], cache, keep_all)
        out.append((jnp.stack(tokens, axis=1), start.logits))
    return out


def run(kind: str, mesh: Any = None) -> list[Any]:
    """What `answer` gives for all cases of a kind of model."""
    every = tuple(
        () if method is None else (make(method, 4, SITES[kind]),)
        for own, method in CASES
        if own == kind
    )
    if mesh is None:
        return jax.device_get(answer(freeze(model(kind)), every, inputs(kind), NEW))
    batch = place_inputs(inputs(kind), mesh)
    return jax.device_get(answer(on_mesh(kind, mesh), replicate(every, mesh), batch, NEW))


def main() -> None:
    """Runs the matrix, prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--meshes", type=int, default=len(SIZES), help="only the first so many")
    parser.add_argument("--out", type=Path, help="a file for the JSON object, too")
    options = parser.parse_args()
    # tiny programs: nearly all of the time is LLVM's
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_default_matmul_precision", "float32")

    alone = {kind: run(kind) for kind in CONFIGS}
    rows: list[dict[str, Any]] = []
    for sizes in SIZES[: options.meshes]:
        devices = jax.devices()[: math.prod(sizes)]
        for kind in CONFIGS:
            ours = run(kind, make_mesh(name_of(sizes), kv_heads(model(kind)), devices))
            jax.clear_caches()  # programs of many devices take a lot of memory
            methods = [method or "unpruned" for own, method in CASES if own == kind]
            for method, (tokens, logits), (one, expected) in zip(
                methods, ours, alone[kind], strict=True
            ):
                rows.append(
                    {
                        "mesh": name_of(sizes),
                        "model": kind,
                        "method": method,
                        "same_tokens": float(np.mean(tokens == one)),
                        "logits": float(np.abs(logits - expected).max() / np.abs(expected).max()),
                    }
                )
    shown = Table("mesh", *CONFIGS, title="same tokens, largest difference of logits")
    shown.columns[0].no_wrap = True
    for sizes in SIZES[: options.meshes]:
        cells = []
        for kind in CONFIGS:
            own = [row for row in rows if row["mesh"] == name_of(sizes) and row["model"] == kind]
            same = min(row["same_tokens"] for row in own)
            far = max(row["logits"] for row in own)
            cells.append(f"{same:.0%}  {far:.0e}")
        shown.add_row(name_of(sizes), *cells)
    Console().print(shown)
    line = json.dumps(
        {
            "benchmark": "mesh_matrix",
            "date": datetime.date.today().isoformat(),
            "device": "8 forced CPU devices",
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "new_tokens": NEW,
            "prompts": 8,
            "rows": rows,
        }
    )
    if options.out:
        options.out.write_text(line + "\n")
    print(line)
    if any(not (row["same_tokens"] == 1 and row["logits"] <= 1e-4) for row in rows):
        sys.exit("a mesh is missed: other tokens, or logits further than 1e-4")


if __name__ == "__main__":
    main()
