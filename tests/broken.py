"""Folders of processors, images and prompts, broken at random from a seed; and what came of them.

    python -m tests.broken --number 2000 --seed 1

An outcome is one of

    clear      a ValueError that names the folder or says what is wrong
    same       accepted, and read as transformers reads it, or as if nothing were broken
    silent     accepted, and read in another way
    traceback  any other exception
    hang       more than `PATIENCE` seconds

Run large by hand and small by the tests. All but the first two are faults.
"""

import argparse
import base64
import io
import json
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import catp_jax
import convert
from catp_jax.readers.blip2 import Blip2Reader
from catp_jax.readers.chat import take_images
from catp_jax.readers.images import read_image
from catp_jax.readers.mllama import MllamaReader
from catp_jax.readers.processor import load_processor
from catp_jax.readers.reading import arrange, special_tokens

ASSETS = Path(catp_jax.__file__).parent / "assets"
MINIS = ("mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision")
CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json",
           "generation_config.json", "tokenizer.json")  # fmt: skip
PATIENCE = 20.0  # seconds
ASKED = "what color is the shape?"
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2.5,
        -0.0,
        1e300,
        10**12,
        10**400,
        float("nan"),
        float("inf"),
    ),
    *("", "a", "</s>", "ü\x00\x1b[31m", "\ud800", "../../x", "LlavaProcessor", "T5Tokenizer"),
    *([], [0], [[]], [None] * 3, ["a", "b"], {}, {"a": 1}, {"height": 8}, {"content": 5}),
)

Case = tuple[str, Callable[[], str]]


def outcome(read: Callable[[], str]) -> tuple[str, str]:
    """What came of a case, and what was said."""
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, said = read(), ""
    except ValueError as error:
        found, said = ("clear" if type(error) is ValueError else "traceback"), repr(error)
    except Exception as error:
        found, said = "traceback", repr(error)
    return ("hang" if time.monotonic() - started > PATIENCE else found), said


# --- processors -------------------------------------------------------------------------------


def processor(rng: np.random.Generator, folder: Path) -> Case:
    """One or two files of a shipped model's processor broken."""
    name = MINIS[rng.integers(len(MINIS))]
    ignored = shutil.ignore_patterns("*.safetensors", "*.md", "*.jsonl")
    shutil.copytree(ASSETS / name, folder, ignore=ignored)
    done = [_break_file(rng, folder) for _ in range(rng.integers(1, 3))]
    return f"{name}: {', '.join(done)}", lambda: _read_processor(folder, name)


def _break_file(rng: np.random.Generator, folder: Path) -> str:
    path = folder / CONFIGS[rng.integers(len(CONFIGS))]
    kind = rng.choice(["gone", "bytes", "cut", "swap", "value", "value", "value", "value", "key"])
    if not path.exists() or kind == "gone":
        path.unlink(missing_ok=True)
        return f"{path.name} gone"
    content = path.read_bytes()
    if kind == "bytes":
        content = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 9)):
            content[place] = rng.integers(256)
    elif kind == "cut":
        content = content[: rng.integers(len(content))]
    elif kind == "swap":
        content = (folder / CONFIGS[rng.integers(len(CONFIGS))]).with_suffix(".json")
        content = content.read_bytes() if content.exists() else b"null"
    else:
        return f"{path.name} {_break_value(rng, path, is_key=kind == 'key')}"
    path.write_bytes(content)
    return f"{path.name} {kind}"


def _break_value(rng: np.random.Generator, path: Path, is_key: bool) -> str:
    """A key taken out, or another value in its place, anywhere in a file."""
    try:
        part = whole = json.loads(path.read_text(errors="replace"))
    except ValueError:
        return "as it was"
    where = []
    while isinstance(part, dict | list) and part:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        key = keys[rng.integers(len(keys))]
        where.append(key)
        if not isinstance(part[key], dict | list) or not part[key] or rng.random() < 0.4:
            break
        part = part[key]
    if not where:
        return "as it was"
    value = VALUES[rng.integers(len(VALUES))]
    if is_key:
        del part[where[-1]]
    else:
        part[where[-1]] = value
    path.write_text(json.dumps(whole))
    return f"{'/'.join(map(str, where))} = {'gone' if is_key else repr(value)}"


def _read_processor(folder: Path, name: str) -> str:
    config = convert.read_config(folder)
    reader: Any = (
        MllamaReader.load(folder, config)
        if name == "mini-llama-vision"
        else Blip2Reader.load(folder, config)
    )
    special_tokens(folder, reader.tokens, reader.has_generation_config, config.text.vocab_size)
    found = _seen(reader.processor)
    if found == _seen(load_processor(ASSETS / name)):
        return "same"
    from transformers import AutoProcessor

    return "same" if found == _seen(AutoProcessor.from_pretrained(folder)) else "silent"


