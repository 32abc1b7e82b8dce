"""What is stored stays what it was: changed bytes, an edited manifest, numbers that are none."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
from catp_jax.doctor import weights
from catp_jax.leaves import named
from tests.convert.folders import edit_config, edit_tensors, hf_folder, tensors_of
from tests.convert.test_converted import flip_a_byte
from tests.convert.test_names import edit_manifest

EMBEDDING = "language_model.model.embed_tokens.weight"
NORM = "language_model.model.norm.weight"


def endless(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_that_are_not_finite_are_found_in_both_kinds_of_folder(tmp_path: Path, dtype):
    folder = hf_folder(tmp_path / "hf", dtype=dtype)
    assert [one.level for one in weights(folder)] == ["ok"]
    tensors = tensors_of(folder)
    bad = {
        EMBEDDING: endless(tensors[EMBEDDING], float("nan")),
        NORM: endless(tensors[NORM], float("-inf")),
    }
    edit_tensors(folder, **{name.replace(".", "__"): tensor for name, tensor in bad.items()})
    convert.to_orbax(folder, tmp_path / "converted")
    for place, names in (
        (folder, (EMBEDDING, NORM)),
        (tmp_path / "converted", ("language_model.embed_tokens.embedding", "language_model.norm")),
    ):
        (one,) = weights(place)
        assert (one.level, "2 tensors have NaN or infinity" in one.text) == ("fail", True)
        assert all(name in one.text for name in names)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = hf_folder(tmp_path_factory.mktemp("values") / "hf")
    number = torch.full_like(tensors_of(folder)[EMBEDDING], 0.123)
    edit_tensors(folder, **{EMBEDDING.replace(".", "__"): number})
    convert.to_orbax(folder, folder.parent / "converted")
    return folder.parent


@pytest.fixture
def converted(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "converted", tmp_path / "converted"))


def test_a_flipped_bit_in_the_data_is_found(converted: Path, tmp_path: Path):
    assert [one.level for one in weights(converted)] == ["ok"]
    flip_a_byte(converted / "weights")
    convert.load(converted)  # which reads no more than it must
    (one,) = weights(converted)
    assert (one.level, "1 parameters are not those" in one.text) == ("fail", True)
    assert "language_model.embed_tokens.embedding" in one.text
    with pytest.raises(ValueError, match=r"weights is damaged: language_model\.embed_tokens"):
        convert.to_hf(converted, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_edited_config_is_noticed(converted: Path, tmp_path: Path):
    edit_config(converted, "text_config", rms_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"config\.json was changed after the conversion"):
        convert.to_hf(converted, tmp_path / "again")
    (one,) = weights(converted)
    assert one.level == "fail"


def reorder(content: dict) -> None:
    for file in content["files"].values():
        file["tensors"].reverse()


EDITS = {
    "another order": reorder,
    "metadata": lambda m: m["files"]["model.safetensors"]["metadata"].update(format="flax"),
    "another type": lambda m: m["dtypes"].update({NORM: "float16"}),
    "what was ignored": lambda m: m.update(ignored=["x"]),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_any_edit_of_the_manifest_is_noticed(converted: Path, tmp_path: Path, change):
    path = converted / "catp_jax.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"catp_jax\.json cannot be read \(it was changed"):
        convert.to_hf(converted, tmp_path / "again")


WRONG = {
    "a tensor twice": (
        lambda m: m["files"]["model.safetensors"]["tensors"].append(NORM),
        "each once",
    ),
    "a tensor less": (lambda m: m["files"]["model.safetensors"]["tensors"].pop(), "each once"),
    "in two files": (
        lambda m: m["files"].update({"x.safetensors": m["files"]["model.safetensors"]}),
        "each once",
    ),
    "nested metadata": (
        lambda m: m["files"]["model.safetensors"].update(metadata={"a": {"b": 1}}),
        "not objects of texts",
    ),
    "metadata that UTF-8 has not": (
        lambda m: m["files"]["model.safetensors"].update(metadata={"a": "\ud800"}),
        "not objects of texts",
    ),
    "another number type": (lambda m: m["dtypes"].update({NORM: "int7"}), "dtypes are not all"),
    "no checksums": (lambda m: m.update(checksums=[]), "checksums are none"),
    "checksums that are none": (lambda m: m["checksums"].update({NORM: "x"}), "checksums are none"),
    **{
        f"{name} of {value!r}": (
            lambda m, name=name, value=value: m.update({name: value}),
            f"{name} is .*, no list of names",
        )
        for name in ("ignored", "ignore_config")
        for value in ([1], "abc", {"a": 1}, None)
    },
    "tensors that are letters": (
        lambda m: (
            m["files"].update({"x.safetensors": {"metadata": {}, "tensors": "ab"}})
            or m["dtypes"].update(a="float32", b="float32")
        ),
        "x.safetensors is .*, no list of names",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_manifest_that_makes_no_sense_is_refused(converted: Path, tmp_path, change, message: str):
    edit_manifest(converted, change)
    with pytest.raises(ValueError, match=message):
        convert.to_hf(converted, tmp_path / "again")


def test_checksums_are_kept_without_being_asked_for(made: Path):
    content = json.loads((made / "converted" / "catp_jax.json").read_text())
    model, _ = convert.load(made / "converted")
    assert content["checksums"] == {
        name: zlib.crc32(np.asarray(array).tobytes()) for name, array in named(model).items()
    }
