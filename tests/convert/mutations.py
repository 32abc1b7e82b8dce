"""Folders broken at random, by a seed: how each ends that is loaded and sent through a conversion.

clear      a ValueError: one message
same       configuration and numbers are those of the unbroken folder
changed    they are not: the folder says openly that it is another model, as transformers would
           read it, too; of a converted folder, which has checksums, it must not happen
traceback  any other exception
hang       more than some seconds
elsewhere  a file was written outside the output

python -m tests.convert.mutations --number 2000 --seed 1
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import convert
from catp_jax.leaves import named
from tests.convert.folders import SIDE_FILES, hf_folder

SECONDS = 20
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 10**30, 0.5, 1e-30, 1e300, float("inf")),
    *("", "x", "gelu", "../x", "\x1b[31m", "\ud800", "a" * 3000, [], [1], [[]], {}, {"x": 1}),
)
NAMES = (
    *("x", "../../victim.safetensors", "/tmp/victim", "config.json", ""),
    "a\nb.safetensors",
)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list) and len(path) < 4:
            yield from places(value, (*path, key))


def mutate_json(content: Any, rng: random.Random) -> Any:
    """Changes, removes, adds or moves one value, somewhere."""
    content = json.loads(json.dumps(content))
    *path, key = rng.choice([*places(content)])
    part = content
    for step in path:
        part = part[step]
    how = rng.choice(["odd", "odd", "odd", "remove", "add", "swap", "wrap", "name"])
    if how == "remove":
        del part[key]
    elif how == "add" and isinstance(part, dict):
        part[rng.choice(["sparkle", "x", "unsloth_fixed", *part])] = rng.choice(ODD)
    elif how == "swap":
        other = rng.choice([*part]) if isinstance(part, dict) else rng.randrange(len(part))
        part[key], part[other] = part[other], part[key]
    elif how == "wrap":
        part[key] = [part[key]]
    elif how == "name" and isinstance(part, dict):
        part[rng.choice(NAMES)] = part.pop(key)
    else:
        part[key] = rng.choice(ODD)
    return content


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Cuts, doubles, flips or inserts some bytes."""
    at, size = rng.randrange(len(raw) + 1), rng.choice([1, 2, 8, 100])
    how = rng.choice(["cut", "drop", "flip", "insert", "twice"])
    if how == "cut":
        return raw[:at]
    if how == "drop":
        return raw[:at] + raw[at + size :]
    if how == "flip" and at < len(raw):
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
    if how == "twice":
        return raw[:at] + raw[at : at + size] + raw[at:]
    return raw[:at] + rng.randbytes(size) + raw[at:]


def change_text(path: Path, rng: random.Random) -> None:
    """A JSON file: a value, or some bytes."""
    if rng.random() < 0.8:
        path.write_text(json.dumps(mutate_json(json.loads(path.read_bytes()), rng)))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def change_header(path: Path, rng: random.Random) -> None:
    """A safetensors file: its header, by value or by bytes; the length fits or not."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    if rng.random() < 0.8:
        header = json.dumps(mutate_json(json.loads(header), rng)).encode()
    else:
        header = mutate_bytes(header, rng)
    stated = len(header) if rng.random() < 0.9 else rng.choice([0, 7, 2**40, len(raw)])
    path.write_bytes(stated.to_bytes(8, "little") + header + data)


def change_kind(path: Path, rng: random.Random) -> None:
    """Another thing in the place of a file."""
    path.unlink()
    how = rng.choice(["nothing", "folder", "pipe", "link", "loop", "empty"])
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how in ("link", "loop"):
        path.symlink_to(path.name if how == "loop" else "gone")
    elif how == "empty":
        path.touch()


def change_bytes(path: Path, rng: random.Random) -> None:
    """Any file."""
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))


def change_folder(folder: Path, rng: random.Random) -> str:
    """Breaks one file of a folder; says what was done."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix in (".safetensors", ".json") or "weights" in path.parts)
        if path.name not in ("generation_config.json", *SIDE_FILES)
    )
    path = rng.choice(files)
    if rng.random() < 0.1:
        change: Callable[[Path, random.Random], None] = change_kind
    elif "weights" in path.parts:
        change = change_bytes
    else:
        change = change_header if path.suffix == ".safetensors" else change_text
    change(path, rng)
    return f"{change.__name__} {path.relative_to(folder)}"


class Hang(BaseException):
    """It took too long."""


def _hung(*_: object) -> None:
    raise Hang


def outcome(folder: Path, wanted: Any, out: Path) -> tuple[str, str]:
    """How loading and converting end, and what was said."""
    before = signal.signal(signal.SIGALRM, _hung)
    signal.alarm(SECONDS)
    try:
        model, _ = convert.load(folder)
        if (folder / "catp_jax.json").exists():
            convert.to_hf(folder, out)
            model, _ = convert.load(out)
        one, other = named(model), named(wanted)
        same = (model.config, one.keys()) == (wanted.config, other.keys()) and all(
            np.array_equal(array, other[name]) for name, array in one.items()
        )
        return ("same" if same else "changed"), ""
    except Hang:
        return "hang", ""
    except ValueError as error:
        return "clear", str(error)
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(out, ignore_errors=True)


def whole_folders(top: Path) -> dict[str, Path]:
    """Folders of all kinds, to be broken."""
    saved = {"hub": "gqa", "sharded": "gqa", "opt": "opt", "t5": "t5", "lora": "gqa"}
    kinds = {
        kind: hf_folder(top / kind, "sharded" if kind == "sharded" else "hub", name=name)
        for kind, name in saved.items()
    }
    convert.to_orbax(kinds["hub"], top / "converted")
    layer = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    pair = {"A": torch.ones(2, 24), "B": torch.ones(24, 2)}
    save_file(
        {f"{layer}.lora_{half}.weight": tensor for half, tensor in pair.items()},
        kinds["lora"] / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}}
    (kinds["lora"] / "adapter_config.json").write_text(json.dumps(settings | {"bias": "none"}))
    return kinds | {"converted": top / "converted"}


def run(number: int, seed: int, tell: Callable[[str], None] = print) -> collections.Counter[str]:
    """Counts of outcomes of that many broken folders. What is not clear is told."""
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        kinds = whole_folders(top)
        wanted = {kind: convert.load(folder)[0] for kind, folder in kinds.items()}
        victims = sorted(top.parent.glob("victim*"))
        for one in range(seed, seed + number):
            rng = random.Random(one)
            kind = rng.choice([*kinds])
            broken = Path(shutil.copytree(kinds[kind], top / "broken"))
            done = change_folder(broken, rng)
            how, said = outcome(broken, wanted[kind], top / "out")
            counts[f"{kind} {how}"] += 1
            if how not in ("clear", "same"):
                tell(f"seed {one}: {kind}, {done}: {how}\n{said}")
            shutil.rmtree(broken)
            if len([*top.iterdir()]) != len(kinds) or sorted(top.parent.glob("victim*")) != victims:
                counts["elsewhere"] += 1
                tell(f"seed {one}: {kind}, {done}: elsewhere")
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(json.dumps(run(asked.number, asked.seed)))


if __name__ == "__main__":
    main()
