"""What is asked of a generation, through `Model.generate` on the shipped models, against
transformers on the same folders: which tokens of a prompt rules look at is its matter, too.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    MllamaForConditionalGeneration,
)

import catp_jax
from catp_jax.struct import replace

ASSETS = Path(catp_jax.__file__).parent / "assets"
CIRCLE = ASSETS / "blue-circle.png"
PROMPTS = ["what color is the shape?", "is there a circle?", "what shape?"]
IMAGES = [CIRCLE] * len(PROMPTS)
NEW = 8
RULES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5, "begin_suppress_tokens": [320], "min_new_tokens": 5},
    {
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[339], [320, 30]],
        "suppress_tokens": [279],
        "forced_eos_token_id": 320,
        "min_new_tokens": 7,
    },
]


class Both:
    """One of the shipped models, in transformers and in ours."""

    def __init__(self, name: str):
        self.is_llama, self.is_t5 = "llama" in name, "t5" in name
        kind = MllamaForConditionalGeneration if self.is_llama else Blip2ForConditionalGeneration
        self.theirs: Any = kind.from_pretrained(ASSETS / name).eval()
        side = "right" if self.is_t5 else "left"
        self.processor: Any = AutoProcessor.from_pretrained(ASSETS / name, padding_side=side)
        # there, text that sees no image is as in transformers
        self.ours = catp_jax.load(ASSETS / name, mask_mode="hf" if self.is_llama else None)
        picture = Image.open(CIRCLE).convert("RGB")
        self.inputs = self.processor(
            images=[[picture] if self.is_llama else picture] * len(PROMPTS),
            text=[f"<|image|>{text}" if self.is_llama else text for text in PROMPTS],
            padding=True,
            return_tensors="pt",
        )

    def expected(self, **options: Any) -> Any:
        """transformers' answers, with `new`: their tokens without the prompt."""
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        with torch.no_grad():
            out = self.theirs.generate(**self.inputs, **options, return_dict_in_generate=True)
        prompt = 1 if self.is_t5 else self.inputs["input_ids"].shape[1]
        out.new = out.sequences[:, prompt:].tolist()
        return out

    def answers(self, **options: Any) -> Any:
        return self.ours.generate(IMAGES, PROMPTS, **{"max_new_tokens": NEW, **options})


@pytest.fixture(scope="module", params=["mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision"])
def both(request: pytest.FixtureRequest) -> Both:
    return Both(request.param)


def same(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """transformers' rows are filled up behind the end."""
    for own, other in zip(ours, theirs, strict=True):
        assert own == other[: len(own)]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: next(iter(rules)))
def test_rules_are_transformers(both: Both, rules: dict[str, Any]):
    expected = both.expected(**rules)
    same(both.answers(**rules).tokens, expected.new)
    assert expected.new != both.expected().new


def test_rules_are_transformers_in_beam_search(both: Both):
    rules = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 7}
    same(both.answers(**rules, num_beams=3).tokens, both.expected(**rules, num_beams=3).new)


def test_a_token_that_the_model_does_not_have_is_refused(both: Both):
    with pytest.raises(ValueError, match=r"suppress_tokens has token 9999; this model has \d+"):
        both.answers(suppress_tokens=[9999])


def test_answers_end_with_a_stop_string_as_in_transformers(both: Both):
    free = both.answers(min_new_tokens=7)
    string = free.text[0][1:4]  # which begins and ends within tokens
    options = {"min_new_tokens": 7, "stop_strings": [string, "no such text"]}
    ours = both.answers(**options)
    same(ours.tokens, both.expected(**options, tokenizer=both.processor.tokenizer).new)
    assert string in ours.text[0]
    assert len(ours.tokens[0]) < len(free.tokens[0])


def test_logits_that_are_not_finite_name_the_prompt(both: Both):
    packed = both.ours.prepare(IMAGES, PROMPTS)
    images = getattr(packed.inputs, "images", packed.inputs)
    pixels = np.asarray(images.pixels).copy()
    pixels[:] = np.nan
    images = replace(images, pixels=pixels)
    inputs = replace(packed.inputs, images=images) if both.is_llama else images
    with pytest.raises(ValueError, match=r"prompt 0, 1, 2: the model's logits are not finite"):
        both.ours.generate_packed(dataclasses.replace(packed, inputs=inputs), max_new_tokens=NEW)


def test_log_probabilities_come_with_their_tokens(both: Both):
    out = both.answers(logprobs=3)
    hf = both.expected(output_scores=True)
    scores = torch.stack(hf.scores, dim=1).log_softmax(-1)
    for row, tokens in enumerate(out.tokens):
        assert len(out.logprobs[row]) == len(out.alternatives[row]) == len(tokens)
        expected = scores[row, range(len(tokens)), tokens].tolist()
        np.testing.assert_allclose(out.logprobs[row], expected, atol=1e-3)
        for place, likely in enumerate(out.alternatives[row]):
            assert [token for token, _ in likely] == scores[row, place].topk(3).indices.tolist()
            assert likely[0] == (tokens[place], out.logprobs[row][place])
    assert both.answers().logprobs is None
