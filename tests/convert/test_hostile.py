"""Folders that would hang or exhaust a reader end in one message, before any weights are read."""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import catp_jax
import convert
from convert import reader, weights
from convert.weights import INDEX, SINGLE
from tests.command import catp_jax as command
from tests.convert.folders import edit_config, hf_folder
from tests.convert.test_shards import write
from tests.parity.tiny_blip2 import CONFIGS as BLIP2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hf_folder(tmp_path / "hf")


SIZES = {
    "layers": ("text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "tower": ("vision_config", {"num_hidden_layers": 1001}, "num_hidden_layers is 1001"),
    "global layers": ("vision_config", {"num_global_layers": 10**9}, "num_global_layers is"),
    "words": ("text_config", {"vocab_size": 10**30}, "vocab_size is 10"),
    "width": ("text_config", {"intermediate_size": 2**31}, "intermediate_size is 2147483648"),
    "positions": ("text_config", {"max_position_embeddings": 10**300}, "max_position"),
    "tiles": ("vision_config", {"max_num_tiles": 10**18}, "max_num_tiles"),
    "image": ("vision_config", {"image_size": 10**12}, "image_size is 10"),
}


@pytest.mark.parametrize(("part", "keys", "message"), SIZES.values(), ids=SIZES)
def test_sizes_that_no_model_has_are_refused_at_once(folder: Path, part, keys, message: str):
    edit_config(folder, part, **keys)
    started = time.process_time()
    with pytest.raises(ValueError, match=message):
        convert.load(folder)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_so_are_those_of_other_families(tmp_path: Path, name: str):
    folder = hf_folder(tmp_path / "hf", name=next(one for one in BLIP2 if name in one))
    layers = {"num_layers": 10**9, "num_decoder_layers": 10**9, "num_hidden_layers": 10**9}
    keys = layers if name == "t5" else {"num_hidden_layers": 10**9}
    edit_config(folder, "text_config", **keys)
    edit_config(folder, "qformer_config", num_hidden_layers=10**9)
    with pytest.raises(ValueError, match=r"qformer_config: num_hidden_layers is 1000000000"):
        convert.load(folder)


def as_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def as_dead_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("../blobs/gone")


def as_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


THINGS = {
    "a pipe": (as_pipe, "a pipe, socket or device"),
    "a folder": (as_folder, "a folder"),
    "a dead link": (as_dead_link, r"a link to nothing \(\.\./blobs/gone\)"),
    "a device": (as_device, "a pipe, socket or device"),
}


@pytest.mark.parametrize("name", [SINGLE, INDEX, "a shard"])
@pytest.mark.parametrize(("make", "message"), THINGS.values(), ids=THINGS)
def test_what_is_no_file_is_said(tmp_path: Path, make, message: str, name: str):
    folder = hf_folder(tmp_path / "hf", "hub" if name == SINGLE else "sharded")
    make(folder / (sorted(folder.glob("*.safetensors"))[1].name if name == "a shard" else name))
    with pytest.raises(ValueError, match=f"is not a file that can be read, but {message}"):
        convert.load(folder)


@pytest.mark.parametrize("name", ["config.json", "catp_jax.json"])
@pytest.mark.parametrize("make", [as_pipe, as_folder, as_dead_link, as_device])
def test_nor_does_a_config_or_a_manifest_that_is_none_hang(tmp_path: Path, make, name: str):
    folder = tmp_path / "hf"
    folder.mkdir()
    make(folder / name)
    with pytest.raises(ValueError, match=f"{name} is not a file but "):
        convert.load(folder)


def test_a_header_of_too_many_tensors_says_so(tmp_path: Path):
    header = {
        f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(50_001)
    }
    write(tmp_path / SINGLE, json.dumps(header).encode())
    with pytest.raises(ValueError, match="has 50001 tensors; at most 50000 are read"):
        weights.find_shards(tmp_path)


def test_an_index_of_too_many_tensors_says_so(tmp_path: Path):
    listed = {f"x{n}": "model-1.safetensors" for n in range(50_001)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ValueError, match="lists 50001 tensors; at most 50000 are read"):
        weights.find_shards(tmp_path)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No header, and no weights."""

    def read(*_: object) -> None:
        pytest.fail("weights were looked at")

    monkeypatch.setattr(weights, "read_shard", read)
    monkeypatch.setattr(reader, "copy", read)


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def deep(out: Path) -> Path:
    return out / "deep" / "er"


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    "to", [lambda out: out.parent, deep, lambda out: out], ids=["there", "deep", "not"]
)
def test_an_output_that_cannot_be_made_is_noticed_first(
    folder: Path, tmp_path: Path, monkeypatch, to: Callable[[Path], Path]
):
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(
        ValueError, match=r"Read-only file system|exists already|there is no folder"
    ):
        convert.to_orbax(folder, to(tmp_path / "out"))
    with pytest.raises(
        ValueError, match=r"Read-only file system|exists already|there is no folder"
    ):
        convert.to_hf(folder, to(tmp_path / "out"))


@pytest.mark.usefixtures("unread")
def test_a_config_that_is_not_supported_is_said_before_weights_are_looked_at(folder: Path):
    edit_config(folder, "text_config", hidden_act="mish")
    with pytest.raises(ValueError, match="hidden_act is 'mish'"):
        convert.load(folder)


def test_too_little_memory_is_one_line(folder: Path, tmp_path: Path, monkeypatch):
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reader, "copy", exhausted)
    done = command("convert", folder, tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "catp-jax: the host's memory is full; use a machine with more\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def without_processor(folder: Path) -> None:
    for name in ("tokenizer.json", "processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()


EARLY: dict[str, tuple[Callable[[Path], None], dict[str, str], str]] = {
    "processor": (without_processor, {}, "tokenizer|processor"),
    "vision mode": (
        lambda folder: None,
        {"vision_mode": "hf"},
        "for Llama 3.2 Vision only",
    ),
    "kind": (
        lambda folder: edit_config(folder, "", architectures=["Blip2ForImageTextRetrieval"]),
        {},
        "load_matcher|use_qformer_text_input",
    ),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("change", "keys", "message"), EARLY.values(), ids=EARLY)
def test_what_needs_no_weights_is_said_before_they_are_read(tmp_path, change, keys, message: str):
    assets = Path(catp_jax.__file__).parent / "assets"
    folder = Path(shutil.copytree(assets / "mini-blip2-opt", tmp_path / "mini"))
    change(folder)
    with pytest.raises(ValueError, match=message):
        catp_jax.load(folder, **keys)


@pytest.mark.usefixtures("unread")
def test_a_matcher_is_not_made_of_what_generates():
    assets = Path(catp_jax.__file__).parent / "assets"
    with pytest.raises(ValueError, match="generates text; load it with load"):
        catp_jax.load_matcher(assets / "mini-blip2-opt")
