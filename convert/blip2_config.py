"""BLIP-2 and InstructBLIP: config.json into a configuration, and back.

`architectures` says which kind of BLIP-2 it is. Files on the hub say little of the vision model and
the Q-Former: what they leave out are the defaults of transformers' classes.
"""

import dataclasses
from typing import Any

from catp_jax.models.blip2 import Blip2Config
from catp_jax.models.instructblip import InstructBlipConfig
from catp_jax.models.qformer import QFormerConfig
from catp_jax.models.querying import QueryingConfig
from catp_jax.models.retrieval import RetrievalConfig
from catp_jax.models.t5 import T5Config
from catp_jax.models.vit import VitConfig
from convert.language_config import LLAMA, OPT, T5
from convert.parts import (
    ACTIVATION,
    ANY,
    SIZE,
    SQUARE,
    Part,
    check_heads,
    check_patches,
    sizes,
)

VISION = Part(
    VitConfig,
    "blip_2_vision_model",
    {
        **sizes("hidden_size intermediate_size num_hidden_layers num_attention_heads"),
        "image_size": SQUARE,
        "patch_size": SQUARE,
        "hidden_act": ACTIVATION,
        "layer_norm_eps": SIZE,
        "qkv_bias": ANY,
    },
    # no model of transformers reads the last three; num_channels is 3 whatever is written there
    unread="attention_dropout initializer_factor initializer_range dropout num_channels "
    "projection_dim",
    together=lambda part: check_heads(part) + check_patches(part),
)
QFORMER_FIELDS = {
    **sizes("vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size"),
    **sizes("max_position_embeddings layer_norm_eps cross_attention_frequency"),
    "hidden_act": ACTIVATION,
    "encoder_hidden_size": ANY,
}
INSTRUCT_QFORMER = Part(
    QFormerConfig,
    "instructblip_qformer",
    QFORMER_FIELDS,
    fixed={"position_embedding_type": "absolute"},
    unread="hidden_dropout_prob attention_probs_dropout_prob classifier_dropout",
    together=check_heads,
    settle=lambda part: {"use_qformer_text_input": True},
)
QFORMER = dataclasses.replace(
    INSTRUCT_QFORMER,
    model_type="blip_2_qformer",
    fields=QFORMER_FIELDS | {"use_qformer_text_input": ANY},
    settle=lambda part: {},
)


def _check(config: Any) -> list[str]:
    token, rows = config.image_token_index, config.text_config.vocab_size
    if token is None or 0 <= token < rows:
        return []
    return [f"image_token_index is {token}, the embedding has {rows} rows"]


def _check_retrieval(config: Any) -> list[str]:
    if config.qformer_config.use_qformer_text_input:
        return []
    return [
        "qformer_config: use_qformer_text_input is false; image-text retrieval needs a Q-Former "
        "that reads text"
    ]


def _kind_of(config: QueryingConfig) -> dict[str, bool]:
    is_t5 = isinstance(config.text, T5Config)
    return {"is_encoder_decoder": is_t5, "use_decoder_only_language_model": not is_t5}


# older versions repeat at the top what text_config says, and nobody reads it
UNREAD = (
    "image_token_id tie_word_embeddings use_decoder_only_language_model initializer_factor "
    "initializer_range"
)
FIELDS = {"num_query_tokens": SIZE, "image_token_index": ANY}
BLIP2 = Part(
    Blip2Config,
    "blip-2",
    FIELDS,
    # the base class has the language model, head and all
    architectures=("Blip2ForConditionalGeneration", "Blip2Model"),
    parts={"vision_config": [VISION], "qformer_config": [QFORMER], "text_config": [OPT, T5]},
    unread=f"{UNREAD} image_text_hidden_size",
    together=_check,
    written=_kind_of,
)
RETRIEVER = Part(
    RetrievalConfig,
    "blip-2",
    FIELDS | {"image_text_hidden_size": SIZE},
    architectures=("Blip2ForImageTextRetrieval",),
    parts={"vision_config": [VISION], "qformer_config": [QFORMER]},
    unread=f"{UNREAD} text_config",  # a remnant that nothing is built from
    together=_check_retrieval,
)
INSTRUCTBLIP = Part(
    InstructBlipConfig,
    "instructblip",
    FIELDS,
    architectures=("InstructBlipForConditionalGeneration",),  # the base class has no head
    parts={
        "vision_config": [dataclasses.replace(VISION, model_type="instructblip_vision_model")],
        "qformer_config": [INSTRUCT_QFORMER],
        "text_config": [T5, LLAMA],
    },
    unread=UNREAD,
    together=_check,
    written=_kind_of,
)


def with_own_head(config: Any) -> Any:
    """The configuration of a checkpoint whose head has weights of its own.

    transformers 5 writes of every T5 that its head is tied, Flan-T5 too, and goes by the weights.
    """
    if isinstance(config, QueryingConfig) and isinstance(config.text, T5Config):
        text = dataclasses.replace(config.text, tie_word_embeddings=False)
        return dataclasses.replace(config, text=text)
    return config
