"""What may be written, against transformers: its logits processors one by one, then its `generate`
on a model that is a table, greedy and by beam search.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.options import Options
from catp_jax.generation.rules import Rules
from tests.generation.second_order import HfSecondOrder, ours, table

VOCAB, ENDS, PAD, NEW = 13, (3, 8), 1, 8
PROMPTS = [[2, 4, 5, 2, 4], [5, 6, 7, 6, 7], [9, 9, 9, 0, 9], [0, 2, 10, 11, 2]]
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "1-grams": {"no_repeat_ngram_size": 1},
    "2-grams": {"no_repeat_ngram_size": 2},
    "3-grams": {"no_repeat_ngram_size": 3},
    "words": {"bad_words_ids": [[6], [2, 4], [4, 2, 9], [12, 12], [9, 9]]},
    "an end is no word": {"bad_words_ids": [[3], [8, 3], [10]]},
    "suppressed": {"suppress_tokens": [0, 7, 12]},
    "suppressed ends": {"suppress_tokens": [3, 8, 5]},
    "at first": {"begin_suppress_tokens": [3, 8, 10, 0, 2, 4, 6]},
    "forced end": {"forced_eos_token_id": [8]},
    "forced ends": {"forced_eos_token_id": [3, 8, 11], "suppress_tokens": [3]},
    "minimum": {"min_new_tokens": 4},
    "all": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[6], [10, 11]],
        "min_new_tokens": 2,
        "suppress_tokens": [7],
        "begin_suppress_tokens": [5, 0],
        "forced_eos_token_id": 3,
    },
}
by_rule = pytest.mark.parametrize("name", RULES)
unchecked = inspect.unwrap(Options)  # as a user calls it, without our checks of types


def stopped(new: int = NEW) -> Stop:
    return Options(max_new_tokens=new).stop(ENDS, PAD)


def processors(prompt: int, **options: Any) -> Any:
    """transformers' processors, as its `generate` puts them together."""
    config = GenerationConfig(**options, max_length=prompt + NEW, eos_token_id=list(ENDS))
    config._eos_token_tensor = torch.tensor(ENDS)
    model = HfSecondOrder(table(VOCAB, 0, ENDS, 0.0))
    return model._get_logits_processor(config, input_ids_seq_length=prompt)


apply = jax.jit(lambda rules, logits, written, number, stop: rules(logits, written, number, stop))


@by_rule
@pytest.mark.parametrize("length", [1, 2, 5])
def test_logits_change_as_by_transformers_processors(name: str, length: int):
    rng, options = np.random.default_rng(0), RULES[name]
    prompts = [row[:length] for row in PROMPTS]
    rules = Options(max_new_tokens=NEW, **options).decoding(len(prompts), prompts).rules
    # few words, so that they come again
    written = rng.choice([2, 4, 6, 9, 10, 11, 12, 8], (len(PROMPTS), NEW))
    for number in (0, 1, 2, 5, NEW - 1):
        logits = rng.normal(size=(len(PROMPTS), VOCAB)).astype(np.float32) * 3
        text = torch.tensor([[*p, *w[:number]] for p, w in zip(prompts, written, strict=True)])
        expected = processors(length, **options)(text.long(), torch.from_numpy(logits.copy()))
        out = apply(
            rules,
            jnp.asarray(logits),
            jnp.asarray(written, jnp.int32),
            jnp.asarray(number, jnp.int32),
            stopped(),
        )
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-6)


def theirs(logits: np.ndarray, prompts: list[list[int]], **options: Any) -> np.ndarray:
    with torch.no_grad():
        out = HfSecondOrder(logits).generate(
            torch.tensor(prompts),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=False,
            eos_token_id=list(ENDS),
            pad_token_id=PAD,
            **options,
        )
    answers = np.full((len(out), NEW), PAD)
    answers[:, : out.shape[1] - len(prompts[0])] = out[:, len(prompts[0]) :].numpy()
    return answers


def answered(logits: np.ndarray, prompts: list[list[int]], options: Options) -> Any:
    return programs.generate(
        ours(logits),
        (),
        jnp.asarray([row[-2:] for row in prompts], jnp.int32),
        options.decoding(len(prompts), prompts),
        options.stop(ENDS, PAD),
    )


