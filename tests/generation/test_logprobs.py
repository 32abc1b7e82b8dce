"""Log-probabilities of what was written, against transformers' scores, on a model that is a table;
and logits that no token can be chosen from.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.generation import generate as programs
from catp_jax.generation.options import Options
from tests.generation.second_order import HfSecondOrder, ours, table
from tests.generation.test_sampling import transformers_shares

VOCAB, ENDS, PAD, NEW = 11, (3, 8), 1, 7
PROMPTS = [[2, 4], [5, 6], [9, 9], [0, 2]]
RULES: dict[str, Any] = {"repetition_penalty": 1.4, "suppress_tokens": [7], "min_new_tokens": 2}


def written(logits: np.ndarray, options: Options, prompts: Any = PROMPTS) -> programs.Generated:
    return programs.generate(
        ours(logits),
        (),
        jnp.asarray(prompts, jnp.int32),
        options.decoding(len(prompts), prompts),
        options.stop(ENDS, PAD),
    )


def theirs(logits: np.ndarray, **options: Any) -> Any:
    with torch.no_grad():
        return HfSecondOrder(logits).generate(
            torch.tensor(PROMPTS),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=False,
            eos_token_id=list(ENDS),
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


@pytest.mark.parametrize("rules", [{}, RULES], ids=["free", "ruled"])
def test_greedy_ones_are_transformers(rules: dict[str, Any]):
    logits = table(VOCAB, 0, ENDS, -0.5)
    out, expected = written(logits, Options(NEW, logprobs=3, **rules)), theirs(logits, **rules)
    scores = torch.stack(expected.scores, dim=1).log_softmax(-1)  # b new vocab
    values, places = scores.topk(3)
    text, seen = expected.sequences[:, 2:], out.written
    assert seen.logprobs is not None
    for row, length in enumerate(out.lengths.tolist()):
        assert out.tokens[row, :length].tolist() == text[row, :length].tolist()
        own = scores[row, :length].gather(-1, text[row, :length, None])[:, 0]
        np.testing.assert_allclose(seen.logprobs[row, :length], own, atol=1e-5)
        np.testing.assert_array_equal(seen.top_tokens[row, :length], places[row, :length])
        np.testing.assert_allclose(seen.top_logprobs[row, :length], values[row, :length], atol=1e-5)


@pytest.mark.parametrize("rules", [{}, RULES], ids=["free", "ruled"])
def test_those_of_beams_are_transformers(rules: dict[str, Any]):
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    for seed in range(3):
        logits = table(VOCAB, seed, ENDS, -0.5)
        out = written(logits, Options(NEW, logprobs=2, **options, **rules))
        hf = theirs(logits, **options, **rules)
        steps = HfSecondOrder(logits).compute_transition_scores(
            hf.sequences, hf.scores, hf.beam_indices
        )
        seen = out.written
        assert seen.logprobs is not None
        for row, length in enumerate(out.lengths.tolist()):
            assert out.tokens[row, :length].tolist() == hf.sequences[row, 2 : 2 + length].tolist()
            np.testing.assert_allclose(seen.logprobs[row, :length], steps[row, :length], atol=1e-5)
            whole = seen.logprobs[row, :length].sum()
            assert float(whole) == pytest.approx(float(hf.sequences_scores[row]), abs=1e-4)
            for place in range(length):
                beam = int(hf.beam_indices[row, place])
                values, tokens = hf.scores[place][beam].topk(2)
                np.testing.assert_allclose(seen.top_logprobs[row, place], values, atol=1e-5)
                assert seen.top_tokens[row, place].tolist() == tokens.tolist()


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 4, "top_p": 0.8}]
)
def test_sampled_ones_are_those_that_the_token_was_drawn_with(options: dict[str, Any]):
    logits = table(VOCAB, 1, ENDS, -0.5)
    out = written(logits, Options(NEW, logprobs=5, **options, **{"num_return_sequences": 3}))
    seen = out.written
    assert seen.logprobs is not None
    for row, length in enumerate(out.lengths.tolist()):
        text = [*PROMPTS[row // 3], *out.tokens[row].tolist()]
        for place in range(length):
            shares = transformers_shares(
                logits[text[place], text[place + 1]],
                options["temperature"],
                options.get("top_k", 0),
                options.get("top_p", 1.0),
            )
            with np.errstate(divide="ignore"):
                expected = np.log(shares)
            own = float(seen.logprobs[row, place])
            assert own == pytest.approx(expected[text[place + 2]], abs=1e-4)
            order = np.argsort(-expected, kind="stable")[:5]
            np.testing.assert_allclose(seen.top_logprobs[row, place], expected[order], atol=1e-4)
            is_likely = expected[order] > -np.inf
            tokens = np.asarray(seen.top_tokens[row, place])
            np.testing.assert_array_equal(tokens[is_likely], order[is_likely])


def test_what_is_not_asked_for_is_not_in_the_program():
    logits, prompts = table(VOCAB, 0, ENDS, 0.0), jnp.asarray(PROMPTS, jnp.int32)

    def text(**options: Any) -> str:
        how = Options(NEW, **options)
        return programs.generate.lower(
            ours(logits), (), prompts, how.decoding(4), how.stop(ENDS, PAD)
        ).as_text()

    assert "top_k" not in text()
    assert "exponential" not in text()  # no softmax
    assert "top_k" not in text(logprobs=0)
    assert "exponential" in text(logprobs=0)
    assert "top_k" in text(logprobs=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 3}, {"num_beams": 3}])
def test_rows_whose_logits_are_not_finite_are_told_and_end(bad: float, options: dict[str, Any]):
    logits = table(VOCAB, 0, (), -4.0)
    fine = written(logits, Options(NEW, **options))
    assert fine.is_finite.tolist() == [True] * 4
    logits = logits.copy()
    logits[9, 9, 5] = bad  # where the third prompt begins
    out = written(logits, Options(NEW, **options))
    assert out.is_finite.tolist() == [True, True, False, True]
    for row in (0, 1, 3):
        if (9, 9) not in zip(
            fine.tokens[row].tolist(), fine.tokens[row, 1:].tolist(), strict=False
        ):
            np.testing.assert_array_equal(out.tokens[row], fine.tokens[row])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_rows_without_a_token_left_are_told(num_beams: int):
    every = [*range(VOCAB)]
    logits = table(VOCAB, 0, ENDS, 0.0)
    out = written(logits, Options(NEW, num_beams=num_beams, suppress_tokens=every))
    assert out.is_finite.tolist() == [False] * 4
    prompts = [[2, 4], every]
    out = written(
        logits,
        Options(NEW, num_beams=num_beams, no_repeat_ngram_size=1),
        prompts=[row[-2:] for row in prompts],
    )
    assert out.is_finite.all()


@pytest.mark.parametrize("given", [-1, True, 2.5])
def test_counts_that_cannot_be_are_refused(given: Any):
    with pytest.raises(ValueError, match="logprobs is a number of tokens, from 0, got"):
        Options(logprobs=given)
    with pytest.raises(ValueError, match="logprobs is 12; this model has 11 tokens"):
        Options(logprobs=12).check_vocabulary(VOCAB)