def _seen(processor: Any) -> tuple[Any, ...]:
    """What a processor makes of a question and an image."""
    picture = Image.fromarray(np.arange(63, dtype=np.uint8).reshape(3, 7, 3))
    images = [[picture]] if "max_image_tiles" in repr(processor.image_processor) else [picture]
    pixels = np.asarray(processor.image_processor(images)["pixel_values"][0], np.float32)
    return tuple(processor.tokenizer(ASKED)["input_ids"]), pixels.tobytes()


# --- images -----------------------------------------------------------------------------------


def image(rng: np.random.Generator, folder: Path) -> Case:
    """An image broken, in one of the ways in which images come."""
    width, height = rng.integers(1, 40, 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mode = rng.choice(["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
    form = rng.choice(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "ico"])
    picture = Image.fromarray(pixels)
    with io.BytesIO() as buffer:
        try:
            picture.convert(mode).save(buffer, form)
        except (OSError, ValueError, KeyError):
            picture.save(buffer, form)
        content = bytearray(buffer.getvalue())
    kind = rng.choice(["bytes", "cut", "noise", "twice", "whole", "array"])
    if kind == "bytes":
        for place in rng.integers(0, len(content), rng.integers(1, 20)):
            content[place] = rng.integers(256)
    elif kind == "cut":
        content = content[: rng.integers(len(content))]
    elif kind == "noise":
        content = bytearray(rng.bytes(rng.integers(0, 200)))
    elif kind == "twice":
        content = content[: len(content) // 2] + content
    raw, text = bytes(content), base64.b64encode(content).decode()
    path = folder / f"image.{form}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    way = rng.choice(["path", "bytes", "file", "data", "base64", "record", "cut base64"])
    source: Any = {
        "path": str(path),
        "bytes": raw,
        "file": io.BytesIO(raw),
        "data": f"data:image/{form};base64,{text}",
        "base64": text,
        "record": {"bytes": raw, "path": None},
        "cut base64": text[: rng.integers(len(text) + 1)],
    }[str(way)]
    if kind == "array":
        shape = tuple(int(side) for side in rng.integers(0, 5, rng.integers(0, 5)))
        types = (np.uint8, np.int64, np.float32, bool, complex, "U1", object)
        source = np.zeros(shape, types[rng.integers(len(types))])
        way = f"array {shape} {source.dtype}"
    return f"{form} {mode} {kind} by {way}", lambda: _read_image(source)


def _read_image(source: Any) -> str:
    found = read_image(source)
    return "same" if found.mode == "RGB" and min(found.size) > 0 else "silent"


# --- prompts ----------------------------------------------------------------------------------


def prompt(rng: np.random.Generator, folder: Path) -> Case:
    """A prompt or a chat with a value of any kind somewhere in it."""
    part = {"type": "text", "text": ASKED}
    own = {"type": "image", "image": Image.new("RGB", (2, 2))}
    chat: Any = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [own, dict(part)]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}, part]},
    ]
    value = VALUES[rng.integers(len(VALUES))]
    depth = rng.integers(0, 5)
    holder, key = [chat], 0
    for _ in range(depth):
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        holder, key = inner, keys[rng.integers(len(keys))]
    holder[key] = value
    whole = chat if depth else value
    return f"{value!r} at depth {depth}", lambda: _read_prompt(whole)


def _read_prompt(prompt: Any) -> str:
    _, found = arrange([], prompt, {}, None)
    if isinstance(found, str):
        found.encode()
    else:
        json.dumps(take_images(found, [None] * 9)[0]).encode()
    return "same"


KINDS: dict[str, Callable[[np.random.Generator, Path], Case]] = {
    "processor": processor,
    "image": image,
    "prompt": prompt,
}


def run(kind: str, number: int, seed: int) -> tuple[Counter[str], list[str]]:
    """The outcomes of so many cases of a kind, and the faults among them."""
    counts: Counter[str] = Counter()
    faults = []
    for case in range(number):
        rng = np.random.default_rng([seed, case])
        with tempfile.TemporaryDirectory() as folder:
            name, read = KINDS[kind](rng, Path(folder) / "case")
            found, said = outcome(read)
        counts[found] += 1
        if found not in ("clear", "same"):
            faults.append(f"{kind} {seed}/{case} {found}: {name}: {said}")
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=[*KINDS])
    given = parser.parse_args()
    for kind in given.kind:
        counts, faults = run(kind, given.number, given.seed)
        print(*faults, sep="\n")
        print(kind, given.number, dict(counts))


if __name__ == "__main__":
    main()
