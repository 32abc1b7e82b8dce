"""convert.write_hf: a model of ours becomes a folder that transformers loads."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import MllamaForConditionalGeneration

import convert
from catp_jax.leaves import fill, named
from convert import writer
from tests.convert.folders import hf_folder, tensors_of
from tests.convert.test_reader import assert_same
from tests.parity.tiny import tiny
from tests.parity.tiny_blip2 import tiny as tiny_blip2


def test_trained_model_becomes_a_folder_that_transformers_loads(tmp_path: Path):
    _, ours, config = tiny("mha")
    raw = convert.config_json(config, eos_token_id=[3, 4])
    convert.write_hf(ours, raw, tmp_path / "one", side_files=hf_folder(tmp_path / "side"))
    convert.write_hf(ours, raw, tmp_path / "many", max_shard_bytes=10_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert (tmp_path / "one" / "chat_template.jinja").exists()
    for name in ("one", "many"):
        loaded, info = MllamaForConditionalGeneration.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info.values())
        assert loaded.config.text_config.eos_token_id == [3, 4]
        for key, tensor in tiny("mha")[0].state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor)
        again, _ = convert.load(tmp_path / name)
        assert_same(again, ours)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_can_be_stored_in_16_bits_and_are_read_as_what_they_were(
    tmp_path: Path, stored: torch.dtype
):
    theirs, ours, config = tiny("mha")
    kind = str(stored).removeprefix("torch.")
    convert.write_hf(ours, convert.config_json(config), tmp_path / "out", dtype=kind)
    files = tensors_of(tmp_path / "out")
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in theirs.state_dict().items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], tensor.to(stored).float())
    assert {tensor.dtype for tensor in files.values()} == {stored}
    read, _ = convert.load(tmp_path / "out")
    rounded = jax.tree.map(lambda x: x.astype(kind).astype(x.dtype), nnx.state(ours))
    for own, wanted in zip(jax.tree.leaves(nnx.state(read)), jax.tree.leaves(rounded), strict=True):
        assert own.dtype == wanted.dtype == np.float32
        np.testing.assert_array_equal(own, wanted)


@pytest.mark.parametrize("name", ["mha", "opt"])
def test_only_weights_of_float32_are_stored_in_fewer_bits(tmp_path: Path, name: str):
    """config.json could not say of others that they are to be read as what they were."""
    folder = hf_folder(tmp_path / "hf", dtype=torch.bfloat16, name=name)
    ours, config = convert.load(folder)  # of BLIP-2 the Q-Former is float32
    wanted = "bfloat16 and float32" if name == "opt" else "bfloat16"
    with pytest.raises(ValueError, match=f"this one's are {wanted}; leave dtype out"):
        convert.write_hf(ours, convert.config_json(config), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_every_number_type_that_config_json_names_is_what_is_read(tmp_path: Path):
    _, ours, config = tiny("mha")
    raw: dict[str, Any] = convert.config_json(config, dtype="bfloat16")
    raw["torch_dtype"] = "bfloat16"
    convert.write_hf(ours, raw, tmp_path / "out", dtype="float16")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [said["dtype"], said["torch_dtype"], said["text_config"]["dtype"]] == ["float32"] * 3
    assert raw["torch_dtype"] == raw["text_config"]["dtype"] == "bfloat16"
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert {x.dtype for x in jax.tree.leaves(nnx.state(convert.load(tmp_path / "out")[0]))} == {
        np.dtype(np.float32)
    }


def with_values(model: Any, ends: str, value: float) -> Any:
    """The model with the first number changed of each parameter whose name ends so."""
    changed = {
        name: array.at[(0,) * array.ndim].set(value) if name.endswith(ends) else array
        for name, array in named(model).items()
    }
    return fill(model, changed)


def test_t5s_second_matrices_keep_numbers_that_float16_cannot_hold(tmp_path: Path):
    _, ours, config = tiny_blip2("t5")
    large = with_values(ours, ".DenseReluDense.wo.kernel", 70_000.0)
    convert.write_hf(large, convert.config_json(config), tmp_path / "out", dtype="float16")
    for name, tensor in tensors_of(tmp_path / "out").items():
        is_wide = name.endswith(".DenseReluDense.wo.weight")
        assert tensor.dtype == (torch.float32 if is_wide else torch.float16), name
    read = named(convert.load(tmp_path / "out")[0])
    for name, array in named(large).items():
        wanted = array if name.endswith(".wo.kernel") else array.astype(np.float16)
        np.testing.assert_array_equal(read[name], wanted.astype(np.float32))


@pytest.mark.parametrize(("stored", "value"), [("float16", 70_000.0), ("bfloat16", 3.4e38)])
def test_numbers_too_large_for_the_type_are_refused(tmp_path: Path, stored: str, value: float):
    _, ours, config = tiny("mha")
    large = with_values(ours, "language_model.norm.scale", -value)
    with pytest.raises(ValueError, match=rf"norm\.weight has values up to .*and {stored} holds"):
        convert.write_hf(large, convert.config_json(config), tmp_path / "out", dtype=stored)
    assert not (tmp_path / "out").exists()


def test_model_and_config_to_be_written_must_fit(tmp_path: Path):
    _, ours, _ = tiny("mha")
    with pytest.raises(ValueError, match="describes another model"):
        convert.write_hf(ours, convert.config_json(tiny("gqa")[2]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_are_cut_where_they_would_grow_too_large():
    files = writer.split({"a": 20, "b": 4, "c": 36}, max_shard_bytes=24)
    assert [*files.values()] == [["a", "b"], ["c"]]
    assert [*files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert [*writer.split({"a": 20}, 1000)] == ["model.safetensors"]
