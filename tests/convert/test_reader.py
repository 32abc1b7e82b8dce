"""convert.load_hf and convert.load: every layout, any number type, onto a mesh, without torch."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

import catp_jax
import convert
from catp_jax import leaves
from catp_jax.leaves import named
from catp_jax.models.mllama import Mllama
from convert import reader
from tests.convert.folders import SAVES, edit_config, edit_tensors, hf_folder
from tests.parity.tiny import tiny

MINI = Path(catp_jax.__file__).parent / "assets" / "mini-llama-vision"


def assert_same(one: Mllama, other: Mllama) -> None:
    mine, theirs = named(one), named(other)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("kind", SAVES)
def test_every_layout_is_the_same_model(tmp_path: Path, kind: str):
    model, report = convert.load_hf(hf_folder(tmp_path / "hf", kind))
    assert_same(model, tiny("gqa")[1])
    hf, _, config = tiny("gqa")
    assert model.config == config
    state = hf.state_dict()
    assert len(report.rows) == len(state)
    assert report.nbytes == sum(tensor.numel() * 4 for tensor in state.values())
    assert report.layout == ("transformers 5" if kind == "transformers 5" else "hub")


def test_parameters_are_transformers_own(tmp_path: Path):
    """A few by hand, since the models that other tests compare are converted by the same code."""
    hf, ours, _ = tiny("gqa")
    vision = hf.model.vision_model
    for mine, theirs in [
        (ours.lm_head.kernel, hf.lm_head.weight.T),
        (ours.language_model.embed_tokens.embedding, hf.model.language_model.embed_tokens.weight),
        (
            ours.language_model.layers[1].cross_attn.k_proj.kernel,
            hf.model.language_model.layers[1].cross_attn.k_proj.weight.T,
        ),
        (
            ours.vision_model.patch_embedding.kernel,
            vision.patch_embedding.weight.permute(1, 2, 3, 0).flatten(0, 2),
        ),
        (
            ours.vision_model.global_transformer.layers[1].gate_ffn,
            vision.global_transformer.layers[1].gate_ffn,
        ),
    ]:
        np.testing.assert_array_equal(mine[...], theirs.detach().numpy())


def test_number_type_is_kept(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", dtype=torch.bfloat16)
    model, report = convert.load_hf(folder)
    assert {a.dtype for a in named(model).values()} == {jnp.dtype(jnp.bfloat16)}
    assert {(row.dtype, row.stored_dtype) for row in report.rows} == {("bfloat16", "bfloat16")}


def test_number_type_can_be_chosen(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", dtype=torch.bfloat16)
    model, config = convert.load(folder, dtype="float32")
    assert config == model.config
    reference = named(tiny("gqa")[1])
    for name, array in named(model).items():
        assert array.dtype == jnp.float32
        wanted = reference[name].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("dtype", ["int8", "float64", "blue"])
def test_number_type_that_weights_cannot_have_is_refused(tmp_path: Path, dtype: str):
    with pytest.raises(ValueError, match=r"wanted: float32, float16, bfloat16"):
        convert.load(hf_folder(tmp_path / "hf"), dtype=dtype)


def on_mesh(abstract: Mllama) -> Mllama:
    """Splits every axis of a matrix that 4 devices divide, rows before columns."""
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [None] * leaf.ndim
        for axis, size in enumerate(leaf.shape):
            if leaf.ndim > 1 and size % 4 == 0 and "fsdp" not in axes:
                axes[axis] = "fsdp"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)


def test_weights_go_straight_onto_a_mesh(tmp_path: Path):
    model, _ = convert.load(hf_folder(tmp_path / "hf"), place=on_mesh)
    kernel = model.language_model.layers[0].mlp.up_proj.kernel[...]
    assert kernel.sharding.spec == PartitionSpec("fsdp", None)
    assert kernel.addressable_shards[0].data.shape == (6, 20)
    assert_same(model, tiny("gqa")[1])


def test_slice_that_several_devices_hold_is_read_once(tmp_path: Path, monkeypatch):
    mesh = jax.make_mesh((2, 4), ("fsdp", "data"), devices=jax.devices())

    def place(abstract: Mllama) -> Mllama:
        def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = ["fsdp" if leaf.ndim == 2 and leaf.shape[0] % 2 == 0 else None]
            sharding = NamedSharding(mesh, PartitionSpec(*axes[: leaf.ndim]))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(one, abstract)

    copied, copy = [], reader.copy

    def count(*arguments: Any) -> np.ndarray:
        array = copy(*arguments)
        copied.append(array.size)
        return array

    monkeypatch.setattr(reader, "copy", count)
    model, report = convert.load_hf(hf_folder(tmp_path / "hf"), place=place)
    assert 4 * sum(copied) == report.nbytes
    assert len(copied) > len(report.rows)  # some are split in two
    assert_same(model, tiny("gqa")[1])


@pytest.mark.parametrize("threads", [1, 4])
def test_any_number_of_threads_reads_the_same(tmp_path: Path, monkeypatch, threads: int):
    monkeypatch.setattr(leaves, "READERS", threads)
    monkeypatch.setattr(leaves, "AHEAD", 5000)
    monkeypatch.setattr(leaves, "RUN", 5000)
    model, _ = convert.load_hf(hf_folder(tmp_path / "hf", "sharded"))
    assert_same(model, tiny("gqa")[1])


def test_host_memory_stays_near_one_tensor_beyond_the_model(tmp_path: Path, monkeypatch):
    """NumPy's memory, in which a second copy of the model would show."""
    folder = hf_folder(tmp_path / "hf")
    large = 40_000
    edit_config(folder, "text_config", intermediate_size=large)
    names = {"gate_proj": (large, 24), "up_proj": (large, 24), "down_proj": (24, large)}
    edit_tensors(
        folder,
        **{
            f"language_model__model__layers__{layer}__mlp__{name}__weight": torch.ones(shape)
            for layer in range(5)
            for name, shape in names.items()
        },
    )
    one = large * 24 * 4
    monkeypatch.setattr(leaves, "RUN", one)
    monkeypatch.setattr(leaves, "AHEAD", one)
    tracemalloc.start()
    try:
        model, report = convert.load_hf(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.nbytes > 15 * one
    assert peak < report.nbytes + 3 * one
    del model


def test_tensors_that_do_not_fit_are_listed_at_once(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    edit_tensors(
        folder,
        language_model__model__norm__weight=None,
        vision_model__class_embedding=torch.zeros(17),
        sparkle__weight=torch.zeros(3),
        language_model__model__layers__7__mlp__up_proj__weight=torch.zeros(3),
        language_model__model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(2),
    )
    with pytest.raises(ValueError, match="do not fit") as error:
        convert.load(folder)
    said = str(error.value)
    assert "1 missing: language_model.model.norm.weight" in said
    assert "vision_model.class_embedding (has (17,), wanted (16,))" in said
    assert "2 unknown" in said
    assert "sparkle.weight" in said
    assert "language_model.model.layers.7.mlp.up_proj.weight" in said
    assert "inv_freq" not in said


def test_computed_tensors_of_old_checkpoints_are_ignored(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    edit_tensors(
        folder, language_model__model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(2)
    )
    model, report = convert.load_hf(folder)
    assert_same(model, tiny("gqa")[1])
    (ignored,) = report.ignored
    assert "RoPE frequencies" in ignored.reason


@pytest.mark.parametrize("save", [{}, {"save_original_format": False}])
def test_save_of_the_base_class_names_the_missing_head(tmp_path: Path, save: dict):
    tiny("gqa")[0].model.save_pretrained(tmp_path / "hf", **save)
    with pytest.raises(ValueError, match="a save of the base class") as error:
        convert.load(tmp_path / "hf")
    name = "lm_head.weight" if save else "language_model.lm_head.weight"  # as it is called there
    assert f"1 missing: {name}" in str(error.value)
    assert "unknown" not in str(error.value)


def test_folder_of_no_model_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(ValueError, match=r"looked for config\.json .* and catp_jax\.json"):
        convert.load(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        convert.load(tmp_path / "nowhere")


@pytest.mark.usefixtures("with_torch")
def test_no_torch_is_needed_and_orbax_for_converted_folders_only(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    script = f"""
import sys
sys.modules["torch"] = None  # importing it raises
import catp_jax, convert
catp_jax.load({str(MINI)!r})
assert not [name for name in sys.modules if name.partition(".")[0] == "orbax"]
convert.to_orbax({str(folder)!r}, {str(tmp_path / "converted")!r})
convert.to_hf({str(tmp_path / "converted")!r}, {str(tmp_path / "again")!r})
model, config = convert.load({str(tmp_path / "converted")!r})
assert config.text.hidden_size == 24
assert {{"safetensors", "torch"}} & {{n for n, m in sys.modules.items() if m}} <= {{"safetensors"}}
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
