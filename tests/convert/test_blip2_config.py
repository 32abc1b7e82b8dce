"""Configurations of BLIP-2: the hub's are the presets, what would compute otherwise is refused."""

import dataclasses
import json
from typing import Any

import pytest
from transformers import Blip2Config as HfConfig

from catp_jax.models.blip2 import Blip2Config
from catp_jax.models.retrieval import RetrievalConfig
from catp_jax.models.vit import VitConfig
from convert.families import config_json, parse_config
from tests.convert.test_configs import OLD_DEFAULTS
from tests.parity.tiny_blip2 import CONFIGS, tiny, tiny_hf_config

# What the hub has: transformers 4 wrote what differs from its classes' defaults, and what BLIP-2's
# authors had passed without effect.
SHARED: dict[str, Any] = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "image_text_hidden_size": 256,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "blip-2",
    "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vision_config": {
        "dropout": 0.0,
        "initializer_factor": 1.0,
        "model_type": "blip_2_vision_model",
        "num_channels": 3,
        "projection_dim": 512,
    },
}
HUB_OPT: dict[str, Any] = SHARED | {
    "image_token_index": 50265,
    "text_config": {
        "_name_or_path": "facebook/opt-2.7b",
        "activation_dropout": 0.0,
        "architectures": ["OPTForCausalLM"],
        "eos_token_id": 50118,
        "ffn_dim": 10240,
        "hidden_size": 2560,
        "model_type": "opt",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "vocab_size": 50304,
        "word_embed_proj_dim": 2560,
    },
    "use_decoder_only_language_model": True,
}
HUB_T5: dict[str, Any] = SHARED | {
    "image_token_index": 32100,
    "text_config": {
        "architectures": ["T5ForConditionalGeneration"],
        "bos_token_id": 1,
        "classifier_dropout": 0.0,
        "d_ff": 5120,
        "d_kv": 64,
        "d_model": 2048,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": 24,
        "num_heads": 32,
        "num_layers": 24,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "task_specific_params": {"summarization": {"max_length": 200, "prefix": "summarize: "}},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 32128,
    },
    "use_decoder_only_language_model": False,
}
HUB_RETRIEVAL: dict[str, Any] = SHARED | {
    "architectures": ["Blip2ForImageTextRetrieval"],
    "qformer_config": {
        "model_type": "blip_2_qformer",
        "use_qformer_text_input": True,
        "vocab_size": 30523,
    },
    "text_config": {"model_type": "opt"},
    "use_decoder_only_language_model": True,
}
HUB = {
    "opt": (HUB_OPT, Blip2Config.opt_2_7b()),
    "t5": (HUB_T5, Blip2Config.flan_t5_xl()),
    "retrieval": (HUB_RETRIEVAL, RetrievalConfig.itm_vit_g()),
}


def changed(name: str, part: str, **changes: Any) -> dict[str, Any]:
    raw = json.loads(json.dumps(HUB[name][0]))
    (raw[part] if part else raw).update(changes)
    return raw


@pytest.mark.parametrize("name", HUB)
def test_config_of_the_hub_is_the_preset(name: str):
    raw, preset = HUB[name]
    assert parse_config(raw) == preset


@pytest.mark.parametrize("name", HUB)
def test_config_that_transformers_writes_again_is_the_same(name: str):
    """But for Flan-T5's head, which transformers 5 calls tied; the weights tell."""
    raw, preset = HUB[name]
    again = json.loads(HfConfig.from_dict(json.loads(json.dumps(raw))).to_json_string())
    if name == "t5":
        assert again["text_config"]["tie_word_embeddings"] is True
        text = dataclasses.replace(preset.text, tie_word_embeddings=True)
        preset = dataclasses.replace(preset, text=text)
    assert parse_config(again | {"architectures": raw["architectures"]}) == preset


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_first_configs_had_no_image_token_and_every_default(name: str):
    raw, preset = HUB[name]
    raw = json.loads(json.dumps(raw))
    del raw["image_token_index"]
    for part in ("vision_config", "qformer_config", "text_config"):
        raw[part] = OLD_DEFAULTS | raw[part]
    raw["tie_word_embeddings"] = False
    raw["qformer_config"]["position_embedding_type"] = "absolute"
    assert parse_config(raw) == dataclasses.replace(preset, image_token_index=None)


def test_missing_keys_get_the_defaults_of_the_class():
    config = parse_config({"model_type": "blip-2"})
    assert config.vision == VitConfig.eva_vit_g()
    assert (config.text.vocab_size, config.text.num_hidden_layers) == (50272, 12)
    assert config.num_query_tokens == 32


@pytest.mark.parametrize(
    "config",
    [
        *(preset for _, preset in HUB.values()),
        Blip2Config.opt_6_7b(),
        Blip2Config.flan_t5_xxl(),
        dataclasses.replace(RetrievalConfig.itm_vit_g(), image_token_index=7),
    ],
)
def test_what_we_write_is_what_we_read(config: Blip2Config | RetrievalConfig):
    raw = json.loads(json.dumps(config_json(config, eos_token_id=5)))
    assert parse_config(raw) == config
    read = HfConfig.from_dict(raw)
    if isinstance(config, Blip2Config):
        assert read.text_config.eos_token_id == 5
        assert read.text_config.pad_token_id is None


@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_configs_are_read_and_written(name: str):
    config = parse_config(tiny_hf_config(name).to_dict() | architectures(name))
    settled = tiny(name)[2]
    if name == "t5 untied":  # said by the weights only
        text = dataclasses.replace(config.text, tie_word_embeddings=False)
        config = dataclasses.replace(config, text=text)
    assert config == settled
    assert parse_config(config_json(config)) == config


