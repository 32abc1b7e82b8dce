"""What do our programs reach on this GPU, beside its floor and beside transformers? In 9 minutes.

Regime: one card of 80 GB; bfloat16; random weights, drawn on the device; 64 text tokens and 64 new
ones, images of four tiles. First the card: bytes read a second, and FLOPs of a large matrix
product. Then the cases of `programs.TABLE`, most telling first, each compiled, timed (median and
spread after a warm-up; a decode loop as a whole, over its steps) and put beside its floor: the
weights and the cache that it must read over the measured bandwidth, or its matrix products over the
measured rate, whichever takes longer. Then transformers on random models of the same sizes: sdpa,
eager and compiled with a static cache.

    python -m benchmarks.gpu_suite --out results.json                # --smoke: toys, on any device

Ours and transformers run in a process each, which is ended when its time is over. Every row goes to
--out as it is done; `not_reached` lists what did not fit into --minutes. Compile times count only
without a compilation cache (JAX_COMPILATION_CACHE_DIR); with one, a second run gets further.
`peak_bytes` is the process's highest until then, `bytes` what the program itself needs. The last
line is one JSON object.
"""

import argparse
import datetime
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

# Memory is taken as it is needed, so that what a program takes shows.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp

from benchmarks import programs
from benchmarks.programs import LLAMA, OPT, T5, TABLE, VICUNA, Case
from benchmarks.timing import measure, milliseconds
from catp_jax.models.frozen import freeze
from catp_jax.targets.products import matrix_flops

SMOKE = (
    Case(LLAMA, "decode", 2, 50),
    Case(LLAMA, "prefill", 2),
    Case(OPT, "decode", 2),
    Case(OPT, "decode", 2, beams=2),
    Case(OPT, "decode", 2, fused=True),
    Case(OPT, "generate", 1),
    Case(OPT, "largest", 0),
    Case(T5, "decode", 2),
    Case(VICUNA, "decode", 2),
)
SMOKE_PEERS = ((OPT, 2),)
PEERS = ((LLAMA, 8), (LLAMA, 1), (OPT, 16), (OPT, 1), (T5, 16), (VICUNA, 16), (LLAMA, 32))
WAYS = ("sdpa", "sdpa, compiled")
OURS = 0.7  # of the time, where transformers has its turn too
LEAVE = 5  # seconds to end in


