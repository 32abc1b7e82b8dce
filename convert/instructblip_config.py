"""InstructBLIP: config.json into `InstructBlipConfig`, and back.

As with BLIP-2, the hub's files leave out what transformers' classes have as their defaults.
"""

import dataclasses
import functools
from typing import Any

from catp_jax.models.instructblip import InstructBlipConfig
from catp_jax.models.qformer import QFormerConfig
from catp_jax.models.t5 import T5Config
from convert import blip2_config
from convert.blip2_config import VISION, check_generation, read_vision
from convert.configs import check_known, parse
from convert.language_config import check_text_keys, read_text, same_fields, write_text

GENERATION = "InstructBlipForConditionalGeneration"
TOP = blip2_config.TOP - {"image_text_hidden_size"}
QFORMER = blip2_config.QFORMER - {"use_qformer_text_input"}  # it always is


def read(raw: dict[str, Any], where: str) -> InstructBlipConfig:
    """The configuration in a config.json. Raises ValueError."""
    names = raw.get("architectures") or [GENERATION]
    if GENERATION not in names:
        raise ValueError(
            f"{where} is of {' and '.join(map(str, names))}, a part of InstructBLIP without a "
            f"head; a whole model is wanted ({GENERATION})"
        )
    problems = [
        *check_known(raw, "", TOP),
        *check_known(raw.get("vision_config"), "vision_config.", VISION),
        *check_known(raw.get("qformer_config"), "qformer_config.", QFORMER),
        *check_text_keys(raw.get("text_config"), ("t5", "llama"), where),
    ]
    return parse(raw, where, problems, check_generation, functools.partial(_build, raw))


def write(config: InstructBlipConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a configuration; `extra` goes into its text part."""
    qformer = dataclasses.asdict(config.qformer)
    del qformer["use_qformer_text_input"]
    is_t5 = isinstance(config.text, T5Config)
    return {
        "architectures": [GENERATION],
        "model_type": "instructblip",
        "image_token_index": config.image_token_index,
        "num_query_tokens": config.num_query_tokens,
        "is_encoder_decoder": is_t5,
        "use_decoder_only_language_model": not is_t5,
        "vision_config": {
            "model_type": "instructblip_vision_model",
            **dataclasses.asdict(config.vision),
        },
        "qformer_config": {"model_type": "instructblip_qformer", **qformer},
        "text_config": write_text(config.text, extra),
    }


def _build(raw: dict[str, Any], config: Any) -> InstructBlipConfig:
    text: Any = read_text(config.text_config, raw)
    qformer = same_fields(QFormerConfig, config.qformer_config)
    return InstructBlipConfig(
        vision=read_vision(config.vision_config),
        qformer=QFormerConfig(**qformer, use_qformer_text_input=True),
        text=text,
        num_query_tokens=config.num_query_tokens,
        image_token_index=config.image_token_index,
    )
