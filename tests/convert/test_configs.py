"""Configurations of Llama 3.2 Vision: what transformers writes is read, others are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MllamaConfig as HfConfig

from catp_jax.models.mllama import MllamaConfig
from convert.families import config_json, parse_config
from convert.manifest import read_config
from tests.parity.tiny import CONFIGS, tiny_hf_config

ELEVEN_B = MllamaConfig.llama_3_2_11b()

# What the configs on the hub look like: version 4.45 wrote every default of every config class.
OLD_DEFAULTS: dict[str, Any] = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "output_attentions": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "sep_token_id": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
HUB: dict[str, Any] = {
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 128256,
    "model_type": "mllama",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "text_config": {
        **OLD_DEFAULTS,
        "bos_token_id": 128000,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "dropout": 0,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "model_type": "mllama_text_model",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 128004,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 128256,
    },
    "vision_config": {
        **OLD_DEFAULTS,
        "attention_heads": 16,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        "vision_output_dim": 7680,
    },
}


def changed(part: str, **changes: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(HUB))
    (raw[part] if part else raw).update(changes)
    return raw


def test_config_of_the_hub_is_the_preset():
    assert parse_config(HUB) == ELEVEN_B


def test_config_that_transformers_writes_again_is_the_same():
    again = json.loads(HfConfig.from_dict(json.loads(json.dumps(HUB))).to_json_string())
    assert "rope_parameters" in again["text_config"]
    assert parse_config(again) == ELEVEN_B


def test_missing_keys_get_the_defaults_of_the_class():
    config = parse_config({"model_type": "mllama"})
    assert config.vision == dataclasses.replace(ELEVEN_B.vision, image_size=448)
    rope = dataclasses.replace(ELEVEN_B.text.rope, scaling=None)
    assert config.text == dataclasses.replace(ELEVEN_B.text, rope=rope)


@pytest.mark.parametrize(
    "config",
    [
        ELEVEN_B,
        MllamaConfig.llama_3_2_90b(),
        *(parse_config(tiny_hf_config(name).to_dict()) for name in CONFIGS),
    ],
    ids=["11b", "90b", *CONFIGS],
)
def test_what_we_write_is_what_we_read(config: MllamaConfig):
    raw = json.loads(json.dumps(config_json(config, eos_token_id=[1, 2])))
    assert parse_config(raw) == config
    assert HfConfig.from_dict(raw).text_config.eos_token_id == [1, 2]


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": ("", {"model_type": "llava"}, "'llava'; supported: mllama"),
    "no model type": ("", {"model_type": None}, "model_type is None"),
    "text half": (
        "",
        {"model_type": "mllama_text_model"},
        "mllama_text_model, a language model or a part",
    ),
    "quantised": (
        "",
        {"quantization_config": {"bits": 4}},
        "the checkpoint is quantised",
    ),
    "unknown key": ("", {"sparkle": 3}, r"sparkle is unknown \(it is 3\)"),
    "image token": ("", {"image_token_index": 200000}, "embedding has 128264 rows"),
    "unknown text key": ("text_config", {"attention_bias": True}, "text_config.attention_bias"),
    "unknown vision key": ("vision_config", {"use_rope": 1}, "vision_config.use_rope is unknown"),
    "tied": ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    "pruned": ("text_config", {"pruned_heads": {"0": [1]}}, "pruned_heads is"),
    "activation": ("text_config", {"hidden_act": "mish"}, "hidden_act is 'mish'; supported: gelu"),
    "heads": ("text_config", {"num_attention_heads": 33}, "does not split into 33 heads"),
    "kv heads": ("text_config", {"num_key_value_heads": 5}, "5 does not divide the 32 heads"),
    "no cross": ("text_config", {"cross_attention_layers": []}, r"cross_attention_layers is \[\]"),
    "cross outside": ("text_config", {"cross_attention_layers": [3, 40]}, "of the 40 layers"),
    "cross unsorted": ("text_config", {"cross_attention_layers": [8, 3]}, "rising, each once"),
    "zero size": ("text_config", {"intermediate_size": 0}, "intermediate_size is 0"),
    "type": ("text_config", {"vocab_size": "many"}, "vocab_size"),
    "rope type": (
        "text_config",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope_type is 'yarn'; supported: default, llama3",
    ),
    "rope key": (
        "text_config",
        {"rope_scaling": {**HUB["text_config"]["rope_scaling"], "attention_factor": 2.0}},
        "rope_parameters.attention_factor is unknown",
    ),
    "rope value": (
        "text_config",
        {"rope_scaling": {**HUB["text_config"]["rope_scaling"], "factor": "eight"}},
        "rope_parameters.factor is 'eight'",
    ),
    "vision heads": ("vision_config", {"attention_heads": 7}, "does not split into 7 heads"),
    "oblong": ("vision_config", {"image_size": [560, 280]}, "tiles and patches are square"),
    "patches": ("vision_config", {"patch_size": 13}, "560 is not a multiple of patch_size 13"),
    "width": ("vision_config", {"vision_output_dim": 1280}, "is 1280; hidden_size × .* is 7680"),
    "layers": (
        "vision_config",
        {"intermediate_layers_indices": [3, 7, 15, 23, 32]},
        "one or more of the 32 layers",
    ),
    "ratio": ("vision_config", {"supported_aspect_ratios": [[3, 3]]}, r"\[3, 3\]; wanted: 1 to 4"),
    "vision mode": ("vision_config", {"vision_mode": "outputs"}, "'outputs'; 'meta' or 'hf'"),
}


@pytest.mark.parametrize(("part", "changes", "message"), BAD.values(), ids=BAD)
def test_unsupported_value_is_refused(part: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        parse_config(changed(part, **changes))


def test_everything_wrong_is_said_at_once():
    raw = changed("text_config", hidden_act="mish", cross_attention_layers=[], attention_bias=1)
    raw["vision_config"]["vision_output_dim"] = 7
    with pytest.raises(ValueError, match="not supported") as error:
        parse_config(raw)
    for said in ("hidden_act", "cross_attention_layers", "attention_bias", "vision_output_dim"):
        assert said in str(error.value)


def test_square_given_as_two_numbers_is_read():
    raw = changed("vision_config", image_size=[560, 560])
    assert parse_config(raw) == ELEVEN_B


def test_weights_take_inputs_of_intermediate_layers_unless_their_config_says_otherwise():
    assert parse_config(HUB).vision.vision_mode == "meta"
    raw = changed("vision_config", vision_mode="hf")
    assert parse_config(raw).vision.vision_mode == "hf"
    assert parse_config(config_json(parse_config(raw))) == parse_config(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "is not JSON"), ("[1]", "not a JSON object but list")],
)
def test_unreadable_file_is_named(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
