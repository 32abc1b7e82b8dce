"""The language models' part of a config.json: OPT, T5 and Llama, into configurations and back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from catp_jax.models.layers import Llama3Scaling, RopeConfig
from catp_jax.models.llama import LlamaConfig
from catp_jax.models.opt import OptConfig
from catp_jax.models.t5 import T5Config
from convert.configs import (
    MUST_BE_FALSE,
    check_activation,
    check_known,
    is_positive,
    not_positive,
    short,
)

TextConfig = OptConfig | T5Config | LlamaConfig

OPT = {field.name for field in dataclasses.fields(OptConfig)} | {
    *("do_layer_norm_before", "_remove_final_layer_norm", "word_embed_proj_dim", "enable_bias"),
    *("layer_norm_elementwise_affine", "attention_dropout", "activation_dropout", "layerdrop"),
    "init_std",
}
T5 = {field.name for field in dataclasses.fields(T5Config)} | {
    *("feed_forward_proj", "is_gated_act", "dropout_rate", "classifier_dropout"),
    *("initializer_factor", "n_positions", "output_past"),
}
ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
LLAMA = (
    {field.name for field in dataclasses.fields(LlamaConfig)} - {"rope"}
    | ROPE
    | {
        *("head_dim", "attention_dropout", "pretraining_tp"),
        "max_sequence_length",  # in the first Llamas; no model of transformers reads it
    }
)
KEYS = {"opt": OPT, "t5": T5, "llama": LLAMA}
LLAMA_MUST_BE_FALSE = MUST_BE_FALSE | {"tie_word_embeddings", "attention_bias", "mlp_bias"}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_text_keys(text: Any, kinds: Sequence[str], where: str) -> list[str]:
    """What is wrong with the keys of a `text_config`; the first of `kinds` needs no model_type.

    Raises ValueError if it is of none of `kinds`.
    """
    text = text if isinstance(text, dict) else {}
    if (kind := text.get("model_type", kinds[0])) not in kinds:
        raise ValueError(
            f"{where}: the language model is {kind!r} (text_config.model_type); "
            f"supported: {', '.join(kinds)}"
        )
    must_be_false = LLAMA_MUST_BE_FALSE if kind == "llama" else MUST_BE_FALSE
    return check_known(text, "text_config.", KEYS[kind], must_be_false)


def check_text(text: Any) -> list[str]:
    """What is wrong with the values of a `text_config`."""
    return {"opt": _check_opt, "t5": _check_t5, "llama": check_llama}[text.model_type](text)


def read_text(text: Any, raw: dict[str, Any]) -> TextConfig:
    """A checked `text_config`; `raw` is config.json as it stands."""
    if text.model_type == "opt":
        return OptConfig(**same_fields(OptConfig, text))
    if text.model_type == "llama":
        rope = read_rope(text.rope_parameters)
        return LlamaConfig(**same_fields(LlamaConfig, text), rope=rope)
    written = raw.get("text_config")
    is_tied = not isinstance(written, dict) or written.get("tie_word_embeddings") is not False
    found = {"tie_word_embeddings": is_tied, "decoder_start_token_id": _start_token(text)}
    return T5Config(**same_fields(T5Config, text) | found)


def write_text(text: TextConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """The `text_config` of a configuration, and `extra`. Tokens not given are None."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    written = dataclasses.asdict(text)
    if isinstance(text, OptConfig):
        written |= {"model_type": "opt", "word_embed_proj_dim": text.hidden_size}
    elif isinstance(text, T5Config):
        written |= {"model_type": "t5", "feed_forward_proj": "gated-gelu", "is_gated_act": True}
    else:
        del written["rope"]
        written |= {"model_type": "llama", "rope_parameters": write_rope(text.rope)}
        written["tie_word_embeddings"] = False
    return tokens | written | extra


