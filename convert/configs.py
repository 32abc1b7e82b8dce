"""Reads config.json into our frozen configs, and refuses what the models would compute otherwise.

transformers fills in the defaults of its config classes; every key is then either read here or on
the list of those that change no number. An unknown key is refused: it may well change one.
"""

import json
from pathlib import Path
from typing import Any

from catp_jax.models.cross_decoder import EXTRA_EMBEDDINGS, CrossDecoderConfig
from catp_jax.models.layers import ACTIVATIONS, Llama3Scaling, RopeConfig
from catp_jax.models.mllama import MllamaConfig
from catp_jax.models.tiled_vit import TiledVitConfig

SUPPORTED = ("mllama",)

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
    *("supported_aspect_ratios",),
}
MUST_BE_FALSE = {"tie_word_embeddings", "pruned_heads", "quantization_config"}
HARMLESS_BY_KIND = {
    "what the file is": "architectures dtype model_type name_or_path torch_dtype "
    "transformers_version _commit_hash _name_or_path",
    "training": "dropout gradient_checkpointing initializer_range problem_type",
    "how a torch model is run": "attn_implementation chunk_size_feed_forward output_attentions "
    "output_hidden_states return_dict tf_legacy_loss torchscript use_bfloat16 use_cache "
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal "
    "_experts_implementation_internal",
    "tokens": "bos_token_id decoder_start_token_id eos_token_id pad_token_id prefix sep_token_id "
    "tokenizer_class",
    "what other kinds of model have": "add_cross_attention cross_attention_hidden_size "
    "finetuning_task id2label is_decoder is_encoder_decoder label2id num_labels "
    "task_specific_params tie_encoder_decoder",
    "generation, which older versions wrote here": "assistant_confidence_threshold "
    "assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff "
    "eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id "
    "length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores "
    "remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens "
    "target_lookbehind temperature top_k top_p typical_p",
}
HARMLESS = {key for keys in HARMLESS_BY_KIND.values() for key in keys.split()}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(folder: Path) -> MllamaConfig:
    """The configuration of the model in a Hugging Face folder.

    Raises ValueError listing everything in config.json that is not supported.
    """
    return parse_config(read_json(folder), str(folder / "config.json"))


def read_json(folder: Path) -> dict[str, Any]:
    """A folder's config.json as it stands. Raises ValueError if there is none or it is no JSON."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; a Hugging Face model folder is wanted")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object but {type(raw).__name__}")
    return raw


def parse_config(raw: dict[str, Any], where: str = "config.json") -> MllamaConfig:
    """The configuration in the content of a config.json, which `where` names in errors."""
    match raw.get("model_type"):
        case "mllama":
            pass
        case "mllama_text_model":
            raise ValueError(
                f"{where} is of the text half alone (mllama_text_model), which has no images to "
                "look at; the whole model is wanted (mllama)"
            )
        case other:
            raise ValueError(f"{where}: model_type is {other!r}; supported: {', '.join(SUPPORTED)}")
    problems = _unknown_keys(raw)
    try:
        config = _fill_defaults(raw)
    except Exception as error:  # its validators raise what they like
        problems.append(f"transformers refuses it: {' '.join(str(error).split())}")
    else:
        problems += [f"text_config: {p}" for p in _check_text(config.text_config)]
        problems += [f"vision_config: {p}" for p in _check_vision(config.vision_config)]
        rows = config.text_config.vocab_size + EXTRA_EMBEDDINGS
        if not 0 <= config.image_token_index < rows:
            problems.append(
                f"image_token_index is {config.image_token_index}, the embedding has {rows} rows"
            )
        if not problems:
            return _build(config)
    raise ValueError(
        f"{where} asks for what is not supported here, or does not fit together\n  "
        + "\n  ".join(problems)
    )


def config_json(config: MllamaConfig, **extra: Any) -> dict[str, Any]:
    """The config.json of a model of ours; `extra` adds to its text part (`eos_token_id` …).

    Tokens that are not given are None, where transformers would put those of Llama 3.
    """
    text, vision = config.text, config.vision
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope.theta}
    if (scaling := text.rope.scaling) is not None:
        rope |= {"rope_type": "llama3"} | {name: getattr(scaling, name) for name in LLAMA3}
    kept = TEXT - {"rope_theta", "rope_scaling", "rope_parameters", "cross_attention_layers"}
    lists = {"vision_output_dim", "intermediate_layers_indices", "supported_aspect_ratios"}
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_index,
        "text_config": {
            "model_type": "mllama_text_model",
            **{name: getattr(text, name) for name in sorted(kept)},
            "rope_parameters": rope,
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


def _fill_defaults(raw: dict[str, Any]) -> Any:
    """transformers' own reading of it. Imported here, so that `import convert` stays light."""
    import transformers
    from transformers.models.mllama.configuration_mllama import MllamaConfig as HfConfig

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it only warns of what is refused below
    try:
        return HfConfig.from_dict(json.loads(json.dumps(raw)))  # it writes into what it is given
    finally:
        transformers.logging.set_verbosity(verbosity)


