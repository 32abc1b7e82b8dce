"""What is asked of a generation, through `Model.generate`, against transformers on the same folder:
which tokens of a prompt rules look at is its matter, too.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from catp_jax.answers import Answers
from catp_jax.struct import replace
from tests.both import CIRCLE, NAMES, PROMPTS, Both, folder_of

NEW = 8
LONG: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": 7}


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(folder_of(request.param, tmp_path_factory.mktemp("asked")))


@pytest.fixture(scope="module")
def free(both: Both) -> list[list[int]]:
    """transformers' answers where nothing is asked."""
    return both.tokens(**LONG)


# Both have every rule, so that a model compiles one program for them: what one is not about forbids
# a token that is hardly ever next.
RARE = 30


def penalised(free: list[list[int]]) -> dict[str, Any]:
    return {
        "repetition_penalty": 1.5,
        "begin_suppress_tokens": [free[0][0]],
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[RARE], [RARE, RARE]],
        "suppress_tokens": [RARE],
        "forced_eos_token_id": 20,
        "max_new_tokens": NEW,
        "min_new_tokens": 5,
    }


def forbidden(free: list[list[int]]) -> dict[str, Any]:
    return {
        "repetition_penalty": 1.01,
        "begin_suppress_tokens": [RARE],
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[free[1][0]], free[2][1:3]],
        "suppress_tokens": [free[0][1]],
        "forced_eos_token_id": 20,
        **LONG,
    }


@pytest.mark.parametrize("rules", [penalised, forbidden])
def test_rules_are_transformers(both: Both, free: list[list[int]], rules: Any):
    expected = both.tokens(**rules(free))
    assert both.answers(**rules(free)).tokens == expected
    assert expected != free


def test_rules_are_transformers_in_beam_search(both: Both):
    rules = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "num_beams": 3, **LONG}
    assert both.answers(**rules).tokens == both.tokens(**rules)


def test_a_token_that_the_model_does_not_have_is_refused(both: Both):
    with pytest.raises(ValueError, match=r"suppress_tokens has token 9999; this model has \d+"):
        both.answers(suppress_tokens=[9999])


@pytest.fixture(scope="module")
def stopped(both: Both) -> tuple[Answers, list[Any]]:
    """Ours and transformers' answers, with log-probabilities, up to a text that begins and ends
    within tokens.
    """
    string = both.answers(**LONG).text[0][1:4]
    options = {**LONG, "stop_strings": [string, "no such text"]}
    tokenizer = both.processor.tokenizer
    expected = both.expected(**options, tokenizer=tokenizer, output_scores=True)
    return both.answers(logprobs=3, **options), expected


def test_answers_end_with_a_stop_string_as_in_transformers(both: Both, stopped: Any):
    ours, expected = stopped
    whole = both.answers(**LONG)
    assert ours.tokens == [hf.new for hf in expected]
    assert whole.text[0][1:4] in ours.text[0]
    assert len(ours.tokens[0]) < len(whole.tokens[0])


def test_logits_that_are_not_finite_name_the_prompt(both: Both):
    packed = both.ours.prepare([CIRCLE] * 3, PROMPTS)
    inputs = packed.inputs
    images = getattr(inputs, "images", inputs)
    images = replace(images, pixels=np.full_like(images.pixels, np.nan))
    inputs = replace(inputs, images=images) if both.kind == "mllama" else images
    with pytest.raises(ValueError, match=r"prompt 0, 1, 2: the model's logits are not finite"):
        both.ours.generate_packed(dataclasses.replace(packed, inputs=inputs), **LONG)


def test_log_probabilities_come_with_their_tokens(both: Both, stopped: Any):
    out, expected = stopped
    for row, hf in enumerate(expected):
        tokens, scores = out.tokens[row], torch.stack(hf.scores, dim=1).log_softmax(-1)[0]
        assert tokens == hf.new
        assert len(out.logprobs[row]) == len(out.alternatives[row]) == len(tokens)
        their = scores[range(len(tokens)), tokens].tolist()
        np.testing.assert_allclose(out.logprobs[row], their, atol=1e-3)
        for place, likely in enumerate(out.alternatives[row]):
            assert [token for token, _ in likely] == scores[place].topk(3).indices.tolist()
            assert likely[0] == (tokens[place], out.logprobs[row][place])
    assert both.answers(**LONG).logprobs is None
