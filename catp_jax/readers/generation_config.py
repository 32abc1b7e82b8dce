"""What a folder's generation_config.json asks for, as defaults of `generation.options.Options`.

The rule is transformers': what the file says counts unless the caller says otherwise. So Llama 3.2
Vision, whose file has `do_sample` with temperature 0.6 and top-p 0.9, is sampled, and greedy with
`temperature=0`. Nothing is dropped in silence: a line says what is taken and what is not used; what
is not implemented is refused by name, unless its value changes nothing.

Of BLIP-2 and InstructBLIP transformers generates with the language model, which does not see the
file; nor is it used here.
"""

from pathlib import Path
from typing import Any

from catp_jax import strict_json
from catp_jax.files import is_there
from catp_jax.generation.options import Options

LENGTH = 20  # transformers' own max_length, which it takes for none
EARLY_STOPPING = {False: "heuristic", True: "first", "never": "never"}

TAKEN = (
    *("max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_eos_token_id", "stop_strings"),
)
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
BEAMS = ("length_penalty", "early_stopping")

# What is not implemented, with the values that change nothing; None never does.
MISSING: dict[str, tuple[Any, ...]] = {
    "min_length": (0,),
    "penalty_alpha": (0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "token_healing": (False,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid"),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("watermarking_config", "dola_layers", "constraints", "force_words_ids"), ()),
    **dict.fromkeys(("max_time", "forced_bos_token_id"), ()),
}
# The same, of what counts only where tokens are drawn.
MISSING_IN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
}
# What cannot change the tokens of an answer, or is read elsewhere.
INERT = frozenset(
    {
        *("eos_token_id", "pad_token_id", "bos_token_id"),  # see `reading.special_tokens`
        *("decoder_start_token_id", "max_length", "_from_model_config", "transformers_version"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("return_dict_in_generate", "use_cache", "cache_config", "max_cache_len", "low_memory"),
        *("prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config"),
        # guesses, which the model checks
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "use_mtp"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
        *("assistant_ensemble_weight", "target_lookbehind", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "speculation_type"),
    }
)
KNOWN = INERT.union(TAKEN, SAMPLING, BEAMS, MISSING, MISSING_IN_SAMPLING)


def generation_defaults(folder: Path, is_used: bool) -> tuple[Options, str]:
    """Options, and a line for the user, empty where there is nothing to say.

    `is_used`: whether the model's own `generate` in transformers reads the file. Raises ValueError
    if the file cannot be read, or asks for something that is not implemented.
    """
    path = folder / "generation_config.json"
    if not is_there(path):
        return Options(), ""
    content = strict_json.read(path)
    given = {key: value for key, value in content.items() if value not in (None, [], {})}
    missing = _missing(given)
    if not is_used:
        plain = {**vars(Options()), "do_sample": False}
        names = [name for name in (*TAKEN, "do_sample") if name in given]
        unused = ", ".join([*missing, *(name for name in names if given[name] != plain[name])])
        line = f"{path} is not used for this kind of model, as in transformers: {unused}"
        return Options(), line if unused else ""
    if missing:
        names = ", ".join(f"{name}={value!r}" for name, value in missing.items())
        raise ValueError(
            f"{path} asks for {names}, which is not implemented; take it out, or leave the file "
            "aside (generate --no-generation-config, in Python generation_config=False)"
        )
    try:
        options = Options(**_options(given))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    parts, plain = [], Options()
    taken = {
        name: value
        for name, value in vars(options).items()
        if value != getattr(plain, name) and (name != "max_new_tokens" or name in given)
    }
    if taken:
        parts.append(", ".join(f"{name}={_as_given(value)!r}" for name, value in taken.items()))
    if given.get("max_length", LENGTH) != LENGTH:
        parts.append(f"max_length={given['max_length']!r} is not used, give max_new_tokens")
    if unknown := [name for name in given if name not in KNOWN]:
        parts.append(f"{', '.join(unknown)}: unknown to transformers, not used")
    if options.temperature:
        parts.append("temperature 0 is greedy")
    return options, f"defaults from {path}: {'; '.join(parts)}" if parts else ""


def _as_given(value: Any) -> Any:
    """A value as the file has it, where lists are lists."""
    return [*map(_as_given, value)] if isinstance(value, tuple) else value


def sets_defaults(folder: Path, is_used: bool) -> bool:
    """Whether the file asks for anything."""
    try:
        return bool(generation_defaults(folder, is_used)[1])
    except ValueError:
        return True


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """What of the file is among our options. Raises ValueError for what is none."""
    taken = {name: given[name] for name in TAKEN if name in given}
    least = given.get("min_new_tokens")
    if isinstance(least, int) and "max_new_tokens" not in given:
        taken["max_new_tokens"] = max(Options().max_new_tokens, least)
    samples = given.get("do_sample", False)
    if not isinstance(samples, bool):
        raise ValueError(f"do_sample is true or false, got {samples!r}")
    if samples:
        # what the file does not say is as in transformers
        taken["temperature"] = given.get("temperature", 1.0)
        if taken["temperature"] == 0:
            raise ValueError("do_sample is true, and temperature 0: greedy answers have it false")
        taken["top_k"] = given.get("top_k", 50)
        taken["top_p"] = given.get("top_p", 1.0)
    if given.get("num_beams", 1) != 1:
        taken["length_penalty"] = given.get("length_penalty", 1.0)
        early = given.get("early_stopping", False)
        if not isinstance(early, bool | str) or early not in EARLY_STOPPING:
            raise ValueError(f"early_stopping is true, false or 'never', got {early!r}")
        taken["early_stopping"] = EARLY_STOPPING[early]
    return taken


def _missing(given: dict[str, Any]) -> dict[str, Any]:
    """What of the file would change answers and is not implemented."""
    samples = given.get("do_sample") is True
    harmless = MISSING | (MISSING_IN_SAMPLING if samples else {})
    missing = {
        name: given[name]
        for name, values in harmless.items()
        if given.get(name) is not None and given[name] not in values
    }
    if samples and given.get("num_beams", 1) != 1:
        missing |= {"num_beams": given["num_beams"], "do_sample": True}
    return missing
