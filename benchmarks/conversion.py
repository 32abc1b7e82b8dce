"""How fast, and in how much memory, does a checkpoint pass through the conversion?

Regime: Llama 3.2 11B Vision with random weights and fewer layers, the largest tensors (1.05 GB)
among them: real names and shapes, bfloat16, five files and an index. Written to a folder of its
own beneath --folder, and removed in the end.

Copy: the same files by shutil.copyfile, synced to the disk. Each step starts without the source in
the page cache, in a process of its own, and ends with all that it wrote on the disk; the steps take
turns for some rounds. Goals: a conversion at no less than 70 % of the copy's rate (medians); in no
more than twice the largest tensor and 1 GiB over what the process had before it began. That is the
peak of the resident set, mapped pages of files included, as the kernel counts it (VmHWM).

Loading, of the checkpoint and of what it was converted into, goes straight onto the default device.
On a CPU, the model itself is in host memory, so what counts there is the peak beyond it. The last
line is one JSON object.

    python benchmarks/conversion.py
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import convert
from catp_jax import checkpoint
from catp_jax.leaves import named
from catp_jax.models.mllama import MllamaConfig
from convert.families import family_of
from convert.folders import forget, sync
from convert.shards import Shard, Tensor, write_shard
from convert.weights import write_index
from convert.writer import split

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FILE = 5.0 / 21.3  # of the whole: what the hub's files of 11B are cut at
GIB = 2**30
RATE, TENSORS = 0.7, 2  # the goals: part of the copy's rate, largest tensors in memory
STEPS = {
    "to_orbax": {},
    "to_orbax, verified": {"verify": True},
    "to_orbax, float32": {"dtype": "float32"},
    "load_hf": {},
    "load_converted": {},
}


def config(size: str) -> MllamaConfig:
    """The benchmark's model; "toy" is for a try."""
    whole = MllamaConfig.llama_3_2_11b()
    text = dataclasses.replace(whole.text, num_hidden_layers=6, cross_attention_layers=(3,))
    if size == "base":
        return dataclasses.replace(whole, text=text)
    text = dataclasses.replace(
        text, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
    )
    vision = dataclasses.replace(
        whole.vision, hidden_size=32, intermediate_size=64, attention_heads=4, image_size=28
    )
    return dataclasses.replace(whole, text=text, vision=vision)


def place(name: str) -> tuple[int, list[int]]:
    """Orders tensors as the hub's files do: by the parts of the model, and by layers."""
    parts = ("vision_model", "language_model.model.embed", "language_model.model.layers")
    last = ("language_model.model.norm", "language_model.lm_head", "multi_modal_projector")
    part = next(number for number, one in enumerate(parts + last) if name.startswith(one))
    return part, [int(word) for word in name.split(".") if word.isdigit()]


def write(folder: Path, shape: MllamaConfig) -> list[Tensor]:
    """Writes a checkpoint of random numbers, named and cut into files as the hub's; its tensors."""
    parameters = {name: tuple(x.shape) for name, x in named(convert.abstract(shape)).items()}
    tensors = {
        name: Tensor(name, folder, BFLOAT16, one.transform.source_shape(parameters[one.target]), 0)
        for name, one in family_of(shape).names(parameters, shape).wanted.items()
    }
    sizes = {name: tensors[name].nbytes for name in sorted(tensors, key=lambda n: (place(n), n))}
    pool = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(BFLOAT16)
    folder.mkdir()
    shards = []
    for file, names in split(sizes, int(FILE * sum(sizes.values()))).items():
        inside = [dataclasses.replace(tensors[name], file=folder / file) for name in sorted(names)]
        shards.append(Shard(folder / file, {"format": "pt"}, tuple(inside)))
        values = (np.resize(np.roll(pool, n), one.shape) for n, one in enumerate(inside))
        write_shard(shards[-1], values)
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(convert.config_json(shape)))
    return [tensor for shard in shards for tensor in shard.tensors]


def copy(source: Path, out: Path) -> float:
    """Seconds to copy a folder."""
    forget(source)
    started = time.perf_counter()
    out.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, out / path.name)
    sync(out)
    return time.perf_counter() - started


