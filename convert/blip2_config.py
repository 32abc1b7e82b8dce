"""BLIP-2: config.json into `Blip2Config` or `RetrievalConfig`, and back.

`architectures` says which of the two it is. Those on the hub say little of the vision model and the
Q-Former: what they leave out are the defaults of transformers' classes.
"""

import dataclasses
import functools
from typing import Any

from catp_jax.models.blip2 import Blip2Config
from catp_jax.models.opt import OptConfig
from catp_jax.models.qformer import QFormerConfig
from catp_jax.models.retrieval import RetrievalConfig
from catp_jax.models.t5 import T5Config
from catp_jax.models.vit import VitConfig
from convert.configs import check_activation, check_known, not_positive, parse, side

GENERATION, RETRIEVAL = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
GENERATORS = (GENERATION, "Blip2Model")  # the base class has the language model, head and all

TOP = {
    *("model_type", "image_token_index", "image_token_id", "num_query_tokens"),
    *("image_text_hidden_size", "text_config", "vision_config", "qformer_config"),
    # older versions repeat here what text_config says, and nobody reads it
    *("tie_word_embeddings", "use_decoder_only_language_model"),
    *("initializer_factor", "initializer_range"),
}
# no model of transformers reads the last three; num_channels is 3 whatever is written there
VISION = {field.name for field in dataclasses.fields(VitConfig)} | {
    *("attention_dropout", "initializer_factor", "initializer_range"),
    *("dropout", "num_channels", "projection_dim"),
}
QFORMER = {field.name for field in dataclasses.fields(QFormerConfig)} | {
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    "position_embedding_type",
}
OPT = {field.name for field in dataclasses.fields(OptConfig)} | {
    *("do_layer_norm_before", "_remove_final_layer_norm", "word_embed_proj_dim", "enable_bias"),
    *("layer_norm_elementwise_affine", "attention_dropout", "activation_dropout", "layerdrop"),
    "init_std",
}
T5 = {field.name for field in dataclasses.fields(T5Config)} | {
    *("feed_forward_proj", "is_gated_act", "dropout_rate", "classifier_dropout"),
    *("initializer_factor", "n_positions", "output_past"),
}
TEXT = {"opt": OPT, "t5": T5}


def read(raw: dict[str, Any], where: str) -> Blip2Config | RetrievalConfig:
    """The configuration in a config.json. Raises ValueError."""
    kind = _kind(raw, where)
    problems = [
        *check_known(raw, "", TOP),
        *check_known(raw.get("vision_config"), "vision_config.", VISION),
        *check_known(raw.get("qformer_config"), "qformer_config.", QFORMER),
    ]
    if kind == RETRIEVAL:  # its text_config is a remnant that no part is built from
        return parse(raw, where, problems, _check_retrieval, _build_retrieval)
    text = raw.get("text_config")
    text = text if isinstance(text, dict) else {}
    if text.get("model_type", "opt") not in TEXT:
        raise ValueError(
            f"{where}: the language model is {text.get('model_type')!r} (text_config.model_type); "
            "supported: opt, t5"
        )
    problems += check_known(text, "text_config.", TEXT[text.get("model_type", "opt")])
    is_tied = text.get("tie_word_embeddings") is not False
    return parse(raw, where, problems, _check_generation, functools.partial(_build, is_tied))