class Results:
    """The file, which has after each row all that is known."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, **parts: Any) -> None:
        """Sets parts of the file; a `row` joins the others."""
        if (row := parts.pop("row", None)) is not None:
            self.found.setdefault("rows", []).append(row)
        self.found |= parts
        new = self.path.with_suffix(".part")
        new.write_text(json.dumps(self.found, indent=1) + "\n")
        new.replace(self.path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.found.get("rows", [])


# --- the card ---------------------------------------------------------------------------------


def card(is_smoke: bool) -> dict[str, Any]:
    """Bytes read a second and bfloat16 FLOPs a second, the best of two sizes each."""
    bandwidth, rate = 0.0, 0.0
    for size in (2**20, 2**21) if is_smoke else (2**30, 2**31):
        x = draw(jax.random.key(0, impl="rbg"), (size // 4096, 4096), jnp.bfloat16, 1.0)
        read = jax.jit(lambda x: x.astype(jnp.float32).sum(axis=1))
        spent, _ = milliseconds(partial(read, x), 10)
        bandwidth = max(bandwidth, 1000 * x.nbytes / spent)
    for size in (128, 256) if is_smoke else (8192, 16384):
        x = draw(jax.random.key(1, impl="rbg"), (size, size), jnp.bfloat16, 1.0)
        spent, _ = milliseconds(partial(jax.jit(jnp.matmul), x, x), 10)
        rate = max(rate, 1000 * 2 * size**3 / spent)
    return {"bandwidth": bandwidth, "flops_per_s": rate}


@partial(jax.jit, static_argnums=(1, 2))
def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    return (scale * jax.random.normal(key, shape, dtype)).astype(dtype)


def on_device(tree: Any, seed: int) -> Any:
    """Arrays in the place of abstract ones: small random numbers, zeros, everything valid."""
    root = jax.random.key(seed, impl="rbg")
    leaves, structure = jax.tree.flatten(tree)

    def made(number: int, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return draw(jax.random.fold_in(root, number), leaf.shape, leaf.dtype, 0.02)
        fill = leaf.dtype == jnp.bool_
        return jnp.full(leaf.shape, fill, leaf.dtype)

    return jax.tree.unflatten(structure, [made(*one) for one in enumerate(leaves)])


# --- ours -------------------------------------------------------------------------------------


def row_of(case: Case, network: Any, config: Any, found: dict[str, Any]) -> dict[str, Any]:
    """A case compiled, timed, and beside its floor."""
    program = programs.program_of(case, network, config)
    started = time.perf_counter()
    traced = program.function.trace(network, *program.arguments)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes
    given = programs.nbytes(program.arguments)
    weights = needed - given - programs.tables(network.thaw())
    flops = matrix_flops(traced)  # of a decode loop: of one step

    arguments = on_device(program.arguments, 1)
    spent, spread = milliseconds(
        lambda: compiled(network, *arguments), 5 if case.what == "decode" else 3
    )
    row: dict[str, Any] = {
        "program": case.name,
        "implementation": "catp-jax",
        "model": case.model,
        "what": case.what,
        "batch": case.batch,
        "beams": case.beams,
        "kept": program.kept,
        "compile_s": round(seconds, 2),
        "ms": spent,
        "spread_ms": spread,
        "bytes": needed + memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "weights": needed - given,
    }
    if case.what in ("decode", "prefill"):
        runs = max(program.steps, 1)
        read = weights + program.cache
        floor = 1000 * max(read / found["bandwidth"], flops / found["flops_per_s"])
        row |= {
            "ms": spent / runs,
            "spread_ms": spread / runs,
            "floor_ms": floor,
            "ratio": spent / runs / floor,
            "floor_bytes": read,
            "flops": flops,
        }
    if stats := jax.devices()[0].memory_stats():
        row["peak_bytes"] = stats["peak_bytes_in_use"]
    return row


def largest(case: Case, rows: list[dict[str, Any]]) -> Case:
    """The batch of `generate` that should fill the device: all but the weights grows with it.

    A device that does not tell its memory is taken to have room for three such batches.
    """
    one = next(row for row in rows if (row["model"], row["what"]) == (case.model, "generate"))
    each = (one["bytes"] - one["weights"]) / one["batch"]
    stats = jax.devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit", (one["weights"] + 3.3 * each * one["batch"]) / 0.95)
    return Case(case.model, "generate", int((0.95 * room - one["weights"]) / each))


def ours(results: Results, cases: tuple[Case, ...], is_smoke: bool) -> None:
    """Every case, one model at a time on the device."""
    found = card(is_smoke)
    results.add(card=found)
    print(
        f"{found['bandwidth'] / 1e9:.0f} GB/s read, {found['flops_per_s'] / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    loaded, network, config = "", None, None
    for case in cases:
        if case.model != loaded:
            network = None  # before the next one is drawn
            gc.collect()
            model, config = programs.abstract(case, "toy" if is_smoke else "real")
            network = freeze(on_device(model, 0))
            loaded = case.model
        try:
            actual = largest(case, results.rows) if case.what == "largest" else case
            row = row_of(actual, network, config, found) | {"program": case.name}
        except Exception as error:  # out of memory, say: the other rows still count
            row = {"program": case.name, "error": said(error)}
        results.add(row=row)
        show(row)


# --- transformers -----------------------------------------------------------------------------


def theirs(results: Results, pairs: tuple[tuple[str, int], ...], is_smoke: bool) -> None:
    """transformers beside our rows of the same model and batch."""
    import torch

    from benchmarks import peers

    if not (torch.cuda.is_available() or is_smoke):
        results.add(transformers=f"skipped: torch {torch.__version__} finds no CUDA")
        return
    results.add(transformers=peers.versions())
    loaded, model = "", None
    for name, batch in pairs:
        if name != loaded:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            model = peers.random_model(
                programs.config_of(name, "toy" if is_smoke else "real"), "bfloat16"
            )
            loaded = name
        for way in WAYS[:1] if is_smoke else WAYS:
            row: dict[str, Any] = {
                "program": f"{name}, batch {batch}",
                "implementation": f"transformers, {way}",
                "model": name,
                "batch": batch,
            }
            try:
                run = peers.generates(model, batch, programs.TEXT, way != "sdpa")
                row |= measure({"one": run}, 3 if is_smoke else programs.NEW, 3)["one"]
                row |= beside(row, results.rows)
            except Exception as error:  # of somebody else's code: say so, and go on
                row["error"] = said(error)
            if torch.cuda.is_available():
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            results.add(row=row)
            show(row)


def beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Their times over ours, as far as we ran the same, unpruned."""
    same = {
        one["what"]: one["ms"]
        for one in rows
        if "what" in one
        and (one["model"], one["batch"], one["beams"]) == (row["model"], row["batch"], 1)
        and "kept" not in one["program"]
    }
    out = {}
    if "decode" in same:
        out["token_ratio"] = row["token_ms"] / same["decode"]
    if "prefill" in same:
        out["prefill_ratio"] = row["prefill_ms"] / same["prefill"]
    return out


