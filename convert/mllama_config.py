"""Llama 3.2 Vision: config.json into `MllamaConfig`, and back."""

from typing import Any, get_args

from catp_jax.models.cross_decoder import EXTRA_EMBEDDINGS, CrossDecoderConfig
from catp_jax.models.mllama import MllamaConfig
from catp_jax.models.tiled_vit import TiledVitConfig, VisionMode
from convert.language_config import LLAMA, check_llama
from convert.parts import (
    ACTIVATION,
    ANY,
    MOST_LAYERS,
    SQUARE,
    Field,
    Part,
    check_heads,
    check_patches,
    is_positive,
    sizes,
)


def _check_cross_layers(part: Any, key: str) -> list[str]:
    layers, depth = list(getattr(part, key)), part.num_hidden_layers
    if layers and layers == sorted(set(layers)) and 0 <= layers[0] <= layers[-1] < depth:
        return []
    return [f"{key} is {layers}; wanted: one or more of the {depth} layers, rising, each once"]


TEXT = Part(
    CrossDecoderConfig,
    "mllama_text_model",
    {**LLAMA.fields, "cross_attention_layers": Field(_check_cross_layers, tuple, list)},
    must_be_false="tie_word_embeddings",
    unread="rope_theta rope_scaling",
    together=check_llama,
    written=lambda config: {"eos_token_id": None, "pad_token_id": None},
)


def _check_global_layers(part: Any, key: str) -> list[str]:
    if 0 <= (number := getattr(part, key)) <= MOST_LAYERS:
        return []
    return [f"{key} is {number}; 0 to {MOST_LAYERS} are read"]


def _check_mode(part: Any, key: str) -> list[str]:
    if (mode := getattr(part, key, "meta")) in get_args(VisionMode):
        return []
    return [f"{key} is {mode!r}; 'meta' or 'hf' is wanted"]


def _check_vision(part: Any) -> list[str]:
    problems = check_patches(part) + check_heads(part, "attention_heads")
    indices, depth = part.intermediate_layers_indices, part.num_hidden_layers
    if not indices or not all(0 <= index < depth for index in indices):
        problems.append(
            f"intermediate_layers_indices is {indices}; wanted: one or more of the {depth} layers"
        )
    wanted = part.hidden_size * (1 + len(indices))
    if part.vision_output_dim != wanted:
        problems.append(
            f"vision_output_dim is {part.vision_output_dim}; hidden_size × (1 + intermediate "
            f"layers) is {wanted}"
        )
    tiles = part.max_num_tiles
    for ratio in part.supported_aspect_ratios:
        if len(ratio) != 2 or not all(map(is_positive, ratio)) or ratio[0] * ratio[1] > tiles:
            problems.append(f"supported_aspect_ratios has {ratio}; wanted: 1 to {tiles} tiles")
    return problems


VISION = Part(
    TiledVitConfig,
    "mllama_vision_model",
    {
        **sizes("hidden_size num_hidden_layers attention_heads num_channels intermediate_size"),
        **sizes("norm_eps max_num_tiles"),
        "hidden_act": ACTIVATION,
        "num_global_layers": Field(_check_global_layers),
        "image_size": SQUARE,
        "patch_size": SQUARE,
        "intermediate_layers_indices": Field(read=tuple, write=list),
        "supported_aspect_ratios": Field(
            read=lambda ratios: tuple(map(tuple, ratios)),
            write=lambda ratios: [*map(list, ratios)],
        ),
        # a key of ours; Meta's checkpoints, which do not have it, were trained so
        "vision_mode": Field(_check_mode, default="meta"),
    },
    must_be_false="tie_word_embeddings",
    unread="num_attention_heads vision_output_dim",
    together=_check_vision,
    written=lambda config: {"vision_output_dim": config.output_size},
)


def _check(config: Any) -> list[str]:
    rows = config.text_config.vocab_size + EXTRA_EMBEDDINGS
    if 0 <= (token := config.image_token_index) < rows:
        return []
    return [f"image_token_index is {token}, the embedding has {rows} rows"]


MODEL = Part(
    MllamaConfig,
    "mllama",
    {"image_token_index": ANY},
    parts={"vision_config": [VISION], "text_config": [TEXT]},
    must_be_false="tie_word_embeddings",
    unread="image_token_id",
    together=_check,
    written=lambda config: {"architectures": ["MllamaForConditionalGeneration"]},
)
