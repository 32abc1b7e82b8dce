"""What reading any config.json needs: transformers' defaults, and checks of keys and values.

transformers fills in the defaults of its config classes; every key is then either read or on the
list of those that change no number. An unknown key is refused: it may well change one.
"""

import copy
import functools
import json
import logging
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from catp_jax import messages, strict_json
from catp_jax.files import is_there
from catp_jax.terminal import one_line, without_advice
from convert.adapter import alone
from convert.shards import UNQUANTISED

WITHOUT_EFFECT_BY_KIND = {
    "what a mirror says of it": "author base_model base_model_name_or_path datasets language "
    "library_name license model_creator model_name pipeline_tag tags",
    "code and libraries": "auto_map custom_pipelines transformers.js_config trust_remote_code",
    "tokenizers": "max_seq_length model_max_length padding_side tokenizer_model_max_length "
    "tokenizer_padding_side truncation_side",
    "trainers": "freeze_language_model freeze_multi_modal_projector freeze_vision_tower "
    "gradient_checkpointing_kwargs ignore_index label_smoothing loss_type neftune_noise_alpha",
    "how a torch model is run": "attn_impl device_map low_cpu_mem_usage torch_compile "
    "use_flash_attention_2 use_flash_attn use_safetensors _flash_attn_2_enabled",
}
WITHOUT_EFFECT = {key for keys in WITHOUT_EFFECT_BY_KIND.values() for key in keys.split()}
"""What mirrors and trainers leave in a config.json, and no model reads: passed over with a note."""
PREFIXES = ("unsloth_", "axolotl_")  # of keys that a trainer made for itself
REPEATED = {
    *("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "vocab_size"),
}
"""What some write again at the top, for tools that look only there."""

MUST_BE_FALSE = frozenset({"pruned_heads", "quantization_config"})
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


def read_json(folder: Path) -> dict[str, Any]:
    """A folder's config.json as it stands. Raises ValueError if there is none or it is no JSON."""
    path = folder / "config.json"
    if not is_there(path):
        raise ValueError(
            alone(folder) or f"{folder} has no config.json; a Hugging Face model folder is wanted"
        )
    return strict_json.read(path)


def fill_defaults(raw: dict[str, Any]) -> Any:
    """transformers' own reading of it. Imported here, so that `import convert` stays light."""
    with without_advice():
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it only warns of what is refused anyway
    try:
        copy = json.loads(json.dumps(raw))  # it writes into what it is given
        config: Any = CONFIG_MAPPING[raw["model_type"]].from_dict(copy)
        text, stated = getattr(config, "text_config", None), raw.get("text_config")
        if text is not None and text.model_type == "t5" and isinstance(stated, dict):
            # transformers 5 calls every T5's head tied, whatever the file says
            text.tie_word_embeddings = stated.get("tie_word_embeddings") is not False
        return config
    finally:
        transformers.logging.set_verbosity(verbosity)


def check_keys(
    raw: Mapping[str, Any], prefix: str, known: Container[str], must_be_false: Container[str] = ()
) -> list[str]:
    """What is wrong with the keys of one part of config.json, whose place is `prefix`.

    At the top, those that repeat a value of the text part are not looked at yet.
    """
    problems = []
    for key, value in raw.items():
        if key == "quantization_config" and value:
            problems.append(_quantised(prefix, value))
        elif key in must_be_false or key in MUST_BE_FALSE:
            if value:
                problems.append(f"{prefix}{key} is {short(value)}; only without it")
        elif key in known or key in HARMLESS or (not prefix and key in REPEATED):
            continue
        elif key in WITHOUT_EFFECT or key.startswith(PREFIXES):
            note(f"config.json: {prefix}{key} changes no number and is passed over")
        else:
            problems.append(_unknown(prefix + key, value))
    return problems


def check_repeated(raw: Mapping[str, Any], config: Any) -> list[str]:
    """What is wrong with the keys at the top that should say what the text part says."""
    problems = []
    for key in sorted(REPEATED & raw.keys()):
        if getattr(getattr(config, "text_config", None), key, None) == raw[key]:
            note(f"config.json: {key} repeats text_config.{key} and is passed over")
        else:
            problems.append(_unknown(key, raw[key]))
    return problems


def _unknown(key: str, value: Any) -> str:
    return (
        f"{key} is unknown (it is {short(value)}); if it changes no number, "
        f"ignore_config={key!r} (--ignore-config {key}) passes over it"
    )


def listed_keys(keys: str | Iterable[str]) -> tuple[str, ...]:
    """Keys to ignore, of which a single one may stand alone. Raises ValueError for what is none."""
    found = (keys,) if isinstance(keys, str) or not isinstance(keys, Iterable) else tuple(keys)
    if wrong := [key for key in found if not isinstance(key, str)]:
        raise ValueError(f"ignore_config has keys of config.json, got {wrong[0]!r}")
    return found


def without(raw: dict[str, Any], keys: str | Iterable[str], where: str) -> dict[str, Any]:
    """A config.json without some keys, which may lie within its parts (`text_config.x`).

    Raises ValueError for a key that it has not.
    """
    raw = copy.deepcopy(raw)
    for key in listed_keys(keys):
        first, _, rest = key.partition(".")
        part, name = (raw[first], rest) if isinstance(raw.get(first), dict) and rest else (raw, key)
        if name not in part:
            raise ValueError(f"{where} has no key {key!r} to ignore; it has {', '.join(part)}")
        del part[name]
    return raw


@functools.cache
def note(text: str) -> None:
    """Says something that is no error, once."""
    logging.getLogger("catp_jax").warning("%s", one_line(text))


def _quantised(prefix: str, value: Any) -> str:
    kind = value.get("quant_method", value) if isinstance(value, dict) else value
    return (
        f"{prefix}quantization_config: the checkpoint is quantised ({short(kind)}), which is not "
        f"read; {UNQUANTISED}. If its tensors are not quantised after all, ignore_config="
        f"{prefix + 'quantization_config'!r} (--ignore-config {prefix}quantization_config) helps"
    )


def short(value: Any) -> str:
    """A value as JSON, cut to what fits a line."""
    return messages.short(json.dumps(value), 60)
