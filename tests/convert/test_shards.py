"""convert.shards, convert.weights: headers read as safetensors reads them; damage is named."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert.shards import read_shard
from convert.weights import INDEX, SINGLE, find_shards
from tests.convert.folders import hf_folder, tensors_of

NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", NUMPY)
def test_bytes_are_those_that_safetensors_reads(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "matrix": torch.randn(3, 5).to(dtype),
        "scalar": torch.tensor(2.5, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "odd": torch.randn(7).to(dtype),
    }
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    (shard,) = find_shards(tmp_path)
    assert shard.metadata == {"format": "pt"}
    assert {tensor.name for tensor in shard.tensors} == set(tensors)
    for tensor in shard.tensors:
        mapped = tensor.values()
        assert mapped.dtype == NUMPY[dtype]
        assert mapped.shape == tuple(tensors[tensor.name].shape)
        np.testing.assert_array_equal(
            mapped.astype(np.float32), tensors[tensor.name].float().numpy()
        )


def test_file_that_shrinks_meanwhile_is_named(tmp_path: Path):
    save_file({"x": torch.randn(11, 5)}, tmp_path / SINGLE)
    ((tensor,),) = [shard.tensors for shard in find_shards(tmp_path)]
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors ended within x"):
        tensor.values()


def test_shards_make_one_checkpoint(tmp_path: Path):
    hf_folder(tmp_path / "hf", "sharded")
    files = find_shards(tmp_path / "hf")
    assert len(files) > 2
    found = {tensor.name: tensor for shard in files for tensor in shard.tensors}
    reference = tensors_of(tmp_path / "hf")
    assert found.keys() == reference.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.values(), reference[name].numpy())


def write(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(
        (len(header) if length is None else length).to_bytes(8, "little") + header + data
    )


def entry(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


DAMAGED = {
    "empty": (lambda path: path.write_bytes(b""), "truncated: 0 bytes"),
    "seven bytes": (lambda path: path.write_bytes(b"1234567"), "truncated: 7 bytes"),
    "header beyond file": (lambda path: write(path, b"{}", length=99), "header claims 99 bytes"),
    "no header": (lambda path: path.write_bytes(b"\xff" * 100), "no safetensors file"),
    "not JSON": (lambda path: write(path, b"{]"), "corrupt: its header cannot be read"),
    "not UTF-8": (lambda path: write(path, b'{"\xff": 1}'), "corrupt: its header cannot be read"),
    "a list": (lambda path: write(path, b"[]"), "it is not a JSON object"),
    "no shape": (lambda path: write(path, b'{"x": {"dtype": "F32"}}'), "'shape'"),
    "not an entry": (lambda path: write(path, b'{"x": 3}'), "header cannot be read"),
    "negative": (lambda path: write(path, entry(shape=(-2,)), b"0" * 8), "no count"),
    "size": (lambda path: write(path, entry(shape=(3,)), b"0" * 8), "needs 12 bytes, has 8"),
    "data cut": (lambda path: write(path, entry(), b"0" * 5), "truncated: its tensors end at"),
    "data beyond": (lambda path: write(path, entry(), b"0" * 9), "corrupt: its tensors end at"),
    "gap": (lambda path: write(path, entry(offsets=(8, 16)), b"0" * 16), "x starts at byte"),
    "quantised": (lambda path: write(path, entry("F8_E4M3", (8,)), b"0" * 8), "F8_E4M3"),
    "LFS pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_named(tmp_path: Path, damage, message: str):
    path = tmp_path / SINGLE
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        read_shard(path)
    assert str(path) in str(error.value)


def test_all_faults_of_a_sharded_folder_are_listed(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", "sharded")
    first, second, third, *_ = sorted(folder.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    index = json.loads((folder / INDEX).read_text())
    moved = next(name for name, file in index["weight_map"].items() if file == third.name)
    del index["weight_map"][moved]
    index["weight_map"]["ghost"] = third.name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not whole") as error:
        find_shards(folder)
    said = str(error.value)
    assert f"{first} is missing" in said
    assert f"{second} is truncated" in said
    assert f"{third} has no ghost" in said
    assert f"{third} has {moved}, which {INDEX} puts nowhere" in said


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"weight_map": {}}', '{"weight_map": {"x": "../../etc/passwd"}}', "[]"],
)
def test_corrupt_index_is_named(tmp_path: Path, content: str):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{INDEX} is corrupt"):
        find_shards(tmp_path)


def test_folder_without_safetensors_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(ValueError, match=f"looked for {SINGLE} and {INDEX}"):
        find_shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"only as PyTorch pickles \(pytorch_model.bin\)") as error:
        find_shards(tmp_path)
    assert "save_pretrained" in str(error.value)
    with pytest.raises(ValueError, match="is not a folder"):
        find_shards(tmp_path / "nowhere")