def write(config: Blip2Config | RetrievalConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a configuration; `extra` goes into its text part.

    Of a `RetrievalConfig`, which has no language model, `extra` goes into the Q-Former's part.
    """
    written: dict[str, Any] = {
        "model_type": "blip-2",
        "image_token_index": config.image_token_index,
        "num_query_tokens": config.num_query_tokens,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            **dataclasses.asdict(config.vision),
        },
        "qformer_config": {"model_type": "blip_2_qformer", **dataclasses.asdict(config.qformer)},
    }
    if isinstance(config, RetrievalConfig):
        written["qformer_config"] |= extra
        return written | {
            "architectures": [RETRIEVAL],
            "image_text_hidden_size": config.image_text_hidden_size,
        }
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    text: dict[str, Any] = {"model_type": "opt", **tokens, **dataclasses.asdict(config.text)}
    if isinstance(config.text, OptConfig):
        text["word_embed_proj_dim"] = config.text.hidden_size
    else:
        text |= {"model_type": "t5", "feed_forward_proj": "gated-gelu", "is_gated_act": True}
    return written | {
        "architectures": [GENERATION],
        "is_encoder_decoder": text["model_type"] == "t5",
        "use_decoder_only_language_model": text["model_type"] == "opt",
        "text_config": text | extra,
    }


def with_own_head(
    config: Blip2Config | RetrievalConfig,
) -> Blip2Config | RetrievalConfig:
    """The configuration of a checkpoint whose head has weights of its own.

    transformers 5 writes of every T5 that its head is tied, Flan-T5 too, and goes by the weights.
    """
    if isinstance(config, Blip2Config) and isinstance(config.text, T5Config):
        text = dataclasses.replace(config.text, tie_word_embeddings=False)
        return dataclasses.replace(config, text=text)
    return config


def _kind(raw: dict[str, Any], where: str) -> str:
    names = raw.get("architectures") or []
    if RETRIEVAL in names:
        return RETRIEVAL
    if not names or any(name in GENERATORS for name in names):
        return GENERATION
    raise ValueError(
        f"{where} is of {' and '.join(map(str, names))}, a part of BLIP-2; a whole model is wanted "
        f"({GENERATION} or {RETRIEVAL})"
    )


def _check_vision(vision: Any) -> list[str]:
    problems = not_positive(
        vision,
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "layer_norm_eps",
    )
    problems += check_activation(vision.hidden_act)
    for name in ("image_size", "patch_size"):
        if side(getattr(vision, name)) is None:
            problems.append(f"{name} is {getattr(vision, name)}; images and patches are square")
    if not problems and vision.hidden_size % vision.num_attention_heads:
        problems.append(_heads(vision.hidden_size, vision.num_attention_heads))
    if not problems and side(vision.image_size) % side(vision.patch_size):
        problems.append(
            f"image_size {side(vision.image_size)} is not a multiple of patch_size "
            f"{side(vision.patch_size)}"
        )
    return problems


def _check_qformer(qformer: Any) -> list[str]:
    problems = not_positive(
        qformer,
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("vocab_size", "max_position_embeddings", "layer_norm_eps", "cross_attention_frequency"),
    )
    problems += check_activation(qformer.hidden_act)
    if (kind := getattr(qformer, "position_embedding_type", "absolute")) != "absolute":
        problems.append(f"position_embedding_type is {kind!r}; supported: absolute")
    if not problems and qformer.hidden_size % qformer.num_attention_heads:
        problems.append(_heads(qformer.hidden_size, qformer.num_attention_heads))
    return problems


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
        problems.append(_heads(text.hidden_size, text.num_attention_heads))
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


def _check_shared(config: Any) -> list[str]:
    problems = [f"vision_config: {p}" for p in _check_vision(config.vision_config)]
    problems += [f"qformer_config: {p}" for p in _check_qformer(config.qformer_config)]
    return problems + not_positive(config, "num_query_tokens")


def _check_generation(config: Any) -> list[str]:
    text = config.text_config
    found = _check_opt(text) if text.model_type == "opt" else _check_t5(text)
    problems = _check_shared(config) + [f"text_config: {p}" for p in found]
    if (image := config.image_token_index) is not None and not 0 <= image < text.vocab_size:
        problems.append(f"image_token_index is {image}, the embedding has {text.vocab_size} rows")
    return problems


def _check_retrieval(config: Any) -> list[str]:
    problems = _check_shared(config) + not_positive(config, "image_text_hidden_size")
    if not config.qformer_config.use_qformer_text_input:
        problems.append(
            "qformer_config: use_qformer_text_input is false; image-text retrieval needs a "
            "Q-Former that reads text"
        )
    return problems


def _heads(width: int, heads: int) -> str:
    return f"hidden_size {width} does not split into {heads} heads"


def _start_token(text: Any) -> int | None:
    """T5 starts with its padding token where nothing else is said."""
    start = getattr(text, "decoder_start_token_id", None)
    return text.pad_token_id if start is None else start


def _fields(kind: type, part: Any) -> dict[str, Any]:
    """What a config dataclass of ours takes from transformers' under the same name."""
    return {
        field.name: getattr(part, field.name)
        for field in dataclasses.fields(kind)
        if hasattr(part, field.name)
    }


def _vision(part: Any) -> VitConfig:
    sizes = {"image_size": side(part.image_size), "patch_size": side(part.patch_size)}
    return VitConfig(**_fields(VitConfig, part) | sizes)


def _build(is_tied: bool, config: Any) -> Blip2Config:
    text = config.text_config
    if text.model_type == "opt":
        ours = OptConfig(**_fields(OptConfig, text))
    else:
        found = {"tie_word_embeddings": is_tied, "decoder_start_token_id": _start_token(text)}
        ours = T5Config(**_fields(T5Config, text) | found)
    return Blip2Config(
        vision=_vision(config.vision_config),
        qformer=QFormerConfig(**_fields(QFormerConfig, config.qformer_config)),
        text=ours,
        num_query_tokens=config.num_query_tokens,
        image_token_index=config.image_token_index,
    )


def _build_retrieval(config: Any) -> RetrievalConfig:
    return RetrievalConfig(
        vision=_vision(config.vision_config),
        qformer=QFormerConfig(**_fields(QFormerConfig, config.qformer_config)),
        num_query_tokens=config.num_query_tokens,
        image_text_hidden_size=config.image_text_hidden_size,
        image_token_index=config.image_token_index,
    )