def check_rope(rope: dict[str, Any]) -> list[str]:
    """What is wrong with `rope_parameters`."""
    kind = rope.get("rope_type")
    if kind not in ("default", "llama3"):
        return [f"rope_type is {kind!r}; supported: default, llama3"]
    needed = {"rope_theta", *(LLAMA3 if kind == "llama3" else ())}
    problems = [
        f"rope_parameters.{key} is {rope.get(key)!r}; a positive number is wanted"
        for key in sorted(needed)
        if not is_positive(rope.get(key))
    ]
    if not problems and kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        problems.append("rope_parameters.high_freq_factor must be above low_freq_factor")
    return problems + [
        f"rope_parameters.{key} is unknown for rope_type {kind} (it is {short(rope[key])})"
        for key in sorted(rope.keys() - needed - {"rope_type", "type"})
    ]


def read_rope(rope: dict[str, Any]) -> RopeConfig:
    """Checked `rope_parameters`."""
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        )
    return RopeConfig(float(rope["rope_theta"]), scaling)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` of a configuration."""
    if (scaling := rope.scaling) is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    written = {name: getattr(scaling, name) for name in LLAMA3}
    return {"rope_type": "llama3", "rope_theta": rope.theta, **written}


def same_fields(kind: type, part: Any) -> dict[str, Any]:
    """What a config dataclass of ours takes from transformers' under the same name."""
    return {
        field.name: getattr(part, field.name)
        for field in dataclasses.fields(kind)
        if hasattr(part, field.name)
    }


def _check_opt(text: Any) -> list[str]:
    problems = not_positive(
        text,
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim"),
        "max_position_embeddings",
    )
    problems += check_activation(text.activation_function)
    for name, wanted in [
        ("do_layer_norm_before", True),
        ("enable_bias", True),
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
        ("word_embed_proj_dim", text.hidden_size),
    ]:
        if (value := getattr(text, name)) != wanted:
            problems.append(f"{name} is {value!r}; supported: {wanted!r} (OPT-350m is not)")
    if not problems and text.hidden_size % text.num_attention_heads:
        problems.append(heads_do_not_fit(text.hidden_size, text.num_attention_heads))
    return problems


def _check_t5(text: Any) -> list[str]:
    problems = not_positive(
        text,
        *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
        "layer_norm_epsilon",
    )
    if text.feed_forward_proj != "gated-gelu" or not text.is_gated_act:
        problems.append(
            f"feed_forward_proj is {text.feed_forward_proj!r}; supported: gated-gelu (T5 v1.1, "
            "Flan-T5)"
        )
    problems += check_activation(text.dense_act_fn)
    if not problems:
        buckets, farthest = (
            text.relative_attention_num_buckets,
            text.relative_attention_max_distance,
        )
        if buckets < 4 or farthest <= buckets // 2:
            problems.append(
                f"relative_attention_num_buckets is {buckets}; wanted: at least 4, and less than "
                f"twice relative_attention_max_distance ({farthest})"
            )
        start = _start_token(text)
        if not isinstance(start, int) or not 0 <= start < text.vocab_size:
            problems.append(f"decoder_start_token_id is {start}; the decoder has to start with one")
    return problems


def check_llama(text: Any) -> list[str]:
    """What is wrong with the values of a Llama's part, of Llama 3.2 Vision's too."""
    problems = not_positive(
        text,
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings"),
    )
    problems += check_activation(text.hidden_act)
    if not problems:
        width, heads, groups = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
        if width % heads or (width // heads) % 2:
            problems.append(
                f"hidden_size {width} does not split into {heads} heads of an even number of "
                "channels"
            )
        elif (own := getattr(text, "head_dim", width // heads)) != width // heads:
            problems.append(f"head_dim is {own}; supported: hidden_size over the heads")
        if heads % groups:
            problems.append(f"num_key_value_heads {groups} does not divide the {heads} heads")
    return problems + check_rope(text.rope_parameters)


def heads_do_not_fit(width: int, heads: int) -> str:
    """A line that says so."""
    return f"hidden_size {width} does not split into {heads} heads"


def _start_token(text: Any) -> int | None:
    """T5 starts with its padding token where nothing else is said."""
    start = getattr(text, "decoder_start_token_id", None)
    return text.pad_token_id if start is None else start
