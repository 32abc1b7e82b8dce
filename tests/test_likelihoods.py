"""How likely a given answer is, against transformers' logits of the whole text."""

from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import catp_jax
from tests.both import CIRCLE, PROMPTS, SHALLOW, Both
from tests.shallow import shallow

ANSWERS = [" blue", " no it is not", " the circle"]
MARK = "<|image|>"


@pytest.fixture(scope="module", params=SHALLOW)
def both(request: pytest.FixtureRequest) -> Both:
    return Both(shallow(request.param))


def asked(model: Any, answers: list[str], prompts: list[str] = PROMPTS, **options: Any) -> Any:
    cache: dict[Any, Any] = {}
    questions = [model.read(CIRCLE, prompt, cache=cache) for prompt in prompts]
    pairs = zip(prompts, answers, strict=True)
    answered = [model.read(CIRCLE, prompt, begun=text, cache=cache) for prompt, text in pairs]
    return model.likelihoods(questions, answered, **options)


def theirs(both: Both, prompt: str, answer: str) -> tuple[list[int], torch.Tensor]:
    """An answer's tokens, and the log-probabilities [tokens, vocab] in their places."""
    tokenizer = both.processor.tokenizer
    with torch.no_grad():
        if both.is_t5:
            tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
            inputs = both._read(prompt) | {"decoder_input_ids": torch.tensor([[0, *tokens[:-1]]])}
            logits = both.theirs(**inputs).logits[0]
        else:
            inputs = read(both, prompt + answer)
            whole = inputs["input_ids"][0].tolist()
            pairs = zip(whole, read(both, prompt)["input_ids"][0].tolist(), strict=False)
            tokens = whole[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]
            logits = both.theirs(**inputs).logits[0, -len(tokens) - 1 : -1]
    return tokens, logits.log_softmax(-1)


def read(both: Both, text: str) -> Any:
    """As `Both` does it, but that a prompt with an image mark is taken as it is."""
    if MARK not in text:
        return both._read(text)
    picture = Image.open(CIRCLE).convert("RGB")
    return dict(both.processor(images=picture, text=text, return_tensors="pt"))


def check(both: Both, prompts: list[str], answers: list[str]) -> None:
    found = asked(both.ours, answers, prompts)
    for one, prompt, answer in zip(found, prompts, answers, strict=True):
        tokens, expected = theirs(both, prompt, answer)
        assert one.tokens == tokens
        own = expected.gather(-1, torch.tensor(tokens, dtype=torch.long)[:, None])[:, 0]
        np.testing.assert_allclose(one.logprobs, own, atol=2e-4)
        assert one.total == pytest.approx(float(own.sum()), abs=1e-3)
        assert one.is_greedy == (expected.argmax(-1).tolist() == tokens)


def test_log_probabilities_are_transformers(both: Both):
    check(both, PROMPTS, ANSWERS)


def test_a_word_across_the_border_belongs_to_the_answer(both: Both):
    whole = ["what is the circle", "is it blue", "is it a square"]
    for cut in (1, 3):
        check(both, [text[:-cut] for text in whole], [text[-cut:] for text in whole])


def test_text_before_the_image_is_read_before_it(both: Both):
    if both.kind != "mllama":
        pytest.skip("its images are in front of all text")
    prompts = [f"look: {MARK}{PROMPTS[0]}", f"{PROMPTS[1]}{MARK}", f"a {MARK} b"]
    check(both, prompts, ANSWERS)


def test_a_full_budget_changes_nothing_and_a_small_one_does():
    model = catp_jax.load(shallow("mini-llama-vision"))
    whole = asked(model, ANSWERS)
    full = asked(model, ANSWERS, prune="uniform", keep="100%")
    few = asked(model, ANSWERS, prune="uniform", keep=1)
    for one, same, other in zip(whole, full, few, strict=True):
        np.testing.assert_allclose(one.logprobs, same.logprobs, atol=1e-5)
        assert one.tokens == other.tokens
    assert max(abs(a.total - b.total) for a, b in zip(whole, few, strict=True)) > 1e-3


def test_an_answer_does_not_depend_on_its_neighbours():
    model = catp_jax.load(shallow("mini-blip2-opt"))
    short = asked(model, [" blue", " no", " a"])
    long = asked(model, [" blue", " no it is not a circle but a square", " the"])
    np.testing.assert_allclose(short[0].logprobs, long[0].logprobs, atol=1e-5)


def test_an_empty_answer_is_certain():
    model = catp_jax.load(shallow("mini-blip2-opt"))
    one, none, _ = asked(model, [" a", "", " b"])
    assert one.total < 0
    assert (none.tokens, none.total, none.is_greedy) == ([], 0, True)
