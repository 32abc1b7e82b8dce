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
from catp_jax.models.querying import QueryingConfig
from catp_jax.models.retrieval import RetrievalConfig
from catp_jax.models.t5 import T5Config
from catp_jax.models.vit import VitConfig
from convert.configs import WIDEST, check_activation, check_known, not_positive, parse, side
from convert.language_config import (
    check_text,
    check_text_keys,
    heads_do_not_fit,
    read_text,
    same_fields,
    write_text,
)

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
    problems += check_text_keys(raw.get("text_config"), ("opt", "t5"), where)
    return parse(raw, where, problems, check_generation, functools.partial(_build, raw))


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
    is_opt = isinstance(config.text, OptConfig)
    return written | {
        "architectures": [GENERATION],
        "is_encoder_decoder": not is_opt,
        "use_decoder_only_language_model": is_opt,
        "text_config": write_text(config.text, extra),
    }


def with_own_head(config: Any) -> Any:
    """The configuration of a checkpoint whose head has weights of its own.

    transformers 5 writes of every T5 that its head is tied, Flan-T5 too, and goes by the weights.
    """
    if isinstance(config, QueryingConfig) and isinstance(config.text, T5Config):
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
            problems.append(
                f"{name} is {getattr(vision, name)}; images and patches are square, of at most "
                f"{WIDEST} pixels a side"
            )
    if not problems and vision.hidden_size % vision.num_attention_heads:
        problems.append(heads_do_not_fit(vision.hidden_size, vision.num_attention_heads))
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
        problems.append(heads_do_not_fit(qformer.hidden_size, qformer.num_attention_heads))
    return problems


def check_generation(config: Any) -> list[str]:
    """What is wrong with the values of a model that generates text."""
    text = config.text_config
    problems = _check_shared(config) + [f"text_config: {p}" for p in check_text(text)]
    if (image := config.image_token_index) is not None and not 0 <= image < text.vocab_size:
        problems.append(f"image_token_index is {image}, the embedding has {text.vocab_size} rows")
    return problems


def _check_shared(config: Any) -> list[str]:
    problems = [f"vision_config: {p}" for p in _check_vision(config.vision_config)]
    problems += [f"qformer_config: {p}" for p in _check_qformer(config.qformer_config)]
    return problems + not_positive(config, "num_query_tokens")


def _check_retrieval(config: Any) -> list[str]:
    problems = _check_shared(config) + not_positive(config, "image_text_hidden_size")
    if not config.qformer_config.use_qformer_text_input:
        problems.append(
            "qformer_config: use_qformer_text_input is false; image-text retrieval needs a "
            "Q-Former that reads text"
        )
    return problems


def read_vision(part: Any) -> VitConfig:
    """A checked `vision_config`."""
    sizes = {"image_size": side(part.image_size), "patch_size": side(part.patch_size)}
    return VitConfig(**same_fields(VitConfig, part) | sizes)


def _build(raw: dict[str, Any], config: Any) -> Blip2Config:
    text: Any = read_text(config.text_config, raw)
    return Blip2Config(
        vision=read_vision(config.vision_config),
        qformer=QFormerConfig(**same_fields(QFormerConfig, config.qformer_config)),
        text=text,
        num_query_tokens=config.num_query_tokens,
        image_token_index=config.image_token_index,
    )


def _build_retrieval(config: Any) -> RetrievalConfig:
    return RetrievalConfig(
        vision=read_vision(config.vision_config),
        qformer=QFormerConfig(**same_fields(QFormerConfig, config.qformer_config)),
        num_query_tokens=config.num_query_tokens,
        image_text_hidden_size=config.image_text_hidden_size,
        image_token_index=config.image_token_index,
    )