def architectures(name: str) -> dict[str, list[str]]:
    kind = "ImageTextRetrieval" if name.startswith("retrieval") else "ConditionalGeneration"
    return {"architectures": [f"Blip2For{kind}"]}


BAD: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a part": ("opt", "", {"architectures": ["Blip2QFormerModel"]}, "a whole model is wanted"),
    "vision alone": (
        "opt",
        "",
        {"model_type": "blip_2_vision_model"},
        "vision_model, a language model or a part",
    ),
    "unknown key": ("opt", "", {"sparkle": 3}, r"sparkle is unknown \(it is 3\)"),
    "quantised": ("opt", "", {"quantization_config": {"bits": 4}}, "the checkpoint is quantised"),
    "image token": ("opt", "", {"image_token_index": 50304}, "embedding has 50304 rows"),
    "queries": ("opt", "", {"num_query_tokens": 0}, "num_query_tokens is 0"),
    "other language model": (
        "opt",
        "text_config",
        {"model_type": "llama"},
        r"'llama' \(text_config.model_type\); supported: opt, t5",
    ),
    "vision key": ("opt", "vision_config", {"rope": 1}, "vision_config.rope is unknown"),
    "vision heads": ("opt", "vision_config", {"num_attention_heads": 7}, "into 7 heads"),
    "oblong": ("opt", "vision_config", {"image_size": [224, 112]}, "tiles and patches are square"),
    "patches": ("opt", "vision_config", {"patch_size": 15}, "not a multiple of patch_size 15"),
    "q-former key": ("opt", "qformer_config", {"rope": 1}, "qformer_config.rope is unknown"),
    "q-former positions": (
        "opt",
        "qformer_config",
        {"position_embedding_type": "relative_key"},
        "position_embedding_type is 'relative_key'",
    ),
    "q-former activation": ("opt", "qformer_config", {"hidden_act": "mish"}, "'mish'; supported"),
    "q-former heads": ("opt", "qformer_config", {"num_attention_heads": 7}, "into 7 heads"),
    "frequency": ("opt", "qformer_config", {"cross_attention_frequency": 0}, "frequency is 0"),
    "post-norm": ("opt", "text_config", {"do_layer_norm_before": False}, "OPT-350m is not"),
    "projected": ("opt", "text_config", {"word_embed_proj_dim": 512}, "word_embed_proj_dim is 512"),
    "no bias": ("opt", "text_config", {"enable_bias": False}, "enable_bias is False"),
    "plain norms": (
        "opt",
        "text_config",
        {"layer_norm_elementwise_affine": False},
        "layer_norm_elementwise_affine is False",
    ),
    "no last norm": (
        "opt",
        "text_config",
        {"_remove_final_layer_norm": True},
        "_remove_final_layer_norm is True",
    ),
    "opt activation": ("opt", "text_config", {"activation_function": "mish"}, "'mish'"),
    "opt heads": ("opt", "text_config", {"num_attention_heads": 33}, "into 33 heads"),
    "t5 key in opt": ("opt", "text_config", {"d_model": 3}, "text_config.d_model is unknown"),
    "old t5": ("t5", "text_config", {"feed_forward_proj": "relu"}, "is 'relu'; supported: 'gated"),
    "ungated": ("t5", "text_config", {"is_gated_act": False}, "is_gated_act is False; supported"),
    "other gate": ("t5", "text_config", {"feed_forward_proj": "gated-silu"}, "'gated-silu'"),
    "t5 activation": ("t5", "text_config", {"dense_act_fn": "mish"}, "'mish'; supported"),
    "few buckets": ("t5", "text_config", {"relative_attention_num_buckets": 2}, "at least 4"),
    "near": ("t5", "text_config", {"relative_attention_max_distance": 16}, r"max_distance \(16\)"),
    "start": ("t5", "text_config", {"decoder_start_token_id": 99999}, "has to start with one"),
    "no text": (
        "retrieval",
        "qformer_config",
        {"use_qformer_text_input": False},
        "needs a Q-Former that reads text",
    ),
    "type": ("opt", "text_config", {"vocab_size": "many"}, "vocab_size"),
}


@pytest.mark.parametrize(("name", "part", "changes", "message"), BAD.values(), ids=BAD)
def test_unsupported_value_is_refused(name: str, part: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        parse_config(changed(name, part, **changes))


@pytest.mark.parametrize("names", [3, "Blip2Model", [3], {"x": 1}, [None]])
@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_architectures_that_are_no_list_of_names_are_refused(kind: str, names: Any):
    with pytest.raises(ValueError, match=r"architectures is .*; a list of names is wanted"):
        parse_config({"model_type": kind, "architectures": names})


def test_everything_wrong_is_said_at_once():
    raw = changed("opt", "text_config", do_layer_norm_before=False, sparkle=1)
    raw["vision_config"]["hidden_act"] = "mish"
    raw["qformer_config"]["layer_norm_eps"] = 0.0
    with pytest.raises(ValueError, match="not supported") as error:
        parse_config(raw)
    for said in ("do_layer_norm_before", "sparkle", "'mish'", "qformer_config: layer_norm_eps"):
        assert said in str(error.value)


def test_t5_starts_with_its_padding_where_nothing_else_is_said():
    raw = changed("t5", "text_config", decoder_start_token_id=None, pad_token_id=3)
    assert parse_config(raw).text.decoder_start_token_id == 3