def memory(*names: str) -> list[int]:
    """Bytes of this process, by the kernel's names for them (VmHWM: the peak of the whole)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in names]


def work(source: Path, out: Path, step: str) -> dict[str, Any]:
    """One step, in a process that has done nothing else: seconds, and bytes over the baseline."""
    import jax

    jax.devices()
    convert.read_config(source)  # imports transformers
    checkpoint.save(out.with_suffix(".warm"), {"x": np.zeros(8)})  # starts Orbax and its threads
    shutil.rmtree(out.with_suffix(".warm"))
    whole, own = memory("VmRSS", "RssAnon")
    highest, ended = own, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.wait(0.005):
            highest = max(highest, *memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    held = 0
    if step.startswith("load"):
        model, _ = convert.load(source)
        if jax.default_backend() == "cpu":
            held = sum(array.nbytes for array in named(model).values())
    else:
        convert.to_orbax(source, out, **STEPS[step])
        sync(out)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    (peak,) = memory("VmHWM")
    return {"seconds": seconds, "rss": peak - whole - held, "anonymous": highest - own - held}


def run(source: Path, out: Path, step: str) -> dict[str, Any]:
    """`work`, in a process of its own."""
    forget(source)
    command = [sys.executable, __file__, "--work", source, out, step]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise RuntimeError(f"{step} failed: {child.stderr}")
    return json.loads(child.stdout.splitlines()[-1])


def measure(folder: Path, size: str, rounds: int, steps: list[str]) -> dict[str, Any]:
    """All figures, from a checkpoint beneath `folder`."""
    source, converted, out = folder / "hf", folder / "converted", folder / "out"
    sizes = [tensor.nbytes for tensor in write(source, config(size))]
    total, largest = sum(sizes), max(sizes)
    copies: list[float] = []
    results: dict[str, list[dict[str, Any]]] = {step: [] for step in steps}
    if "load_converted" in steps:
        run(source, converted, "to_orbax")
    for _ in range(rounds):
        copies.append(copy(source, out))
        shutil.rmtree(out)
        for step in steps:
            results[step].append(run(converted if step == "load_converted" else source, out, step))
            shutil.rmtree(out, ignore_errors=True)
    rows = []
    for step, found in results.items():
        stored = 4 if "dtype" in STEPS[step] else 2
        bound = TENSORS * largest * stored // 2 + GIB
        seconds = statistics.median(one["seconds"] for one in found)
        row = {
            "step": step,
            "seconds": [round(one["seconds"], 2) for one in found],
            "megabytes_per_s": total / seconds / 1e6,
            "of_copy": statistics.median(
                whole / one["seconds"] for whole, one in zip(copies, found, strict=True)
            ),
            "rss_bytes": max(one["rss"] for one in found),
            "anonymous_bytes": max(one["anonymous"] for one in found),
            "bound_bytes": bound,
        }
        row["is_within_bound"] = row["rss_bytes"] <= bound
        row["is_fast_enough"] = row["of_copy"] >= RATE
        rows.append(row)
        print(
            f"{step:20} {row['megabytes_per_s']:7.1f} MB/s, {row['of_copy']:.2f} of the copy's "
            f"rate; {row['rss_bytes'] / 1e9:.2f} GB over the baseline, "
            f"{row['anonymous_bytes'] / 1e9:.2f} GB of them its own; bound {bound / 1e9:.2f} GB"
        )
    return {
        "bytes": total,
        "largest_tensor_bytes": largest,
        "tensors": len(sizes),
        "files": len(list(source.glob("*.safetensors"))),
        "copy_seconds": [round(one, 2) for one in copies],
        "copy_megabytes_per_s": total / statistics.median(copies) / 1e6,
        "steps": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("base", "toy"), default="base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, help="a file for the JSON object, too")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        source, out, step = arguments.work
        print(json.dumps(work(Path(source), Path(out), step)))
        return
    needed = 36e9 if arguments.size == "base" else 1e9
    if (free := shutil.disk_usage(arguments.folder).free) < needed:
        parser.error(f"{arguments.folder} has {free / 1e9:.0f} GB free; {needed / 1e9:.0f} wanted")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = measure(Path(folder), arguments.size, arguments.rounds, arguments.steps)
    line = json.dumps(
        {
            "benchmark": "conversion",
            "date": datetime.date.today().isoformat(),
            "device": "cpu",
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")},
            },
            "size": arguments.size,
            "rounds": arguments.rounds,
            **figures,
        }
    )
    if arguments.out:
        arguments.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
