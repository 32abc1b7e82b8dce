"""What a folder's generation_config.json asks for: defaults that transformers would have, too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    GenerationConfig,
    MllamaForConditionalGeneration,
)

import catp_jax
from catp_jax.generation.options import Options
from catp_jax.readers.generation_config import KNOWN, generation_defaults, sets_defaults

ASSETS = Path(catp_jax.__file__).parent / "assets"
CIRCLE, PROMPT = ASSETS / "blue-circle.png", "what color is the shape?"
LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}  # as in Llama 3.2 Vision's


def folder(tmp_path: Path, given: Any) -> Path:
    """A folder with nothing but this file."""
    text = given if isinstance(given, str) else f"\ufeff{json.dumps(given)}"  # with its mark
    (tmp_path / "generation_config.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),
        (LLAMA, {"temperature": 0.6, "top_p": 0.9, "top_k": 50}),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": None}, {"temperature": 1.0, "top_k": 50}),
        ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True}, {}),
        (
            {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True},
            {"num_beams": 4, "length_penalty": 0.5, "early_stopping": "first"},
        ),
        ({"num_beams": 2, "early_stopping": False}, {"num_beams": 2}),
        ({"max_new_tokens": 7, "min_new_tokens": 2}, {"max_new_tokens": 7, "min_new_tokens": 2}),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2]},
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2]},
        ),
        (
            {"begin_suppress_tokens": [4], "forced_eos_token_id": 2, "bad_words_ids": [[3]]},
            {"begin_suppress_tokens": [4], "forced_eos_token_id": 2, "bad_words_ids": [[3]]},
        ),
        ({"stop_strings": ["x"], "num_return_sequences": 1}, {"stop_strings": ["x"]}),
        ({"repetition_penalty": 1.0, "suppress_tokens": [], "bad_words_ids": None}, {}),
        ({"eos_token_id": 2, "use_cache": True, "transformers_version": "4.45.0"}, {}),
    ],
)
def test_what_the_file_asks_for_are_defaults(tmp_path: Path, given: Any, expected: Any):
    found, _ = generation_defaults(folder(tmp_path, given), is_used=True)
    assert found == Options(**expected)


def test_one_line_says_what_was_taken(tmp_path: Path):
    _, said = generation_defaults(folder(tmp_path, LLAMA), is_used=True)
    assert said.endswith("temperature=0.6, top_k=50, top_p=0.9; temperature 0 is greedy")
    assert "\n" not in said
    assert generation_defaults(folder(tmp_path, {"do_sample": False}), is_used=True)[1] == ""
    _, said = generation_defaults(folder(tmp_path, {"max_length": 4096}), is_used=True)
    assert "max_length=4096 is not used, give max_new_tokens" in said


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"num_beam_groups": 2, "diversity_penalty": 0.5, "num_beams": 4}, "num_beam_groups=2"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p=0.9"),
        ({"do_sample": True, "min_p": 0.1}, "min_p=0.1"),
        ({"do_sample": True, "num_beams": 3}, "num_beams=3, do_sample=True"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"sequence_bias": [[[3], -2.0]]}, "sequence_bias"),
        ({"min_length": 30}, "min_length=30"),
        ({"exponential_decay_length_penalty": [5, 1.1]}, "exponential_decay_length_penalty"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"penalty_alpha": 0.6, "watermarking_config": {"bias": 2.0}}, "watermarking_config"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, given: Any, named: str):
    with pytest.raises(ValueError, match=r"not implemented; .*--no-generation-config") as refusal:
        generation_defaults(folder(tmp_path, given), is_used=True)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    "given",
    [
        {"penalty_alpha": None, "num_beam_groups": 1, "diversity_penalty": 0.0, "min_length": 0},
        {"typical_p": 0.9, "min_p": 0.1, "epsilon_cutoff": 3e-4},  # for drawing alone
        {"do_sample": True, "top_k": 0, "typical_p": 1.0, "eta_cutoff": 0.0, "temperature": 1.0},
        {"guidance_scale": 1, "encoder_repetition_penalty": 1.0, "remove_invalid_values": False},
        {"cache_implementation": "hybrid", "sequence_bias": None, "constraints": []},
    ],
)
def test_what_changes_nothing_passes(tmp_path: Path, given: Any):
    found, _ = generation_defaults(folder(tmp_path, given), is_used=True)
    assert found in (Options(), Options(temperature=1.0))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("not json", "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"top_k": 1, "top_k": 2}', "the key 'top_k' is there twice"),
        ({"do_sample": True, "temperature": "hot"}, "generation_config.json: "),
        ({"repetition_penalty": -1.0}, "repetition_penalty is above 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens is a whole number, got 'many'"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is true, false or 'never'"),
        ({"suppress_tokens": [-2]}, "suppress_tokens has token numbers"),
        ({"num_beams": 2, "early_stopping": {"a": 1}}, "early_stopping is true, false or 'never'"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is true, false or 'never', got 1"),
        ({"do_sample": True, "temperature": 0}, "do_sample is true, and temperature 0"),
        ({"do_sample": "yes"}, "do_sample is true or false, got 'yes'"),
        ({"do_sample": {"a": 1}}, "do_sample is true or false, got "),
        ({"repetition_penalty": True}, "repetition_penalty is a number, got True"),
        ({"num_beams": True}, "num_beams is a whole number, got True"),
        ({"no_repeat_ngram_size": False}, "no_repeat_ngram_size is a whole number, got False"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"at most max_new_tokens \(8\), got 9"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, given: Any, says: str):
    with pytest.raises(ValueError, match=says):
        generation_defaults(folder(tmp_path, given), is_used=True)


def test_a_study_notices_a_file_that_it_leaves_aside(tmp_path: Path):
    assert not sets_defaults(folder(tmp_path, {"do_sample": False}), is_used=True)
    assert sets_defaults(folder(tmp_path, LLAMA), is_used=True)
    assert sets_defaults(folder(tmp_path, {"penalty_alpha": 0.6}), is_used=True)


def test_every_key_that_transformers_knows_has_its_place(tmp_path: Path):
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known <= KNOWN
    _, line = generation_defaults(folder(tmp_path, {"my_key": 1, "top_kk": 3}), is_used=True)
    assert line.endswith("my_key, top_kk: unknown to transformers, not used")
    with pytest.raises(ValueError, match="forced_bos_token_id=5, which is not implemented"):
        generation_defaults(folder(tmp_path, {"forced_bos_token_id": 5}), is_used=True)


def test_without_a_file_there_is_nothing_to_say(tmp_path: Path):
    assert generation_defaults(tmp_path, is_used=True) == (Options(), "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"temperature": 0.6, "top_k": 50, "top_p": 0.9}),
        ({"temperature": 0.0}, {}),
        ({"temperature": 0.3}, {"temperature": 0.3, "top_k": 50, "top_p": 0.9}),
        ({"top_k": 0}, {"temperature": 0.6, "top_p": 0.9}),
        ({"num_beams": 4}, {"num_beams": 4}),
        ({"num_beams": 1}, {"temperature": 0.6, "top_k": 50, "top_p": 0.9}),
    ],
)
def test_what_is_given_wins_over_sampling(given: dict[str, Any], expected: dict[str, Any]):
    defaults = Options(temperature=0.6, top_k=50, top_p=0.9)
    assert defaults.over(**given) == Options(**expected)


def test_what_is_given_wins_over_beams_and_lengths():
    defaults = Options(num_beams=4, length_penalty=0.5, min_new_tokens=6, repetition_penalty=1.2)
    free = {"repetition_penalty": 1.2}
    assert defaults.over(temperature=1.0) == Options(temperature=1.0, min_new_tokens=6, **free)
    assert defaults.over(num_beams=1) == Options(min_new_tokens=6, **free)
    assert defaults.over(length_penalty=0.0).length_penalty == 0.0
    assert defaults.over(max_new_tokens=3).min_new_tokens == 3
    with pytest.raises(ValueError, match="min_new_tokens is at most max_new_tokens"):
        defaults.over(max_new_tokens=3, min_new_tokens=5)
    with pytest.raises(ValueError, match="num_beams is a whole number"):
        defaults.over(num_beams="2")


def test_a_least_length_above_our_own_longest_makes_answers_longer(tmp_path: Path):
    given, _ = generation_defaults(folder(tmp_path, {"min_new_tokens": 50}), is_used=True)
    assert given == Options(min_new_tokens=50, max_new_tokens=50)
    assert given.over(max_new_tokens=64) == Options(min_new_tokens=50, max_new_tokens=64)
    assert given.over(max_new_tokens=8) == Options(min_new_tokens=8, max_new_tokens=8)


def copied(tmp_path: Path, name: str, given: dict[str, Any]) -> Path:
    out = tmp_path / name
    shutil.copytree(ASSETS / name, out)
    path = out / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    return out


GIVEN: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 5,
    "max_new_tokens": 6,
    "num_beams": 2,
    "early_stopping": True,
}


@pytest.mark.parametrize("name", ["mini-llama-vision", "mini-blip2-opt"])
def test_answers_without_options_are_transformers(tmp_path: Path, name: str):
    path, picture = copied(tmp_path, name, GIVEN), Image.open(CIRCLE).convert("RGB")
    is_llama = "llama" in name
    kind = MllamaForConditionalGeneration if is_llama else Blip2ForConditionalGeneration
    hf: Any = kind.from_pretrained(path).eval()
    text = f"<|image|>{PROMPT}" if is_llama else PROMPT
    inputs: Any = AutoProcessor.from_pretrained(path)(
        images=picture, text=text, return_tensors="pt"
    )
    length = {} if is_llama else {"max_new_tokens": 32}  # ours, where neither reads the file
    with torch.no_grad():
        expected = hf.generate(**inputs, **length)[0, inputs["input_ids"].shape[1] :].tolist()
    model = catp_jax.load(path, mask_mode="hf" if is_llama else None)
    assert model.generate([CIRCLE], [PROMPT]).tokens[0] == expected
    assert ("defaults from" if is_llama else "not used") in model.note
    assert model.defaults.num_beams == (2 if is_llama else 1)


def test_the_shipped_models_say_nothing_and_a_file_can_be_left_aside(tmp_path: Path):
    for name in ("mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision"):
        model = catp_jax.load(ASSETS / name)
        assert (model.defaults, model.note) == (Options(), "")
    path = copied(tmp_path, "mini-llama-vision", GIVEN | {"penalty_alpha": 0.6})
    with pytest.raises(ValueError, match=r"penalty_alpha=0.6, which is not implemented"):
        catp_jax.load(path)
    model = catp_jax.load(path, generation_config=False)
    assert (model.defaults, model.note) == (Options(), "")
