"""Names that a folder's own files give: none leads out of it or to a file with another meaning; and
none reaches the terminal as it is.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import catp_jax
import convert
from convert.report import Ignored, Report, table
from convert.weights import INDEX, check_weights_file
from tests.command import catp_jax as command
from tests.convert.folders import edit_tensors, hf_folder
from tests.convert.test_reader import assert_same
from tests.parity.tiny import tiny

BAD = {
    "up": "../../victim.safetensors",
    "absolute": "/tmp/victim.safetensors",
    "deeper": "weights/x.safetensors",
    "of Windows": "..\\victim.safetensors",
    "drive": "c:victim.safetensors",
    "the config": "config.json",
    "the manifest": "catp_jax.json",
    "the index": INDEX,
    "the folder": ".",
    "nothing": "",
    "hidden": ".safetensors",
    "a text": "tokenizer.json",
    "NUL": "x\0.safetensors",
    "an escape": "\x1b[2Jx.safetensors",
    "half a character": "\ud800.safetensors",
    "too long": "x" * 250 + ".safetensors",
    "a number": 3,
}


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes catp_jax.json and, as somebody who means it would, its checksum."""
    path = folder / "catp_jax.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder "hf", and "converted"."""
    folder = tmp_path_factory.mktemp("names")
    convert.to_orbax(hf_folder(folder / "hf"), folder / "converted")
    return folder


@pytest.fixture
def converted(made: Path) -> Path:
    """The converted folder, its manifest as it was."""
    path = made / "converted" / "catp_jax.json"
    before = path.read_bytes()
    yield made / "converted"
    path.write_bytes(before)


@pytest.mark.parametrize("name", BAD.values(), ids=BAD)
def test_a_name_that_leads_elsewhere_is_refused(name: Any):
    with pytest.raises(ValueError, match="it names"):
        check_weights_file(name)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_names_of_the_hub_pass(name: str):
    assert check_weights_file(name) == name


@pytest.mark.parametrize("kind", ["up", "absolute", "the config", "an escape"])
def test_neither_index_nor_manifest_writes_or_reads_elsewhere(
    converted: Path, tmp_path: Path, kind
):
    def rename(content: dict[str, Any]) -> None:
        (files,) = content["files"].values()
        content["files"] = {BAD[kind]: files}

    edit_manifest(converted, rename)
    with pytest.raises(ValueError, match=r"catp_jax\.json cannot be read \(it names"):
        convert.to_hf(converted, tmp_path / "deep")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": BAD[kind]}}))
    (tmp_path / "config.json").write_bytes((converted / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"index\.json is corrupt"):
        convert.load(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, "config.json"}


@pytest.mark.parametrize("name", ["a[b]", "a\\b", "a*", "[!x]?"])
def test_a_folder_may_have_any_name(made: Path, tmp_path: Path, name: str):
    """Orbax takes some characters for a pattern, rich for markup."""
    (tmp_path / name).mkdir()
    (tmp_path / "ab").mkdir()  # what a pattern could find
    out = tmp_path / name / name
    done = command("convert", made / "hf", out, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"wrote {out}" in done.stdout
    model, _ = convert.load(out)
    assert_same(model, tiny("gqa")[1])
    convert.to_hf(out, tmp_path / name / "hf")
    catp_jax.checkpoint.save(tmp_path / name / f"by {name}", {"x": torch.ones(3).numpy()})
    assert [*catp_jax.checkpoint.contents(tmp_path / name / f"by {name}")] == ["x"]


def test_no_name_steers_the_terminal(tmp_path: Path):
    ghost = "\x1b[31m[bold]ghost\x1b]0;title\x07"
    folder = hf_folder(tmp_path / "\x1b[7mhf")
    edit_tensors(folder, **{ghost: torch.zeros(2)})
    for words in (("convert", folder, tmp_path / "out"), ("doctor", folder)):
        said = command(*words)
        assert said.returncode == 1
        shown = said.stdout + said.stderr
        assert "\x1b" not in shown
        assert "\\x1b[31m[bold]ghost\\x1b]0;title\\x07" in shown
    console = Console(width=200, record=True)
    report = Report(Path("[red]\x1b[7mx"), "hub", (), (Ignored(ghost, "[b]why"),))
    with console.capture() as shown:
        console.print(table(report))
    assert "\x1b" not in shown.get()
    for said in ("\\x1b[31m[bold]ghost", "[b]why", "[red]\\x1b[7mx"):
        assert said in shown.get()
