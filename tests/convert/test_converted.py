"""Converted folders: the same bytes on a round trip; damage and changes are noticed."""

import filecmp
import json
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MllamaForConditionalGeneration

import convert
from catp_jax import checkpoint, leaves
from catp_jax.leaves import named
from convert.report import table
from tests.convert.folders import (
    SAVES,
    SIDE_FILES,
    edit_config,
    edit_tensors,
    hf_folder,
    tensors_of,
)
from tests.convert.test_reader import assert_same, on_mesh
from tests.parity.tiny import tiny


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_gives_back_every_byte(tmp_path: Path, kind: str, dtype: torch.dtype):
    folder = hf_folder(tmp_path / "hf", kind, dtype)
    there = convert.to_orbax(folder, tmp_path / "converted")
    back = convert.to_hf(tmp_path / "converted", tmp_path / "again")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files
    same, different, failed = filecmp.cmpfiles(folder, tmp_path / "again", files, shallow=False)
    assert (sorted(same), different, failed) == (files, [], [])
    assert {(row.source, row.target, row.file) for row in there.rows} == {
        (row.source, row.target, row.file) for row in back.rows
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "converted", "hf"]


def test_converted_folder_stands_by_itself(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    convert.to_orbax(folder, tmp_path / "converted")
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    model, config = convert.load(tmp_path / "converted")
    assert config == model.config
    assert_same(model, tiny("gqa")[1])
    for name, content in SIDE_FILES.items():
        assert (tmp_path / "converted" / name).read_bytes() == content.encode()
    assert not (tmp_path / "converted" / "original").exists()


def test_transformers_loads_what_comes_back(tmp_path: Path):
    convert.to_orbax(hf_folder(tmp_path / "hf", "sharded"), tmp_path / "converted")
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    loaded, info = MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(info.values())
    for name, tensor in tiny("gqa")[0].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_number_type_is_converted_once(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    report = convert.to_orbax(folder, tmp_path / "converted", dtype="bfloat16")
    assert {(row.dtype, row.stored_dtype) for row in report.rows} == {("float32", "bfloat16")}
    model, _ = convert.load(tmp_path / "converted")
    assert model.lm_head.kernel.dtype == jnp.bfloat16
    wide, _ = convert.load(tmp_path / "converted", dtype="float32")
    assert wide.lm_head.kernel.dtype == jnp.float32
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    original = tensors_of(folder)
    for name, tensor in tensors_of(tmp_path / "again").items():
        assert torch.equal(tensor, original[name].bfloat16())
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert said["dtype"] == "bfloat16"
    assert (
        MllamaForConditionalGeneration.from_pretrained(tmp_path / "again").dtype is torch.bfloat16
    )


def test_index_of_cast_weights_counts_their_bytes(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", "sharded")
    convert.to_orbax(folder, tmp_path / "converted", dtype="bfloat16")
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    before, after = (
        json.loads((place / "model.safetensors.index.json").read_text())
        for place in (folder, tmp_path / "again")
    )
    assert after["weight_map"] == before["weight_map"]
    assert 2 * after["metadata"]["total_size"] == before["metadata"]["total_size"]


def test_weights_go_straight_onto_a_mesh(tmp_path: Path):
    convert.to_orbax(hf_folder(tmp_path / "hf"), tmp_path / "converted")
    model, _ = convert.load(tmp_path / "converted", place=on_mesh)
    kernel = model.language_model.layers[0].mlp.up_proj.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (6, 20)
    assert_same(model, tiny("gqa")[1])


def test_ignored_tensors_leave_the_index_too(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    ghost = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, **{ghost.replace(".", "__"): torch.zeros(2)})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = tensors_of(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = convert.to_orbax(folder, tmp_path / "converted")
    assert [left.source for left in report.ignored] == [ghost]
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == names.keys() - {ghost}
    model, _ = convert.load(tmp_path / "again")
    assert_same(model, tiny("gqa")[1])


def test_table_shows_every_tensor(tmp_path: Path):
    report = convert.to_orbax(hf_folder(tmp_path / "hf"), tmp_path / "converted")
    shown = table(report)
    assert [str(cell) for cell in shown.columns[0].cells] == [row.source for row in report.rows]
    assert [str(cell) for cell in shown.columns[1].cells] == [row.target for row in report.rows]
    assert {row.source for row in report.rows} == tensors_of(tmp_path / "hf").keys()


def test_host_memory_is_bounded_by_the_part(tmp_path: Path, monkeypatch):
    """NumPy's memory while a checkpoint larger than that passes through, there and back."""
    folder = hf_folder(tmp_path / "hf")
    large = 20_000
    edit_config(folder, "text_config", intermediate_size=large)
    shapes = {"gate_proj": (large, 24), "up_proj": (large, 24), "down_proj": (24, large)}
    edit_tensors(
        folder,
        **{
            f"language_model__model__layers__{layer}__mlp__{name}__weight": torch.ones(shape)
            for layer in range(5)
            for name, shape in shapes.items()
        },
    )
    one = large * 24 * 4
    monkeypatch.setattr(leaves, "RUN", 2 * one)
    monkeypatch.setattr(leaves, "AHEAD", one)
    for step, into in [(convert.to_orbax, "converted"), (convert.to_hf, "again")]:
        source = folder if into == "converted" else tmp_path / "converted"
        tracemalloc.start()
        try:
            report = step(source, tmp_path / into)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert report.nbytes > 15 * one
        assert peak < 6 * one, into


def test_wrong_direction_is_said(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"hf is no converted folder: it has no catp_jax\.json"):
        convert.to_hf(folder, tmp_path / "out")
    convert.to_orbax(folder, tmp_path / "converted")
    with pytest.raises(ValueError, match="is converted already"):
        convert.to_orbax(tmp_path / "converted", tmp_path / "out")


def flip_a_byte(weights: Path) -> None:
    """Damages a number of 0.123 in an Orbax checkpoint, which still reads."""
    wanted = np.float32(0.123).tobytes()
    for path in sorted(path for path in weights.rglob("d/*") if path.is_file()):
        content = bytearray(path.read_bytes())
        if wanted in content:
            content[content.index(wanted)] ^= 1
            path.write_bytes(content)
            return
    raise AssertionError("nothing to damage")


def test_verify_finds_a_flipped_byte_and_nothing_is_kept(tmp_path: Path, monkeypatch):
    folder = hf_folder(tmp_path / "hf")
    name = "language_model.model.embed_tokens.weight"
    other = torch.full_like(tensors_of(folder)[name], 0.123)
    edit_tensors(folder, **{name.replace(".", "__"): other})
    save = checkpoint.save_runs

    def save_and_damage(path: Path, *rest) -> None:
        save(path, *rest)
        flip_a_byte(path)

    monkeypatch.setattr(checkpoint, "save_runs", save_and_damage)
    with pytest.raises(ValueError, match=r"1 of .*differently.*: language_model\.embed_tokens"):
        convert.to_orbax(folder, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert.to_orbax(folder, tmp_path / "out")  # who does not ask is not told


@pytest.mark.parametrize("verify", [False, True])
def test_threads_and_parts_change_no_byte(tmp_path: Path, monkeypatch, verify: bool):
    """And progress goes up to the total, which is twice the bytes where all is read back."""
    folder = hf_folder(tmp_path / "hf", "sharded", torch.bfloat16)
    monkeypatch.setattr(leaves, "READERS", 4)
    monkeypatch.setattr(leaves, "AHEAD", 3000)
    monkeypatch.setattr(leaves, "RUN", 3000)
    calls: list[tuple[int, int]] = []
    report = convert.to_orbax(
        folder,
        tmp_path / "out",
        "float32",
        lambda *news: calls.append(news),
        verify=verify,
    )
    total = report.nbytes * (2 if verify else 1)
    assert {whole for _, whole in calls} == {total}
    dones = [done for done, _ in calls]
    assert dones == sorted(set(dones))
    assert dones[-1] == total
    assert len(dones) > 5
    whole, _ = convert.load(tmp_path / "out")
    for name, array in named(tiny("gqa")[1]).items():
        wanted = array.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(named(whole)[name], wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "cannot be read"),
        (lambda m: json.dumps(m | {"format": 99}), "of format 99"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "files"}), "'files'"),
        (lambda m: json.dumps(m | {"layout": "odd"}), "unknown layout 'odd'"),
    ],
)
def test_damaged_manifest_is_named(tmp_path: Path, change, message: str):
    convert.to_orbax(hf_folder(tmp_path / "hf"), tmp_path / "converted")
    path = tmp_path / "converted" / "catp_jax.json"
    path.write_text(change(json.loads(path.read_text())))
    for step in (convert.load, lambda folder: convert.to_hf(folder, tmp_path / "again")):
        with pytest.raises(ValueError, match=message) as error:
            step(tmp_path / "converted")
        assert "catp_jax.json" in str(error.value)


def test_damaged_weights_are_named(tmp_path: Path):
    convert.to_orbax(hf_folder(tmp_path / "hf"), tmp_path / "converted")
    weights = tmp_path / "converted" / "weights"
    data = max((p for p in weights.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ValueError, match="weights is damaged"):
        convert.load(tmp_path / "converted")
    with pytest.raises(ValueError, match="weights is damaged"):
        convert.to_hf(tmp_path / "converted", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "hf"]


def test_config_that_was_changed_afterwards_does_not_fit(tmp_path: Path):
    convert.to_orbax(hf_folder(tmp_path / "hf"), tmp_path / "converted")
    edit_config(tmp_path / "converted", "text_config", intermediate_size=21)
    with pytest.raises(ValueError, match="of another shape") as error:
        convert.load(tmp_path / "converted")
    assert "language_model.layers.0.mlp.up_proj.kernel" in str(error.value)


def test_checkpoint_of_ours_is_what_weights_hold(tmp_path: Path):
    convert.to_orbax(hf_folder(tmp_path / "hf"), tmp_path / "converted")
    _, ours, _ = tiny("gqa")
    assert_same(checkpoint.restore(tmp_path / "converted" / "weights", ours), ours)