def said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        text = row["error"][:120]
    elif "token_ms" in row:
        text = f"prefill {row['prefill_ms']:.2f} ms, token {row['token_ms']:.2f} ms"
        text += "".join(f", {row[name]:.2f} × ours" for name in ("token_ratio",) if name in row)
    else:
        text = f"{row['ms']:.3f} ± {row['spread_ms']:.3f} ms, compiled in {row['compile_s']:.0f} s"
        if "floor_ms" in row:
            text += f"; floor {row['floor_ms']:.3f} ms, {row['ratio']:.3f} ×"
    print(f"{row['program']}, {row.get('implementation', 'catp-jax')}: {text}", flush=True)


# --- the run ----------------------------------------------------------------------------------


def planned(is_smoke: bool) -> list[tuple[str, str]]:
    """(program, implementation) of every row."""
    cases = SMOKE if is_smoke else TABLE
    rows = [(case.name, "catp-jax") for case in cases]
    for name, batch in SMOKE_PEERS if is_smoke else PEERS:
        for way in WAYS[:1] if is_smoke else WAYS:
            rows.append((f"{name}, batch {batch}", f"transformers, {way}"))
    return rows


def in_turn(out: Path, is_smoke: bool, minutes: float) -> None:
    """Ours, then transformers, each in a process that ends with its time."""
    started = time.monotonic()
    has_torch = importlib.util.find_spec("torch") is not None
    shares = {"ours": OURS, "transformers": 1.0} if has_torch else {"ours": 1.0}
    if not has_torch:
        Results(out).add(transformers="skipped: torch is not installed")
    for part, share in shares.items():
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", out, "--part", part]
        left = 60 * minutes * share - (time.monotonic() - started) - LEAVE
        try:
            done = subprocess.run([*command, *["--smoke"] * is_smoke], check=False, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{part}: the time is over", flush=True)
            continue
        if done.returncode:
            Results(out).add(**{f"{part}_ended_with": done.returncode})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after every row")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--part", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part == "transformers":
        theirs(Results(chosen.out), SMOKE_PEERS if chosen.smoke else PEERS, chosen.smoke)
        return
    if chosen.part == "ours":
        # toys are tried, not measured
        jax.config.update("jax_disable_most_optimizations", chosen.smoke)
        device = jax.devices()[0]
        results = Results(chosen.out)
        results.add(device=device.device_kind, platform=device.platform)
        ours(results, SMOKE if chosen.smoke else TABLE, chosen.smoke)
        return
    chosen.out.unlink(missing_ok=True)
    Results(chosen.out).add(
        benchmark="gpu_suite",
        date=datetime.date.today().isoformat(),
        size="toy" if chosen.smoke else "real",
        dtype="bfloat16",
        text_tokens=programs.TEXT,
        new_tokens=programs.NEW,
        versions={"python": platform.python_version(), "jax": jax.__version__},
        rows=[],
    )
    in_turn(chosen.out, chosen.smoke, chosen.minutes)
    results = Results(chosen.out)
    done = {(row["program"], row.get("implementation", "catp-jax")) for row in results.rows}
    missing = [f"{who}: {what}" for what, who in planned(chosen.smoke) if (what, who) not in done]
    results.add(not_reached=missing)
    for one in missing:
        print(f"not reached: {one}")
    print(json.dumps(results.found))


if __name__ == "__main__":
    main()
