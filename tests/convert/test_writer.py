"""convert.write_hf: a model of ours becomes a folder that transformers loads."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import MllamaForConditionalGeneration

import convert
from convert import writer
from tests.convert.folders import hf_folder, tensors_of
from tests.convert.test_reader import assert_same
from tests.parity.tiny import tiny


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