def _unknown_keys(raw: dict[str, Any]) -> list[str]:
    problems = []
    parts = {"": (raw, TOP), "text_config.": (raw.get("text_config"), TEXT)}
    parts["vision_config."] = (raw.get("vision_config"), VISION)
    for prefix, (part, known) in parts.items():
        for key, value in (part if isinstance(part, dict) else {}).items():
            if key in MUST_BE_FALSE:
                if value:
                    problems.append(f"{prefix}{key} is {_short(value)}; only without it")
            elif key not in known | HARMLESS:
                problems.append(f"{prefix}{key} is unknown (it is {_short(value)})")
    return problems


def _check_text(text: Any) -> list[str]:
    problems = _not_positive(
        text,
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "intermediate_size", "rms_norm_eps", "max_position_embeddings"),
    )
    problems += _check_activation(text.hidden_act)
    if not problems:
        width, heads, groups = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
        if width % heads or (width // heads) % 2:
            problems.append(
                f"hidden_size {width} does not split into {heads} heads of an even number of "
                "channels"
            )
        if heads % groups:
            problems.append(f"num_key_value_heads {groups} does not divide the {heads} heads")
    layers, depth = list(text.cross_attention_layers), text.num_hidden_layers
    if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < depth:
        problems.append(
            f"cross_attention_layers is {layers}; wanted: one or more of the {depth} layers, "
            "rising, each once"
        )
    return problems + _check_rope(text.rope_parameters)


def _check_rope(rope: dict[str, Any]) -> list[str]:
    kind = rope.get("rope_type")
    if kind not in ("default", "llama3"):
        return [f"rope_type is {kind!r}; supported: default, llama3"]
    needed = {"rope_theta", *(LLAMA3 if kind == "llama3" else ())}
    problems = [
        f"rope_parameters.{key} is {rope.get(key)!r}; a positive number is wanted"
        for key in sorted(needed)
        if not _is_positive(rope.get(key))
    ]
    if not problems and kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        problems.append("rope_parameters.high_freq_factor must be above low_freq_factor")
    return problems + [
        f"rope_parameters.{key} is unknown for rope_type {kind} (it is {_short(rope[key])})"
        for key in sorted(rope.keys() - needed - {"rope_type", "type"})
    ]


def _check_vision(vision: Any) -> list[str]:
    problems = _not_positive(
        vision,
        *("hidden_size", "num_hidden_layers", "attention_heads", "num_channels"),
        *("intermediate_size", "norm_eps", "max_num_tiles"),
    )
    if vision.num_global_layers < 0:
        problems.append(f"num_global_layers is {vision.num_global_layers}")
    problems += _check_activation(vision.hidden_act)
    for name in ("image_size", "patch_size"):
        if _side(getattr(vision, name)) is None:
            problems.append(f"{name} is {getattr(vision, name)}; tiles and patches are square")
    if problems:
        return problems
    image, patch = _side(vision.image_size), _side(vision.patch_size)
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
    tiles = vision.max_num_tiles
    for ratio in vision.supported_aspect_ratios:
        if (
            len(ratio) != 2
            or not all(_is_positive(n) for n in ratio)
            or ratio[0] * ratio[1] > tiles
        ):
            problems.append(f"supported_aspect_ratios has {ratio}; wanted: 1 to {tiles} tiles")
    return problems


def _check_activation(name: str) -> list[str]:
    if name in ACTIVATIONS:
        return []
    return [f"hidden_act is {name!r}; supported: {', '.join(sorted(ACTIVATIONS))}"]


def _not_positive(part: Any, *names: str) -> list[str]:
    return [
        f"{name} is {getattr(part, name)!r}; a positive number is wanted"
        for name in names
        if not _is_positive(getattr(part, name))
    ]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _side(size: Any) -> Any:
    """The side of a square given as a number or as two; None if it is no square."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    return next(iter(sides)) if len(sides) == 1 and _is_positive(next(iter(sides))) else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _build(config: Any) -> MllamaConfig:
    text, vision, rope = (
        config.text_config,
        config.vision_config,
        config.text_config.rope_parameters,
    )
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        )
    return MllamaConfig(
        vision=TiledVitConfig(
            hidden_size=vision.hidden_size,
            hidden_act=vision.hidden_act,
            num_hidden_layers=vision.num_hidden_layers,
            num_global_layers=vision.num_global_layers,
            attention_heads=vision.attention_heads,
            num_channels=vision.num_channels,
            intermediate_size=vision.intermediate_size,
            image_size=_side(vision.image_size),
            patch_size=_side(vision.patch_size),
            norm_eps=vision.norm_eps,
            max_num_tiles=vision.max_num_tiles,
            intermediate_layers_indices=tuple(vision.intermediate_layers_indices),
            supported_aspect_ratios=tuple((r[0], r[1]) for r in vision.supported_aspect_ratios),
        ),
        text=CrossDecoderConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            hidden_act=text.hidden_act,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            intermediate_size=text.intermediate_size,
            rope=RopeConfig(float(rope["rope_theta"]), scaling),
            rms_norm_eps=text.rms_norm_eps,
            max_position_embeddings=text.max_position_embeddings,
            cross_attention_layers=tuple(text.cross_attention_layers),
        ),
        image_token_index=config.image_token_index,
    )
