"""What a folder's files and the caller say is refused by name, and what is advised works."""

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import catp_jax
import convert
from convert.weights import check_weights_file
from tests.convert.folders import edit_config, edit_tensors, hf_folder, tensors_of
from tests.shallow import shallow

NORM = "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder "hf", and "converted"."""
    folder = tmp_path_factory.mktemp("door")
    convert.to_orbax(hf_folder(folder / "hf"), folder / "converted")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "hf", tmp_path / "hf"))


@pytest.fixture
def converted(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "converted", tmp_path / "converted"))


# --- keys to ignore --------------------------------------------------------------------------


def test_the_advice_about_an_unknown_key_works(folder: Path, tmp_path: Path):
    edit_config(folder, "", sparkle=1)
    with pytest.raises(ValueError, match=r"ignore_config='sparkle'"):
        convert.load_config(folder)
    plain = convert.load_config(folder, ignore_config=["sparkle"])
    assert convert.load_config(folder, ignore_config="sparkle") == plain
    assert convert.load(folder, ignore_config="sparkle")[1] == plain
    convert.load_abstract(folder, ignore_config="sparkle")
    convert.to_orbax(folder, tmp_path / "out", ignore_config="sparkle")
    content = json.loads((tmp_path / "out" / "catp_jax.json").read_text())
    assert content["ignore_config"] == ["sparkle"]
    assert convert.load_config(tmp_path / "out") == plain


def test_so_it_does_for_a_model_with_its_processor(tmp_path: Path):
    folder = Path(shutil.copytree(shallow("mini-blip2-opt"), tmp_path / "mini"))
    edit_config(folder, "", sparkle=1)
    catp_jax.load(folder, ignore_config="sparkle")
    with pytest.raises(ValueError, match="generates text"):
        catp_jax.load_matcher(folder, ignore_config="sparkle")


@pytest.mark.parametrize("keys", [5, [5], ["a", None], [["a"]]])
def test_what_is_no_key_is_refused(folder: Path, keys: Any):
    for load in (convert.load_config, convert.load, convert.load_abstract):
        with pytest.raises(ValueError, match=r"ignore_config has keys of config\.json, got "):
            inspect.unwrap(load)(folder, ignore_config=keys)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "catp_jax.json", "adapter_config.json"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")])
def test_what_is_no_file_is_not_absent(folder: Path, tmp_path: Path, file: str, make: Any):
    (folder / file).unlink(missing_ok=True)
    make(folder / file)
    said = rf"{file} is not a file but (a link to nothing \(gone\)|a folder|a pipe.*); download"
    with pytest.raises(ValueError, match=said):
        convert.load(folder)
    with pytest.raises(ValueError, match=said):
        convert.to_orbax(folder, tmp_path / "out")


@pytest.mark.parametrize("file", ["generation_config.json", "merges.txt", "notes"])
def test_a_link_to_nothing_is_not_left_out_of_a_conversion(
    folder: Path, converted: Path, tmp_path: Path, file: str
):
    for source, convert_to in ((folder, convert.to_orbax), (converted, convert.to_hf)):
        (source / file).unlink(missing_ok=True)
        (source / file).symlink_to("../../blobs/gone")
        with pytest.raises(ValueError, match=rf"{file} is not a file but a link to nothing"):
            convert_to(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_link_to_other_weights_that_are_gone_is_no_matter(folder: Path, tmp_path: Path):
    (folder / "pytorch_model.bin").symlink_to("gone")
    convert.to_orbax(folder, tmp_path / "out")


def test_a_converted_folder_without_its_manifest_is_known(converted: Path):
    (converted / "catp_jax.json").unlink()
    with pytest.raises(ValueError, match=r"its catp_jax\.json is missing"):
        convert.load(converted)


def test_an_adapter_without_weights_is_said_to_have_none(folder: Path):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"adapter_config\.json but no adapter_model\.safetensors"):
        convert.load(folder)


@pytest.mark.parametrize("name", ["\x1b[31m.safetensors", "a\nb.safetensors"])
def test_a_name_that_cannot_be_printed_is_refused_for_that(name: str):
    with pytest.raises(ValueError, match="letters that cannot be printed"):
        check_weights_file(name)


@pytest.mark.parametrize("folder", [None, 5, b"a", "a" * 5000, "a\0b"])
def test_what_is_no_folder_is_refused(folder: Any):
    for load in (convert.load, convert.load_config, convert.load_abstract):
        call: Any = inspect.unwrap(load)
        with pytest.raises(ValueError, match=r"in a folder|is not a folder"):
            call(folder)


# --- number types ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [{}, {"a": 1}, 5, True])
def test_a_number_type_that_is_no_name_is_refused_where_it_counts(
    folder: Path, key: str, value: Any
):
    edit_tensors(folder, **{NORM.replace(".", "__"): tensors_of(folder)[NORM].to(torch.float16)})
    edit_config(folder, "", **{"dtype": None, "torch_dtype": None, key: value})
    with pytest.raises(ValueError, match=r"config\.json has dtype .*; a type's name is wanted"):
        convert.load(folder)
