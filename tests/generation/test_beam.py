"""Beam search's rules, on a model that is a table: against transformers, against trying everything,
and what it compiles.

Tables have 11 words, of which 3 and 8 end an answer, more or less often.
"""

import inspect
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.rules import Rules
from catp_jax.generation.sampling import sampling
from tests.generation.second_order import HfSecondOrder, ours, table

VOCAB, ENDS, PAD, NEW = 11, (3, 8), 1, 9
PROMPTS = np.asarray([[2, 4], [5, 6], [9, 9], [0, 2]])
EARLY = {"heuristic": False, "first": True, "never": "never"}
unchecked = inspect.unwrap(beams)  # as a user calls it, without our checks of types


def theirs(
    logits: np.ndarray, num_beams: int, early: str, ends: tuple[int, ...] = ENDS, **options: Any
) -> np.ndarray:
    """transformers' answers."""
    # without an end token its beam search fills up with -1
    options |= {"eos_token_id": list(ends) or None, "pad_token_id": PAD}
    with torch.no_grad():
        out = (
            HfSecondOrder(logits)
            .generate(
                torch.from_numpy(PROMPTS),
                num_beams=num_beams,
                early_stopping=EARLY[early],
                max_new_tokens=NEW,
                do_sample=False,
                use_cache=False,
                **options,
            )[:, 2:]
            .numpy()
        )
    answers = np.full((len(out), NEW), PAD)
    answers[:, : out.shape[1]] = out
    return answers


def search(
    logits: np.ndarray,
    num_beams: int,
    early: str = "heuristic",
    ends: tuple[int, ...] = ENDS,
    prompts: np.ndarray = PROMPTS,
    new: int = NEW,
    min_new_tokens: int = 0,
    **options: Any,
) -> programs.Generated:
    """Our answers."""
    options["rules"] = Rules.of(min_new_tokens=min_new_tokens)
    return programs.generate(
        ours(logits),
        (),
        jnp.asarray(prompts, jnp.int32),
        beams(num_beams, early_stopping=early, **options),
        Stop(
            ends=jnp.asarray(ends, jnp.int32), pad=jnp.asarray(PAD, jnp.int32), max_new_tokens=new
        ),
    )


# Of each length penalty one where ends are rare, as likely as the rest, and frequent.
TRIALS = [
    (seed, penalty, minimum, push)
    for seed, (penalty, (minimum, push)) in enumerate(
        itertools.product([-1.0, 0.0, 1.0, 2.0], [(0, 0.5), (1, 2.0), (3, -1.0)])
    )
]


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("early", EARLY)
def test_answers_are_transformers(num_beams: int, early: str):
    lengths = []
    for seed, penalty, minimum, push in TRIALS:
        logits = table(VOCAB, seed, ENDS, push)
        options = {"length_penalty": penalty, "min_new_tokens": minimum}
        out = search(logits, num_beams, early, **options)
        np.testing.assert_array_equal(out.tokens, theirs(logits, num_beams, early, **options))
        lengths += out.lengths.tolist()
    # else nothing is said about ends
    assert min(lengths) <= 2
    assert lengths.count(NEW) > 3
    assert len(set(lengths)) > 4


@pytest.mark.parametrize("answers", [2, 4])
def test_several_answers_are_transformers(answers: int):
    for seed, penalty, minimum, push in TRIALS[:6]:
        logits = table(VOCAB, seed, ENDS, push)
        options = {"length_penalty": penalty, "min_new_tokens": minimum}
        out = search(logits, 4, answers=answers, **options)
        options["num_return_sequences"] = answers
        np.testing.assert_array_equal(out.tokens, theirs(logits, 4, "heuristic", **options))
        assert len({*map(tuple, out.tokens[:answers].tolist())}) == answers


@pytest.mark.parametrize("ends", [(), (8,), (3, 5, 8)])
def test_answers_are_transformers_whatever_the_number_of_end_tokens(ends: tuple[int, ...]):
    for seed in range(4):
        logits = table(VOCAB, seed, ends, 1.0)
        np.testing.assert_array_equal(
            search(logits, 3, ends=ends).tokens, theirs(logits, 3, "heuristic", ends)
        )


def best_answer(logits: np.ndarray, prompt: np.ndarray, new: int, penalty: float) -> list[int]:
    """The likeliest answer of at most `new` tokens, by trying every one."""
    shares = logits.astype(np.float64)
    shares = shares - np.log(np.exp(shares).sum(axis=-1, keepdims=True))
    found: dict[tuple[int, ...], float] = {}

    def grow(answer: tuple[int, ...], score: float) -> None:
        if len(answer) == new or (answer and answer[-1] in ENDS):
            found[answer] = score / len(answer) ** penalty
            return
        before, last = (*prompt, *answer)[-2:]
        for token in range(len(logits)):
            grow((*answer, token), score + shares[before, last, token])

    grow((), 0.0)
    return list(max(found, key=lambda answer: found[answer]))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_as_many_beams_as_there_are_answers_find_the_likeliest(penalty: float):
    # 5 words, one of them an end: no more than 80 unfinished answers of three tokens
    new, vocab, is_greedy = 4, 5, []
    prompts = PROMPTS % vocab
    for seed in range(3):
        logits = table(vocab, seed, (3,), 0.7)
        out = search(logits, 100, "never", prompts=prompts, new=new, length_penalty=penalty)
        for prompt, tokens, length in zip(prompts, out.tokens, out.lengths, strict=True):
            assert tokens[: int(length)].tolist() == best_answer(logits, prompt, new, penalty)
        one = search(logits, 1, "first", prompts=prompts, new=new)
        is_greedy += (np.asarray(one.tokens) == np.asarray(out.tokens)).all(axis=1).tolist()
    assert not all(is_greedy)


