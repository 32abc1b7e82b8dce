"""How far are our programs from a GPU's floor? Compiled for one that is not there, not run.

Regime: abstract parameters in bfloat16, 64 text tokens and 64 new ones, images of four tiles (6,404
visual tokens); one GPU, or eight. XLA compiles without autotuning, so bytes are those of the
program, and milliseconds are not measured. Floor of a step: all weights but the embedding table, of
which a step takes a row each, and the whole cache, a prompt's once, read once.

`ratio` is moved bytes over the floor as XLA compiles untuned. It then splits long sums of small
batches in parts (split-K), whose float32 results go through memory; a GPU's own tuning decides
about that. `ratio_whole_sums` is without. "one kernel": new tokens attend in one kernel, which is
off by default (`models.one_row`).

    JAX_PLATFORMS=cpu python -m benchmarks.gpu_programs --only "11B-Vision step"

Needs JAX's CUDA compiler (`make test` puts it into .venv/gpu-compiler: PYTHONPATH), and cuDNN where
attention of a prefill is to be its kernel. Figures go to benchmarks/results/gpu_programs_<target>
.json after every program, where those of other programs stay; the last line is one JSON object.
"""

import argparse
import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.programs import LLAMA, NEW, OPT, T5, TEXT, VICUNA, Case, abstract, nbytes, tables
from benchmarks.programs import program_of as make_program
from catp_jax import targets
from catp_jax.contract import run_pruners
from catp_jax.models.frozen import freeze
from catp_jax.plan import inputs_of
from catp_jax.pruning import make, methods_for
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import Sharded, kv_heads, place, place_inputs
from catp_jax.targets.compiling import OPTIONS, program_of
from catp_jax.targets.products import matrix_flops

RESULTS = Path(__file__).parent / "results"
LARGE = "Llama-3.2-90B-Vision"
WHOLE_SUMS = {"xla_gpu_experimental_force_split_k": 1}

STEPS = (
    *(Case(LLAMA, "step", batch, part) for batch in (1, 8, 32, 64) for part in (100, 50, 25)),
    *(Case(name, "step", batch) for name in (OPT, T5, VICUNA) for batch in (1, 16, 64)),
    Case(LLAMA, "step", 8, beams=5),
    Case(OPT, "step", 16, beams=5),
    Case(LLAMA, "step", 1, weights="int8"),
    Case(LLAMA, "step", 32, weights="int8"),
    Case(LARGE, "step", 16),
)
CASES = (
    *STEPS,
    *(dataclasses.replace(case, fused=True) for case in STEPS),
    Case(OPT, "prefill", 16),
    Case(LLAMA, "prefill", 8),
    Case(LLAMA, "generate", 8),
)


def row_of(
    case: Case, target: str, size: str = "real", with_whole_sums: bool = True
) -> dict[str, Any]:
    """A program's figures, a step's beside its floor."""
    devices = targets.devices_of(target, 8 if case.model == LARGE else 1)
    model, config = abstract(case, size)
    mesh = make_mesh({"tensor": len(devices)} if len(devices) > 1 else {}, kv_heads(model), devices)
    model = place(model, mesh)
    network = Sharded(mesh=mesh, frozen=freeze(model))
    program = make_program(case, network, config)
    parts = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), program.arguments
    )
    arguments = tuple(place_inputs(part, mesh) for part in parts)
    started, spent = time.perf_counter(), time.process_time()
    traced = program.function.trace(network, *arguments)
    compiled = program_of(traced)
    row: dict[str, Any] = {
        "program": case.name,
        "devices": len(devices),
        "compile_s": round(time.perf_counter() - started, 1),
        "compile_cpu_s": round(time.process_time() - spent, 1),
        "moved": compiled.moved,
        "moved_by_kind": compiled.moved_by_kind,
        "flops": compiled.flops,
        "temporaries": compiled.temporaries,
        "sent": compiled.sent,
        "collectives": sum(one.times for one in compiled.collectives),
        "launches": compiled.launches,
        "graphs": compiled.graphs,
        "floor_ms": {
            name: round(1000 * value, 3)
            for name, value in dataclasses.asdict(compiled.floor(targets.find_gpu(target))).items()
        },
    }
    if case.what != "step":
        return row | {"matrix_flops": matrix_flops(traced)}
    carry = arguments[0]
    state = nbytes((carry.last, carry.state, arguments[1:]))
    # a program's arguments are what it uses: not the vision tower
    floor = compiled.arguments - (tables(model) / len(devices)) - state
    row |= {
        "batch": case.batch,
        "kept": program.kept,
        "floor": int(floor),
        "ratio": round(compiled.moved / floor, 4),
        "cache": nbytes(carry.cache),
    }
    if with_whole_sums:
        whole = program_of(traced, OPTIONS | WHOLE_SUMS)
        row["ratio_whole_sums"] = round(whole.moved / floor, 4)
    return row


def pruning_row(model: str, batch: int, method: str, target: str) -> dict[str, Any]:
    """What a method's scores and gathering move and compute, at half the visual tokens."""
    abstracted, config = abstract(Case(model, "prefill", batch))
    network = freeze(abstracted)
    inputs, visual = inputs_of(config, batch, None, TEXT)
    pruner = make(method, visual // 2, network.sites)
    view = jax.eval_shape(lambda network, inputs: network.front(inputs).view, network, inputs)

    def pruned(view: Any) -> Any:
        kept, states = run_pruners((pruner,), view)
        shown = (view.tokens, view.attention and view.attention.keys, view.values)
        return jax.tree.map(kept.apply, shown), states

    compiled = targets.compile_for(target, jax.jit(pruned), view)
    return {
        "program": f"{model} {method}, batch {batch}, 50 % kept",
        "moved": compiled.moved,
        "flops": compiled.flops,
        "temporaries": compiled.temporaries,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="h100", choices=list(targets.GPUS))
    parser.add_argument("--only", default="", help="programs with this in their name")
    args = parser.parse_args()
    path = RESULTS / f"gpu_programs_{args.target}.json"
    todo = {case.name: (row_of, (case, args.target)) for case in CASES}
    for model, batch in ((LLAMA, 8), (OPT, 16)):
        for method in methods_for(abstract(Case(model, "prefill", 1))[0].sites):
            if method != "fastv" or model == LLAMA:  # elsewhere between two layers
                name = f"{model} {method}, batch {batch}, 50 % kept"
                todo[name] = (pruning_row, (model, batch, method, args.target))
    for name, (make_row, given) in todo.items():
        if args.only not in name:
            continue
        row = make_row(*given)
        older = json.loads(path.read_text())["programs"] if path.exists() else []
        rows = {row["program"]: row for row in [*older, row]}
        size = f"{row['moved'] / 1e9:7.2f} GB  {row['temporaries'] / 1e9:6.3f} GB"
        ratios = [f"{row[key]:7.3f}" for key in row if key.startswith("ratio")]
        print(f"{name:48s} {size}", *ratios, flush=True)
        result = {
            "benchmark": "gpu_programs",
            "target": args.target,
            "dtype": "bfloat16",
            "text_tokens": TEXT,
            "new_tokens": NEW,
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "programs": [rows[one] for one in todo if one in rows],
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
