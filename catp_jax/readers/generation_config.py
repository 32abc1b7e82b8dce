"""What a folder's generation_config.json asks for, as defaults of `generation.options.Options`.

The rule is transformers': what the file says counts unless the caller says otherwise. So Llama 3.2
Vision, whose file has `do_sample` with temperature 0.6 and top-p 0.9, is sampled, and greedy with
`temperature=0`. Nothing is dropped in silence: what is taken is told in one line, what is not
implemented is refused by name, unless its value changes nothing. Of BLIP-2 and InstructBLIP
transformers generates with the language model, which does not see the file; nor is it used here.
"""

from pathlib import Path
from typing import Any

from catp_jax.generation.options import Options
from catp_jax.readers.processor import read_json

LENGTH = 20  # transformers' own max_length, which it takes for none
READ_BY = ("mllama",)  # kinds of models whose `generate` reads the file in transformers
EARLY_STOPPING = {False: "heuristic", True: "first", "never": "never"}

AS_THEY_ARE = (
    *("max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_eos_token_id", "stop_strings"),
)
# What is not implemented, with the values that change nothing; None never does.
OTHERS: dict[str, tuple[Any, ...]] = {
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
    **dict.fromkeys(("max_time", "prefix_allowed_tokens_fn"), ()),
}
# The same, of what counts only where tokens are drawn.
DRAWING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
}


def generation_defaults(folder: Path) -> tuple[Options, str]:
    """Options, and a line for the user, empty where there is nothing to say.

    Raises ValueError if the file cannot be read, or asks for something that is not implemented.
    """
    path, config = folder / "generation_config.json", folder / "config.json"
    if not path.exists() or not config.exists():
        return Options(), ""
    given = {key: value for key, value in read_json(path).items() if value not in (None, [], {})}
    kind = read_json(config).get("model_type")
    missing = _missing(given)
    if kind not in READ_BY:
        plain = {**vars(Options()), "do_sample": False}
        asked = [name for name in (*AS_THEY_ARE, "do_sample") if name in given]
        names = ", ".join([*missing, *(name for name in asked if given[name] != plain[name])])
        aside = f"{path} is not used for this kind of model, as in transformers: {names}"
        return Options(), aside if names else ""
    if missing:
        names = ", ".join(f"{name}={value!r}" for name, value in missing.items())
        raise ValueError(
            f"{path} asks for {names}, which is not implemented; take it out, or leave the file "
            "aside (--no-generation-config, in Python generation_config=False)"
        )
    try:
        asked = _options(given)
        found = Options(**asked)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    said = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    if given.get("max_length", LENGTH) != LENGTH:
        rest = f"max_length={given['max_length']!r} is not used, give max_new_tokens"
        said = f"{said}; {rest}" if said else rest
    if not said:
        return found, ""
    greedy = "; temperature 0 is greedy" if found.temperature else ""
    return found, f"defaults from {path}: {said}{greedy}"


def sets_defaults(folder: Path) -> bool:
    """Whether the file asks for anything."""
    try:
        return bool(generation_defaults(folder)[1])
    except ValueError:
        return True


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """What of the file is among our options, without what changes nothing."""
    plain = Options()
    asked = {name: given[name] for name in AS_THEY_ARE if name in given}
    if given.get("do_sample"):
        # what the file does not say is as in transformers
        asked["temperature"] = given.get("temperature", 1.0)
        asked["top_k"] = given.get("top_k", 50)
        asked["top_p"] = given.get("top_p", 1.0)
    if given.get("num_beams", 1) != 1:
        asked["length_penalty"] = given.get("length_penalty", 1.0)
        early = given.get("early_stopping", False)
        if early not in EARLY_STOPPING:
            raise ValueError(f"early_stopping is true, false or 'never', got {early!r}")
        asked["early_stopping"] = EARLY_STOPPING[early]
    return {name: value for name, value in asked.items() if value != getattr(plain, name)}


def _missing(given: dict[str, Any]) -> dict[str, Any]:
    """What of the file would change answers and is not implemented."""
    does_draw = bool(given.get("do_sample"))
    inert = OTHERS | (DRAWING if does_draw else {})
    missing = {
        name: given[name]
        for name, harmless in inert.items()
        if given.get(name) is not None and given[name] not in harmless
    }
    if does_draw and given.get("num_beams", 1) != 1:
        missing |= {"num_beams": given["num_beams"], "do_sample": True}
    return missing
