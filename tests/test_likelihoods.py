"""How likely a given answer is, against transformers' logits of the whole text."""

from typing import Any

import numpy as np
import pytest
import torch

import catp_jax
from tests.both import CIRCLE, PROMPTS, SHALLOW, Both
from tests.shallow import shallow

ANSWERS = [" blue", " no it is not", " the circle"]


@pytest.fixture(scope="module", params=SHALLOW)
def both(request: pytest.FixtureRequest) -> Both:
    return Both(shallow(request.param))


def asked(model: Any, answers: list[str], **options: Any) -> Any:
    cache: dict[Any, Any] = {}
    questions = [model.read(CIRCLE, prompt, cache=cache) for prompt in PROMPTS]
    pairs = zip(PROMPTS, answers, strict=True)
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
            inputs, before = both._read(prompt + answer), both._read(prompt)["input_ids"].shape[1]
            tokens = inputs["input_ids"][0, before:].tolist()
            logits = both.theirs(**inputs).logits[0, -len(tokens) - 1 : -1]
    return tokens, logits.log_softmax(-1)


def test_log_probabilities_are_transformers(both: Both):
    for found, prompt, answer in zip(asked(both.ours, ANSWERS), PROMPTS, ANSWERS, strict=True):
        tokens, expected = theirs(both, prompt, answer)
        assert found.tokens == tokens
        own = expected.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(found.logprobs, own, atol=2e-4)
        assert found.total == pytest.approx(float(own.sum()), abs=1e-3)
        assert found.is_greedy == (expected.argmax(-1).tolist() == tokens)


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


def test_an_answer_without_tokens_is_refused():
    model = catp_jax.load(shallow("mini-blip2-opt"))
    with pytest.raises(ValueError, match="that to prompt 1 adds none"):
        asked(model, [" a", "", " b"])
