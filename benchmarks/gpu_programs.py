"""How far from a GPU's floor are the decode steps of Llama 3.2 11B? Compiled for one, not run.

Regime: abstract parameters in bfloat16, 64 text tokens and 64 new ones, images of four tiles (6,404
visual tokens), of which all, half or a quarter are kept; one GPU. XLA compiles without autotuning,
so bytes are those of the program, and milliseconds are not measured. Floor: all weights but the
embedding table, of which a step takes a row each, and the whole cache, read once.

    JAX_PLATFORMS=cpu python benchmarks/gpu_programs.py --batches 1,32

Needs JAX's CUDA compiler (`make test` puts it into .venv/gpu-compiler: PYTHONPATH). Figures go to
benchmarks/results/gpu_programs_<target>.json after every program, where those of other batches
stay; the last line is one JSON object.
"""

import argparse
import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from catp_jax import checkpoint, targets
from catp_jax.generation import generate as programs
from catp_jax.models.frozen import freeze
from catp_jax.models.mllama import MllamaConfig
from catp_jax.plan import abstract_model, inputs_of
from catp_jax.pruning import make
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import Sharded, kv_heads, place, place_inputs
from catp_jax.targets.compiling import program_of

RESULTS = Path(__file__).parent / "results"
MODEL = "Llama-3.2-11B-Vision"
TEXT, NEW = 64, 64


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def step_of(config: Any, target: str, batch: int, percent: int) -> dict[str, Any]:
    """A decode step's figures beside its floor."""
    model = abstract_model(config, jnp.bfloat16)
    mesh = make_mesh({}, kv_heads(model), targets.devices_of(target))
    model = place(model, mesh)
    network = Sharded(mesh=mesh, frozen=freeze(model))
    inputs, visual = inputs_of(config, batch, None, TEXT)
    keep = visual * percent // 100
    pruners = () if percent == 100 else (make("k_norm", keep, model.sites),)
    inputs = place_inputs(inputs, mesh)
    out = programs.prefill.trace(network, pruners, inputs, new_slots=NEW).out_info
    cache = place_inputs(out.cache, mesh)
    tokens = place_inputs(jax.ShapeDtypeStruct((batch,), jnp.int32), mesh)
    started = time.perf_counter()
    program = program_of(programs.step.trace(network, tokens, cache))
    seconds = time.perf_counter() - started
    tables = [leaf for name, leaf in checkpoint.names(model).items() if "embed_tokens" in name]
    # a program's arguments are what it uses: not the vision tower
    floor = program.arguments - nbytes(tables) - nbytes(tokens)
    gpu = targets.find_gpu(target)
    return {
        "program": f"{MODEL} step",
        "batch": batch,
        "kept_percent": percent,
        "kept": keep,
        "moved": program.moved,
        "floor": floor,
        "ratio": round(program.moved / floor, 4),
        "cache": nbytes(cache),
        "moved_by_kind": program.moved_by_kind,
        "flops": program.flops,
        "temporaries": program.temporaries,
        "launches": program.launches,
        "graphs": program.graphs,
        "open_loops": len(program.open_loops),
        "floor_ms": {
            name: round(1000 * value, 3)
            for name, value in dataclasses.asdict(program.floor(gpu)).items()
        },
        "compile_s": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="h100", choices=list(targets.GPUS))
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--percents", default="100,50,25")
    args = parser.parse_args()
    config = MllamaConfig.llama_3_2_11b()
    batches = [int(batch) for batch in args.batches.split(",")]
    path = RESULTS / f"gpu_programs_{args.target}.json"
    older = json.loads(path.read_text())["programs"] if path.exists() else []
    result: dict[str, Any] = {
        "benchmark": "gpu_programs",
        "target": args.target,
        "dtype": "bfloat16",
        "text_tokens": TEXT,
        "new_tokens": NEW,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "programs": [row for row in older if row["batch"] not in batches],
    }
    print("batch  kept    moved    floor  ratio  temporaries  launches")
    for batch in batches:
        for percent in map(int, args.percents.split(",")):
            row = step_of(config, args.target, batch, percent)
            result["programs"] = sorted(
                [*result["programs"], row], key=lambda row: (row["batch"], -row["kept"])
            )
            moved, floor, temporaries = (
                row[name] / 1e9 for name in ("moved", "floor", "temporaries")
            )
            print(
                f"{batch:5d} {percent:4d}% {moved:5.1f} GB {floor:5.1f} GB {row['ratio']:6.3f} "
                f"{temporaries:9.2f} GB {row['launches']:9d}",
                flush=True,
            )
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
