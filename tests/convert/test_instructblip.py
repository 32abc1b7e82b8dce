"""InstructBLIP's tensors and config.json: each has its place, there and back; refusals."""

import dataclasses
import filecmp
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import InstructBlipConfig as HfConfig
from transformers import InstructBlipForConditionalGeneration

import convert
from catp_jax.leaves import named
from catp_jax.models.instructblip import InstructBlipConfig
from convert.blip2 import INSTRUCTBLIP
from convert.families import config_json, parse_config
from tests.convert.folders import edit_config, edit_tensors
from tests.convert.test_reader import assert_same
from tests.parity.tiny_instructblip import CONFIGS, Prompts, tiny, tiny_hf

ENCODER, DECODER = (f"language_model.{half}coder.embed_tokens.weight" for half in ("en", "de"))
REAL = {
    "vicuna-7b": (InstructBlipConfig.vicuna_7b(), set()),
    "vicuna-13b": (InstructBlipConfig.vicuna_13b(), set()),
    "flan-t5-xl": (InstructBlipConfig.flan_t5_xl(), {ENCODER, DECODER}),
    "flan-t5-xxl": (InstructBlipConfig.flan_t5_xxl(), {ENCODER, DECODER}),
}


def saved(folder: Path, name: str, **options: Any) -> Path:
    """A folder of a tiny model as transformers saves it."""
    tiny_hf(name).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("preset", REAL)
def test_every_tensor_of_the_real_models_has_its_place(preset: str):
    config, twins = REAL[preset]
    assert parse_config(config_json(config)) == config
    with torch.device("meta"):
        hf = InstructBlipForConditionalGeneration(HfConfig.from_dict(config_json(config)))
    shapes = {name: tuple(tensor.shape) for name, tensor in hf.state_dict().items()}
    ours = {name: leaf.shape for name, leaf in named(convert.abstract(config)).items()}
    found = INSTRUCTBLIP.names(ours, config).match(shapes, ours, preset)
    assert {one.target for one in found.filled.values()} == ours.keys()
    assert {one.source for one in found.twins} == twins
    assert len(found.filled) == len(ours) == len(shapes) - len(twins)
    assert {one.source for one in found.filled.values()} | twins == shapes.keys()


def test_parameters_are_transformers_own():
    """A few by hand, since the models that other tests compare are converted by the same code."""
    hf, ours, _ = tiny("vicuna grouped")
    theirs, language = hf.qformer.embeddings, hf.language_model.model
    pairs = [
        (ours.qformer.layernorm.scale, theirs.layernorm.weight),
        (ours.embeddings.word_embeddings.embedding, theirs.word_embeddings.weight),
        (ours.embeddings.position_embeddings.embedding, theirs.position_embeddings.weight),
        (
            ours.language_model.model.layers[1].self_attn.k_proj.kernel,
            language.layers[1].self_attn.k_proj.weight.T,
        ),
        (ours.language_model.model.norm.scale, language.norm.weight),
        (ours.language_model.lm_head.kernel, hf.language_model.lm_head.weight.T),
    ]
    for mine, reference in pairs:
        np.testing.assert_array_equal(mine[...], reference.detach().numpy())


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_gives_back_every_byte(tmp_path: Path, name: str):
    folder = saved(tmp_path / "hf", name, max_shard_size="20KB")
    convert.to_orbax(folder, tmp_path / "converted")
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    files = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files
    same, different, failed = filecmp.cmpfiles(folder, tmp_path / "again", files, shallow=False)
    assert (sorted(same), different, failed) == (files, [], [])
    model, config = convert.load(tmp_path / "converted")
    assert config == tiny(name)[2]
    assert_same(model, tiny(name)[1])


@pytest.mark.parametrize("name", ["vicuna grouped", "t5"])
def test_what_we_write_is_loaded_by_transformers(tmp_path: Path, name: str):
    hf, ours, config = tiny(name)
    convert.write_hf(ours, convert.config_json(config), tmp_path / "out")
    loaded, info = type(hf).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for key, tensor in hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert convert.load(tmp_path / "out")[1] == config


def test_only_query_tokens_stay_float32_as_in_transformers(tmp_path: Path):
    folder = saved(tmp_path / "hf", "vicuna")
    assert InstructBlipForConditionalGeneration._keep_in_fp32_modules == ["query_tokens"]
    model, config = convert.load(folder, dtype="bfloat16")
    wide = {name for name, leaf in named(model).items() if leaf.dtype == jnp.float32}
    assert wide == {"query_tokens"}
    inputs = Prompts(config, 0).ours("right")
    logits = jax.eval_shape(lambda model, inputs: model(inputs), model, inputs)
    assert logits.dtype == jnp.bfloat16


def test_frequencies_that_old_checkpoints_hold_are_left_out(tmp_path: Path):
    folder = saved(tmp_path / "hf", "vicuna")
    name = "language_model__model__layers__0__self_attn__rotary_emb__inv_freq"
    edit_tensors(folder, **{name: torch.ones(2)})
    assert_same(convert.load(folder)[0], tiny("vicuna")[1])


# What a hub file of transformers 4 says of a Vicuna; sizes are often the classes' defaults.
HUB_VICUNA: dict[str, Any] = {
    "architectures": ["InstructBlipForConditionalGeneration"],
    "image_token_index": 32001,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "instructblip",
    "num_query_tokens": 32,
    "qformer_config": {"model_type": "instructblip_qformer", "vocab_size": 30523},
    "text_config": {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 1,
        "max_sequence_length": 2048,
        "model_type": "llama",
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float32",
    "use_decoder_only_language_model": True,
    "vision_config": {"model_type": "instructblip_vision_model"},
}


def test_hub_file_is_the_preset():
    assert parse_config(HUB_VICUNA) == InstructBlipConfig.vicuna_7b()
    older = {key: value for key, value in HUB_VICUNA.items() if key != "image_token_index"}
    assert parse_config(older) == dataclasses.replace(
        InstructBlipConfig.vicuna_7b(), image_token_index=None
    )


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"model_type": "opt"}, "language model is 'opt'.*supported: t5, llama"),
        ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ("text_config", {"attention_bias": True}, "attention_bias is true"),
        ("text_config", {"head_dim": 64}, "head_dim is 64"),
        ("text_config", {"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide"),
        ("text_config", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ("qformer_config", {"use_qformer_text_input": False}, "use_qformer_text_input is unknown"),
        ("", {"image_token_index": 40000}, "image_token_index is 40000"),
        ("", {"architectures": ["InstructBlipModel"]}, "a whole model is wanted"),
        (
            "",
            {"model_type": "instructblip_qformer"},
            "instructblip_qformer, a language model or a part",
        ),
    ],
)
def test_what_would_compute_otherwise_is_refused(part: str, change: dict[str, Any], message: str):
    raw = json.loads(json.dumps(HUB_VICUNA))
    (raw[part] if part else raw).update(change)
    with pytest.raises(ValueError, match=message):
        parse_config(raw)


def test_tensors_of_another_kind_are_refused(tmp_path: Path):
    folder = saved(tmp_path / "hf", "t5")
    edit_config(folder, "qformer_config", vocab_size=44)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight \(has \(45"):
        convert.load(folder)
