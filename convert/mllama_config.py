"""Llama 3.2 Vision: config.json into `MllamaConfig`, and back."""

from typing import Any, get_args

from catp_jax.models.cross_decoder import EXTRA_EMBEDDINGS, CrossDecoderConfig
from catp_jax.models.mllama import MllamaConfig
from catp_jax.models.tiled_vit import TiledVitConfig, VisionMode
from convert.configs import (
    MOST_LAYERS,
    MUST_BE_FALSE,
    WIDEST,
    check_activation,
    check_known,
    is_positive,
    not_positive,
    parse,
    side,
)
from convert.language_config import check_llama, read_rope, write_rope

TOP = {"model_type", "image_token_index", "image_token_id", "text_config", "vision_config"}
TEXT = {
    *("vocab_size", "hidden_size", "hidden_act", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "cross_attention_layers"),
}
VISION = {
    *("hidden_size", "hidden_act", "num_hidden_layers", "num_global_layers", "attention_heads"),
    *("num_attention_heads", "num_channels", "intermediate_size", "vision_output_dim"),
    *("image_size", "patch_size", "norm_eps", "max_num_tiles", "intermediate_layers_indices"),
    *("supported_aspect_ratios", "vision_mode"),
}
UNTIED = MUST_BE_FALSE | {"tie_word_embeddings"}


def read(raw: dict[str, Any], where: str) -> MllamaConfig:
    """The configuration in a config.json. Raises ValueError."""
    return parse(raw, where, _check_keys(raw), _check, _build)


def write(config: MllamaConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a configuration; `extra` goes into its text part."""
    text, vision = config.text, config.vision
    kept = TEXT - {"rope_theta", "rope_scaling", "rope_parameters", "cross_attention_layers"}
    lists = {"vision_output_dim", "intermediate_layers_indices", "supported_aspect_ratios"}
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_index,
        "text_config": {
            "model_type": "mllama_text_model",
            **{name: getattr(text, name) for name in sorted(kept)},
            "rope_parameters": write_rope(text.rope),
            "cross_attention_layers": list(text.cross_attention_layers),
            "tie_word_embeddings": False,
            "eos_token_id": None,
            "pad_token_id": None,
            **extra,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            **{
                name: getattr(vision, name)
                for name in sorted(VISION - lists - {"num_attention_heads"})
            },
            "vision_output_dim": vision.output_size,
            "intermediate_layers_indices": list(vision.intermediate_layers_indices),
            "supported_aspect_ratios": [list(ratio) for ratio in vision.supported_aspect_ratios],
        },
    }


def _check_keys(raw: dict[str, Any]) -> list[str]:
    return [
        *check_known(raw, "", TOP, UNTIED),
        *check_known(raw.get("text_config"), "text_config.", TEXT, UNTIED),
        *check_known(raw.get("vision_config"), "vision_config.", VISION, UNTIED),
    ]


def _check(config: Any) -> list[str]:
    problems = [f"text_config: {p}" for p in _check_text(config.text_config)]
    problems += [f"vision_config: {p}" for p in _check_vision(config.vision_config)]
    rows = config.text_config.vocab_size + EXTRA_EMBEDDINGS
    if not 0 <= config.image_token_index < rows:
        problems.append(
            f"image_token_index is {config.image_token_index}, the embedding has {rows} rows"
        )
    return problems


def _check_text(text: Any) -> list[str]:
    problems = check_llama(text)
    layers, depth = list(text.cross_attention_layers), text.num_hidden_layers
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        problems.append(
            f"cross_attention_layers is {layers}; wanted: one or more of the {depth} layers, "
            "rising, each once"
        )
    return problems


def _check_vision(vision: Any) -> list[str]:
    problems = not_positive(
        vision,
        *("hidden_size", "num_hidden_layers", "attention_heads", "num_channels"),
        *("intermediate_size", "norm_eps", "max_num_tiles"),
    )
    if not 0 <= vision.num_global_layers <= MOST_LAYERS:
        problems.append(
            f"num_global_layers is {vision.num_global_layers}; 0 to {MOST_LAYERS} are read"
        )
    problems += check_activation(vision.hidden_act)
    for name in ("image_size", "patch_size"):
        if side(getattr(vision, name)) is None:
            problems.append(
                f"{name} is {getattr(vision, name)}; tiles and patches are square, of at most "
                f"{WIDEST} pixels a side"
            )
    if problems:
        return problems
    image, patch = side(vision.image_size), side(vision.patch_size)
    if image % patch:
        problems.append(f"image_size {image} is not a multiple of patch_size {patch}")
    if vision.hidden_size % vision.attention_heads:
        problems.append(
            f"hidden_size {vision.hidden_size} does not split into {vision.attention_heads} heads"
        )
    indices, depth = vision.intermediate_layers_indices, vision.num_hidden_layers
    if not indices or not all(0 <= index < depth for index in indices):
        problems.append(
            f"intermediate_layers_indices is {indices}; wanted: one or more of the {depth} layers"
        )
    wanted = vision.hidden_size * (1 + len(indices))
    if vision.vision_output_dim != wanted:
        problems.append(
            f"vision_output_dim is {vision.vision_output_dim}; hidden_size × (1 + intermediate "
            f"layers) is {wanted}"
        )
    if (mode := _vision_mode(vision)) not in get_args(VisionMode):
        problems.append(f"vision_mode is {mode!r}; 'meta' or 'hf' is wanted")
    tiles = vision.max_num_tiles
    for ratio in vision.supported_aspect_ratios:
        if len(ratio) != 2 or not all(is_positive(n) for n in ratio) or ratio[0] * ratio[1] > tiles:
            problems.append(f"supported_aspect_ratios has {ratio}; wanted: 1 to {tiles} tiles")
    return problems


def _vision_mode(vision: Any) -> Any:
    """A key of ours; Meta's checkpoints, which do not have it, were trained so."""
    return getattr(vision, "vision_mode", "meta")


def _build(config: Any) -> MllamaConfig:
    text, vision = config.text_config, config.vision_config
    return MllamaConfig(
        vision=TiledVitConfig(
            hidden_size=vision.hidden_size,
            hidden_act=vision.hidden_act,
            num_hidden_layers=vision.num_hidden_layers,
            num_global_layers=vision.num_global_layers,
            attention_heads=vision.attention_heads,
            num_channels=vision.num_channels,
            intermediate_size=vision.intermediate_size,
            image_size=side(vision.image_size),
            patch_size=side(vision.patch_size),
            norm_eps=vision.norm_eps,
            max_num_tiles=vision.max_num_tiles,
            intermediate_layers_indices=tuple(vision.intermediate_layers_indices),
            supported_aspect_ratios=tuple((r[0], r[1]) for r in vision.supported_aspect_ratios),
            vision_mode=_vision_mode(vision),
        ),
        text=CrossDecoderConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            hidden_act=text.hidden_act,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            intermediate_size=text.intermediate_size,
            rope=read_rope(text.rope_parameters),
            rms_norm_eps=text.rms_norm_eps,
            max_position_embeddings=text.max_position_embeddings,
            cross_attention_layers=tuple(text.cross_attention_layers),
        ),
        image_token_index=config.image_token_index,
    )