@by_rule
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_transformers(name: str, num_beams: int):
    changed = False
    for seed in range(3):
        logits = table(VOCAB, seed, ENDS, -0.5)
        out = answered(logits, PROMPTS, Options(NEW, num_beams=num_beams, **RULES[name]))
        expected = theirs(logits, PROMPTS, num_beams=num_beams, **RULES[name])
        np.testing.assert_array_equal(out.tokens, expected)
        changed |= (expected != theirs(logits, PROMPTS, num_beams=num_beams)).any()
    assert changed == (name != "none")


def test_rows_of_different_length_are_ruled_as_alone():
    prompts = [[2, 4], [5, 6, 7, 6, 7], [9, 9, 9, 0]]
    options = Options(NEW, **RULES["all"])
    logits = table(VOCAB, 1, ENDS, 0.5)
    together = answered(logits, prompts, options)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(
            together.tokens[row], theirs(logits, [prompt], **RULES["all"])[0]
        )


def test_several_answers_to_a_prompt_are_ruled_each_by_its_own_text():
    logits = table(VOCAB, 2, (), 0.0)
    options = Options(NEW, temperature=1.5, num_return_sequences=5, no_repeat_ngram_size=1)
    out = answered(logits, PROMPTS, options)
    for row, tokens in enumerate(np.asarray(out.tokens).tolist()):
        own = tokens[: int(out.lengths[row])]
        assert len({*own}) == len(own)
        assert not {*own} & {*PROMPTS[row // 5]}


def test_rules_that_are_off_are_not_in_the_program():
    logits, prompts = table(VOCAB, 0, ENDS, 0.0), jnp.asarray([[2, 4]], jnp.int32)

    def text(**options: Any) -> str:
        how = Options(NEW, **options)
        return programs.generate.lower(
            ours(logits), (), prompts, how.decoding(1, [[2, 4]]), how.stop(ENDS, PAD)
        ).as_text()

    assert "scatter" not in text()
    assert text(min_new_tokens=3) == text()
    for name in ("penalty", "2-grams", "words", "suppressed", "at first", "forced end"):
        assert "scatter" in text(**RULES[name])


def test_other_numbers_compile_nothing():
    logits = table(VOCAB, 0, ENDS, 0.0)
    answered(logits, PROMPTS, Options(NEW, **RULES["all"]))
    compiled = programs.generate._cache_size()
    for words, penalty in ([[[5], [2, 10]], 2.0], [[[10, 2], [6, 5]], 0.5]):
        numbers = {"bad_words_ids": words, "repetition_penalty": penalty, "suppress_tokens": [2]}
        numbers |= {"begin_suppress_tokens": [1, 2], "forced_eos_token_id": 8, "min_new_tokens": 1}
        options = Options(NEW, **RULES["all"] | numbers)
        answered(logits, [[2, *row] for row in PROMPTS], options)
    assert programs.generate._cache_size() == compiled


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"min_new_tokens": -1}, "min_new_tokens is at least 0, got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is above 0"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is a number of tokens"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is a whole number"),
        ({"bad_words_ids": [[]]}, "at least one token, got an empty one"),
        ({"bad_words_ids": [[3, -1]]}, "bad_words_ids has token numbers, from 0 up; got -1"),
        ({"suppress_tokens": [True]}, "suppress_tokens has token numbers, from 0 up; got True"),
        ({"begin_suppress_tokens": [-5]}, "begin_suppress_tokens has token numbers"),
        ({"forced_eos_token_id": -1}, "forced_eos_token_id has token numbers"),
    ],
)
def test_rules_that_cannot_be_are_refused(given: dict, says: str):
    with pytest.raises(ValueError, match=says):
        unchecked(**given)


@pytest.mark.parametrize(
    "name", ["suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"]
)
def test_tokens_that_a_model_does_not_have_are_refused(name: str):
    Options(**{name: [VOCAB - 1]}).check_vocabulary(VOCAB)
    with pytest.raises(ValueError, match=f"{name} has token 13; this model has 13 tokens"):
        Options(**{name: [VOCAB]}).check_vocabulary(VOCAB)


def test_words_with_tokens_that_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="bad_words_ids has token 40; this model has 13"):
        Options(bad_words_ids=[[1], [2, 40]]).check_vocabulary(VOCAB)


def test_rules_take_the_rows_of_a_prompt_in_succession():
    rules = Rules.of(repetition_penalty=2.0, before=[[0], [1]])
    logits = jnp.ones((4, 3))
    out = apply(rules, logits, jnp.zeros((4, 2), jnp.int32), jnp.asarray(0, jnp.int32), stopped(2))
    assert out.argmin(axis=1).tolist() == [0, 0, 1, 1]
