"""BLIP-2's tensors: every one of the real models has its place; tied ones go there and back."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2Config as HfConfig
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Model

import convert
from catp_jax.leaves import named
from catp_jax.models.blip2 import Blip2Config
from catp_jax.models.retrieval import RetrievalConfig
from convert.blip2 import BLIP2
from convert.families import config_json
from tests.convert.folders import SIDE_FILES, edit_config, edit_tensors, hf_folder, tensors_of
from tests.convert.test_reader import assert_same
from tests.parity.tiny_blip2 import CONFIGS, RETRIEVING, tiny

HEAD = "language_model.lm_head.weight"
SHARED = "language_model.shared.weight"
OPT = "language_model.model.decoder.embed_tokens.weight"
ENCODER, DECODER = (f"language_model.{half}coder.embed_tokens.weight" for half in ("en", "de"))

# the names that transformers has besides a tensor's own
REAL = {
    "opt-2.7b": (Blip2Config.opt_2_7b(), 1248, {HEAD}),
    "opt-6.7b": (Blip2Config.opt_6_7b(), 1248, {HEAD}),
    "flan-t5-xl": (Blip2Config.flan_t5_xl(), None, {ENCODER, DECODER}),
    "flan-t5-xxl": (Blip2Config.flan_t5_xxl(), None, {ENCODER, DECODER}),
    "itm-vit-g": (RetrievalConfig.itm_vit_g(), None, set()),
}


def hf_class(config: Blip2Config | RetrievalConfig) -> type:
    if isinstance(config, RetrievalConfig):
        return Blip2ForImageTextRetrieval
    return Blip2ForConditionalGeneration


@pytest.mark.parametrize("preset", REAL)
def test_every_tensor_of_the_real_models_has_its_place(preset: str):
    config, count, twins = REAL[preset]
    with torch.device("meta"):
        state = hf_class(config)(HfConfig.from_dict(config_json(config))).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if count is not None:
        assert len(shapes) == count
    model = convert.abstract(config)
    ours = {name: leaf.shape for name, leaf in named(model).items()}
    found = BLIP2.names(ours, config).match(shapes, ours, preset)
    assert {one.target for one in found.filled.values()} == ours.keys()
    assert {one.source for one in found.twins} == twins
    assert len(found.filled) == len(ours) == len(shapes) - len(twins)
    assert {one.source for one in found.filled.values()} | twins == shapes.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_transformers_own(name: str):
    """A few by hand, since the models that other tests compare are converted by the same code."""
    hf, ours, _ = tiny(name)
    vision, layer = hf.vision_model, hf.qformer.encoder.layer[0]
    pairs = [
        (ours.query_tokens, hf.query_tokens),
        (
            ours.vision_model.embeddings.patch_embedding.kernel,
            vision.embeddings.patch_embedding.weight.permute(1, 2, 3, 0).flatten(0, 2),
        ),
        (
            ours.vision_model.encoder.layers[1].self_attn.qkv.kernel,
            vision.encoder.layers[1].self_attn.qkv.weight.unflatten(0, (3, -1)).permute(2, 0, 1),
        ),
        (
            ours.qformer.encoder.layer[0].crossattention.attention.key.kernel,
            layer.crossattention.attention.key.weight.T,
        ),
        (
            ours.qformer.encoder.layer[0].output_query.LayerNorm.scale,
            layer.output_query.LayerNorm.weight,
        ),
    ]
    if name in RETRIEVING:
        pairs.append((ours.itm_head.kernel, hf.itm_head.weight.T))
    elif name.startswith("opt"):
        theirs = hf.language_model.model.decoder
        mine = ours.language_model.model.decoder
        pairs.append((mine.layers[2].fc2.kernel, theirs.layers[2].fc2.weight.T))
    else:
        theirs = hf.language_model.decoder.block[2].layer[2].DenseReluDense.wo
        mine = ours.language_model.decoder.block[2].layer[2].DenseReluDense.wo
        pairs.append((mine.kernel, theirs.weight.T))
    for mine, theirs in pairs:
        np.testing.assert_array_equal(mine[...], theirs.detach().numpy())


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        *((name, "hub", torch.float32) for name in CONFIGS),
        ("opt", "sharded", torch.bfloat16),
        ("t5 untied", "sharded", torch.float16),
    ],
)
def test_round_trip_gives_back_every_byte(tmp_path: Path, name: str, kind: str, dtype: torch.dtype):
    folder = hf_folder(tmp_path / "hf", kind, dtype, name)
    assert_round_trip(folder, tmp_path)
    model, config = convert.load(tmp_path / "converted")
    assert config == tiny(name)[2]
    if dtype is torch.float32:
        assert_same(model, tiny(name)[1])


def assert_round_trip(folder: Path, tmp_path: Path) -> None:
    convert.to_orbax(folder, tmp_path / "converted")
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files
    same, different, failed = filecmp.cmpfiles(folder, tmp_path / "again", files, shallow=False)
    assert (sorted(same), different, failed) == (files, [], [])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_write_is_loaded_by_transformers(tmp_path: Path, name: str):
    hf, ours, config = tiny(name)
    raw = convert.config_json(config)
    side = hf_folder(tmp_path / "side", name=name)
    convert.write_hf(ours, raw, tmp_path / "out", max_shard_bytes=40_000, side_files=side)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert all((tmp_path / "out" / file).exists() for file in SIDE_FILES)
    loaded, info = type(hf).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for key, tensor in hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    if name.startswith("t5"):
        assert loaded.config.text_config.scale_decoder_outputs is config.text.scale_decoder_outputs
    again, same = convert.load(tmp_path / "out")
    assert same == config
    assert_same(again, ours)


def test_config_that_transformers_writes_fits_a_t5_with_a_head_of_its_own(tmp_path: Path):
    """It says that the head is tied."""
    _, ours, config = tiny("t5 untied")
    raw = json.loads((hf_folder(tmp_path / "hf", name="t5 untied") / "config.json").read_text())
    assert raw["text_config"]["tie_word_embeddings"] is True
    convert.write_hf(ours, raw, tmp_path / "out")
    assert convert.load(tmp_path / "out")[1] == config


def test_save_of_the_base_class_is_the_whole_model(tmp_path: Path):
    hf, ours, _ = tiny("opt")
    base = Blip2Model(hf.config)
    base.load_state_dict(hf.state_dict())
    base.save_pretrained(tmp_path / "hf")
    assert_same(convert.load(tmp_path / "hf")[0], ours)


@pytest.mark.parametrize(
    ("name", "also"),
    [("opt", {HEAD: OPT}), ("t5", {HEAD: SHARED, ENCODER: SHARED, DECODER: SHARED})],
)
def test_second_names_of_tied_weights_go_there_and_back(
    tmp_path: Path, name: str, also: dict[str, str]
):
    folder = hf_folder(tmp_path / "hf", name=name)
    tensors = tensors_of(folder)
    added = {second: tensors[first].clone() for second, first in also.items()}
    save_file(tensors | added, folder / "model.safetensors", {"format": "pt"})
    model, report = convert.load_hf(folder)
    assert_same(model, tiny(name)[1])
    assert {row.source for row in report.rows} == tensors.keys() | also.keys()
    assert_round_trip(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("opt", OPT, HEAD), ("t5", SHARED, DECODER), ("t5 untied", SHARED, ENCODER)],
)
def test_second_name_alone_will_do(tmp_path: Path, name: str, first: str, second: str):
    """As older versions saved some."""
    folder = hf_folder(tmp_path / "hf", name=name)
    tensors = tensors_of(folder)
    tensors[second] = tensors.pop(first)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_same(convert.load(folder)[0], tiny(name)[1])
    assert_round_trip(folder, tmp_path)


@pytest.mark.parametrize(("name", "second"), [("opt", HEAD), ("t5", ENCODER), ("t5", DECODER)])
def test_tied_weights_that_differ_are_refused(tmp_path: Path, name: str, second: str):
    folder = hf_folder(tmp_path / "hf", name=name)
    first = OPT if name == "opt" else SHARED
    different = tensors_of(folder)[first].clone()
    different[-1, -1] += 1
    edit_tensors(folder, **{second.replace(".", "__"): different})
    with pytest.raises(ValueError, match=f"{second} differs from {first}"):
        convert.load(folder)


def test_head_that_config_json_calls_untied_must_be_there(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", name="opt untied")
    edit_tensors(folder, **{HEAD.replace(".", "__"): None})
    with pytest.raises(ValueError, match="set tie_word_embeddings to true") as error:
        convert.load(folder)
    assert f"1 missing: {HEAD}" in str(error.value)


@pytest.mark.parametrize("name", ["opt", "retrieval"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_qformer_stays_float32(tmp_path: Path, name: str, dtype: str):
    folder = hf_folder(tmp_path / "hf", name=name)
    report = convert.to_orbax(folder, tmp_path / "converted", dtype=dtype)
    loaded = {
        "there": convert.load(folder, dtype=dtype)[0],
        "converted": convert.load(tmp_path / "converted")[0],
        "cast later": convert.load(tmp_path / "converted", dtype=dtype)[0],
    }
    for model in loaded.values():
        for parameter, array in named(model).items():
            wide = parameter.startswith(("qformer.", "query_tokens"))
            assert array.dtype == (jnp.float32 if wide else jnp.dtype(dtype)), parameter
    for row in report.rows:
        wide = row.target.startswith(("qformer.", "query_tokens"))
        assert row.stored_dtype == ("float32" if wide else dtype)
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    for key, tensor in tensors_of(tmp_path / "again").items():
        wide = key.startswith(("qformer.", "query_tokens"))
        assert tensor.dtype is (torch.float32 if wide else getattr(torch, dtype)), key


def test_qformer_of_a_narrow_checkpoint_is_widened_when_loaded(tmp_path: Path):
    """transformers saves it as it was cast; on disk it stays so."""
    folder = hf_folder(tmp_path / "hf", "hub", torch.bfloat16, "opt")
    convert.to_orbax(folder, tmp_path / "converted")
    for place in (folder, tmp_path / "converted"):
        model, _ = convert.load(place)
        assert model.qformer.layernorm.scale.dtype == jnp.float32
        assert model.query_tokens.dtype == jnp.float32
        assert model.language_projection.kernel.dtype == jnp.bfloat16


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", name="retrieval")
    edit_tensors(
        folder,
        qformer__embeddings__position_ids=torch.arange(26)[None],
        embeddings__position_ids=torch.arange(26)[None],
        vision_model__embeddings__position_ids=torch.arange(10)[None],
    )
    model, report = convert.load_hf(folder)
    assert_same(model, tiny("retrieval")[1])
    assert {left.reason for left in report.ignored} == {"numbers of positions, which are computed"}
    assert len(report.ignored) == 3


def test_weights_that_are_whole_numbers_are_refused(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", name="opt")
    edit_tensors(folder, query_tokens=torch.ones(1, 7, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"other types than float32.*query_tokens \(int64\)"):
        convert.load(folder)


@pytest.mark.parametrize(
    ("name", "claimed", "hint"),
    [
        ("opt", "Blip2ForImageTextRetrieval", "write Blip2ForConditionalGeneration there"),
        ("retrieval", "Blip2ForConditionalGeneration", "write Blip2ForImageTextRetrieval into"),
    ],
)
def test_wrong_architecture_is_hinted_at(tmp_path: Path, name: str, claimed: str, hint: str):
    folder = hf_folder(tmp_path / "hf", name=name)
    edit_config(folder, "", architectures=[claimed])
    edit_config(folder, "qformer_config", use_qformer_text_input=True)
    with pytest.raises(ValueError, match=hint):
        convert.load(folder)


def test_names_of_the_original_code_are_explained(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", name="opt")
    edit_tensors(folder, visual_encoder__cls_token=torch.zeros(3))
    with pytest.raises(ValueError, match=r"named as in LAVIS \(visual_encoder.cls_token\)"):
        convert.load(folder)


@pytest.mark.usefixtures("with_torch")
def test_pickles_are_made_safetensors_by_the_lines_of_the_error(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", name="t5 untied")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only as PyTorch pickles") as error:
        convert.load(folder)
    lines = [line[4:] for line in str(error.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 4
    script = "\n".join(lines).replace("NEW_FOLDER", str(tmp_path / "new"))
    script = script.replace("FOLDER", str(folder))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_same(convert.load(tmp_path / "new")[0], tiny("t5 untied")[1])


def test_manifest_names_the_kind_of_model(tmp_path: Path):
    convert.to_orbax(hf_folder(tmp_path / "hf", name="t5"), tmp_path / "converted")
    path = tmp_path / "converted" / "catp_jax.json"
    content = json.loads(path.read_text())
    assert content["model_type"] == "blip-2"
    path.write_text(json.dumps(content | {"model_type": "llava"}))
    with pytest.raises(ValueError, match=r"model type llava, this version reads .* mllama, blip-2"):
        convert.load(tmp_path / "converted")


def test_model_and_config_to_be_written_must_fit(tmp_path: Path):
    _, ours, _ = tiny("opt")
    for other in ("opt untied", "t5", "retrieval"):
        with pytest.raises(ValueError, match="describes another model"):
            convert.write_hf(ours, convert.config_json(tiny(other)[2]), tmp_path / "out")