@pytest.mark.parametrize("early", ["first", "heuristic"])
@pytest.mark.parametrize("minimum", [0, 3])
def test_one_beam_is_greedy(early: str, minimum: int):
    for seed in range(3):
        logits = table(VOCAB, seed, ENDS, 1.0)
        out = search(logits, 1, early, min_new_tokens=minimum)
        greedy = programs.generate(
            ours(logits),
            (),
            jnp.asarray(PROMPTS, jnp.int32),
            sampling(len(PROMPTS), rules=Rules.of(min_new_tokens=minimum)),
            Stop(
                ends=jnp.asarray(ENDS, jnp.int32),
                pad=jnp.asarray(PAD, jnp.int32),
                max_new_tokens=NEW,
            ),
        )
        np.testing.assert_array_equal(out.tokens, greedy.tokens)
        np.testing.assert_array_equal(out.lengths, greedy.lengths)
        assert (np.asarray(out.lengths) > minimum).all()


@pytest.mark.parametrize("early", EARLY)
def test_a_prompt_alone_gets_the_answer_it_gets_in_the_batch(early: str):
    is_early = []
    for seed in range(4):
        logits = table(VOCAB, seed, ENDS, 1.0)
        together = search(logits, 3, early)
        for row in range(len(PROMPTS)):
            alone = search(logits, 3, early, prompts=PROMPTS[[row]])
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        is_early.append(len(set(together.lengths.tolist())) > 1)
    assert any(is_early)  # prompts that ended while their neighbours went on


def test_padding_follows_the_end_and_lengths_count_it():
    out = search(table(VOCAB, 1, ENDS, 1.0), 3)
    for tokens, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True):
        assert not {*tokens[: length - 1]} & {*ENDS}
        assert length == NEW or tokens[length - 1] in ENDS
        assert tokens[length:] == [PAD] * (NEW - length)


def test_the_search_stops_when_all_prompts_have_their_answers():
    """Steps are counted by the cache, which a model without images is free to be."""
    calls: list[int] = []

    def count(_: Any) -> None:
        calls.append(1)

    class Counting(type(ours(table(VOCAB, 0, (), 0.0)))):
        def step(self, tokens: Any, cache: Any, select: Any) -> Any:
            jax.debug.callback(count, tokens)
            return super().step(tokens, cache, select)

    jax.tree_util.register_pytree_node(
        Counting, lambda model: ((model.table,), None), lambda _, arrays: Counting(table=arrays[0])
    )
    logits = table(VOCAB, 0, (), 0.0)
    logits[:, :, ENDS[0]] = 20  # every answer ends at once
    out = programs.generate(
        Counting(table=jnp.asarray(logits)),
        (),
        jnp.asarray(PROMPTS, jnp.int32),
        beams(2, early_stopping="heuristic"),
        Stop(
            ends=jnp.asarray(ENDS, jnp.int32), pad=jnp.asarray(PAD, jnp.int32), max_new_tokens=200
        ),
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert out.lengths.tolist() == [1] * 4
    assert 1 <= len(calls) < 10


def test_never_finds_what_the_heuristic_gives_up():
    differing = 0
    for seed in range(6):
        logits = table(VOCAB, seed, ENDS, 1.0)
        patient = search(logits, 3, "never", length_penalty=2.0)
        hasty = search(logits, 3, "first", length_penalty=2.0)
        differing += (np.asarray(patient.tokens) != np.asarray(hasty.tokens)).any()
    assert differing


def test_more_tokens_wanted_than_there_may_be_gives_as_many_as_there_may_be():
    out = search(table(VOCAB, 0, ENDS, 1.0), 3, min_new_tokens=NEW + 5)
    assert out.lengths.tolist() == [NEW] * 4
    assert not np.isin(np.asarray(out.tokens), ENDS).any()


def test_other_numbers_compile_nothing_and_another_number_of_beams_one_program():
    search(table(VOCAB, 0, ENDS, 0.0), 3)
    compiled = programs.generate._cache_size()
    for seed, penalty, minimum, push in TRIALS[:5]:
        search(
            table(VOCAB, seed, ENDS, push),
            3,
            ends=(seed, 10),
            length_penalty=penalty,
            min_new_tokens=minimum,
            prompts=PROMPTS[::-1].copy(),
        )
    assert programs.generate._cache_size() == compiled
    search(table(VOCAB, 0, ENDS, 0.0), 4)
    search(table(VOCAB, 1, ENDS, 0.0), 4, length_penalty=0.0)
    assert programs.generate._cache_size() == compiled + 1


def test_logits_are_those_of_the_first_new_token():
    logits = table(VOCAB, 2, ENDS, 0.0)
    out = search(logits, 2)
    np.testing.assert_array_equal(out.logits, logits[PROMPTS[:, 0], PROMPTS[:, 1]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 0}, "num_beams is at least 1, got 0"),
        ({"num_beams": -2}, "num_beams"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty"),
        ({"num_beams": 2, "length_penalty": math.inf}, "length_penalty"),
        ({"num_beams": 2, "length_penalty": -101.0}, "length_penalty"),
        ({"num_beams": 2, "early_stopping": "always"}, "'heuristic', 'first' or 'never'"),
        ({"num_beams": 2, "early_stopping": True}, "'heuristic', 'first' or 'never'"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        unchecked(**options)
