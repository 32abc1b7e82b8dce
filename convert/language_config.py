"""The language models' part of a config.json: OPT, T5 and Llama."""

from collections.abc import Mapping
from typing import Any

from catp_jax.models.layers import Llama3Scaling, RopeConfig
from catp_jax.models.llama import LlamaConfig
from catp_jax.models.opt import OptConfig
from catp_jax.models.t5 import T5Config
from convert.configs import short
from convert.parts import ACTIVATION, ANY, SIZE, Field, Part, check_heads, is_positive, sizes

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NO_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""Written where no tokens are given: transformers would put those of some language model."""


def _check_opt(part: Any) -> list[str]:
    if part.word_embed_proj_dim != part.hidden_size:
        return [
            f"word_embed_proj_dim is {part.word_embed_proj_dim!r}; supported: hidden_size, "
            f"{part.hidden_size} (OPT-350m is not)"
        ]
    return check_heads(part)


OPT = Part(
    OptConfig,
    "opt",
    {
        **sizes("vocab_size hidden_size num_hidden_layers num_attention_heads ffn_dim"),
        "max_position_embeddings": SIZE,
        "activation_function": ACTIVATION,
        "tie_word_embeddings": ANY,
    },
    fixed={
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
    hint=" (OPT-350m is not)",
    unread="word_embed_proj_dim attention_dropout activation_dropout layerdrop init_std",
    together=_check_opt,
    written=lambda config: NO_TOKENS | {"word_embed_proj_dim": config.hidden_size},
)


def _start_token(part: Any) -> int | None:
    """T5 starts with its padding token where nothing else is said."""
    start = getattr(part, "decoder_start_token_id", None)
    return part.pad_token_id if start is None else start


def _check_t5(part: Any) -> list[str]:
    problems = []
    buckets, farthest = part.relative_attention_num_buckets, part.relative_attention_max_distance
    if buckets < 4 or farthest <= buckets // 2:
        problems.append(
            f"relative_attention_num_buckets is {buckets}; wanted: at least 4, and less than "
            f"twice relative_attention_max_distance ({farthest})"
        )
    start = _start_token(part)
    if not isinstance(start, int) or not 0 <= start < part.vocab_size:
        problems.append(f"decoder_start_token_id is {start}; the decoder has to start with one")
    return problems


T5 = Part(
    T5Config,
    "t5",
    {
        **sizes("vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads"),
        **sizes("relative_attention_num_buckets relative_attention_max_distance"),
        "layer_norm_epsilon": SIZE,
        "dense_act_fn": ACTIVATION,
        "tie_word_embeddings": ANY,
        "scale_decoder_outputs": ANY,
        "decoder_start_token_id": ANY,
    },
    fixed={"feed_forward_proj": "gated-gelu", "is_gated_act": True},
    hint=" (T5 v1.1, Flan-T5)",
    unread="dropout_rate classifier_dropout initializer_factor n_positions output_past",
    together=_check_t5,
    settle=lambda part: {"decoder_start_token_id": _start_token(part)},
    written=lambda config: NO_TOKENS,
)


def _check_rope(part: Any, key: str) -> list[str]:
    rope = getattr(part, key)
    kind = rope.get("rope_type")
    if kind not in ("default", "llama3"):
        return [f"rope_type is {kind!r}; supported: default, llama3"]
    needed = {"rope_theta", *(LLAMA3 if kind == "llama3" else ())}
    problems = [
        f"{key}.{name} is {rope.get(name)!r}; a positive number is wanted"
        for name in sorted(needed)
        if not is_positive(rope.get(name))
    ]
    if not problems and kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        problems.append(f"{key}.high_freq_factor must be above low_freq_factor")
    return problems + [
        f"{key}.{name} is unknown for rope_type {kind} (it is {short(rope[name])})"
        for name in sorted(rope.keys() - needed - {"rope_type", "type"})
    ]


def _read_rope(rope: Mapping[str, Any]) -> RopeConfig:
    if rope["rope_type"] == "default":
        return RopeConfig(float(rope["rope_theta"]), None)
    factor, low, high, positions = (rope[name] for name in LLAMA3)
    scaling = Llama3Scaling(float(factor), float(low), float(high), int(positions))
    return RopeConfig(float(rope["rope_theta"]), scaling)


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    if (scaling := rope.scaling) is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    written = {name: getattr(scaling, name) for name in LLAMA3}
    return {"rope_type": "llama3", "rope_theta": rope.theta, **written}


def check_llama(part: Any) -> list[str]:
    """What is wrong with good values together, in Llama 3.2 Vision, too."""
    width, heads, groups = part.hidden_size, part.num_attention_heads, part.num_key_value_heads
    problems = []
    if width % heads or (width // heads) % 2:
        problems.append(
            f"hidden_size {width} does not split into {heads} heads of an even number of channels"
        )
    elif (head_dim := getattr(part, "head_dim", width // heads)) != width // heads:
        problems.append(f"head_dim is {head_dim}; supported: hidden_size over the heads")
    if heads % groups:
        problems.append(f"num_key_value_heads {groups} does not divide the {heads} heads")
    return problems


LLAMA = Part(
    LlamaConfig,
    "llama",
    {
        **sizes("vocab_size hidden_size num_hidden_layers num_attention_heads"),
        **sizes("num_key_value_heads intermediate_size rms_norm_eps max_position_embeddings"),
        "hidden_act": ACTIVATION,
        "rope_parameters": Field(_check_rope, _read_rope, _write_rope, name="rope"),
    },
    must_be_false="tie_word_embeddings attention_bias mlp_bias",
    # the last in the first Llamas; no model of transformers reads it
    unread="rope_theta rope_scaling head_dim attention_dropout pretraining_tp max_sequence_length",
    together=check_llama,
    written=lambda config: NO_TOKENS,
)
