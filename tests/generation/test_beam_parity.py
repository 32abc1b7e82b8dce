"""Beam search against transformers' `generate`, token by token, on tiny random models: BLIP-2 with
OPT and with T5, and Llama 3.2 Vision.

`test_beam` tries every combination of options on a cheaper model.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.rules import Rules
from catp_jax.generation.sampling import sampling
from catp_jax.struct import replace
from tests.parity import tiny as mllama
from tests.parity.tiny_blip2 import Prompts, tiny

NEW, PAD = 10, 1
EARLY = {"heuristic": False, "first": True, "never": "never"}
UNREACHABLE = (98, 99)
# Number of beams and when to stop: over the models each of them with each.
CASES = {
    "opt untied": [(2, "never"), (3, "heuristic"), (5, "first")],
    "t5 untied": [(2, "first"), (3, "never"), (5, "heuristic")],
    "mllama": [(3, "heuristic")],
}
PAIRS = [(name, *case) for name, cases in CASES.items() for case in cases]


@functools.cache
def both(name: str) -> tuple[Any, dict[str, torch.Tensor], Any, Any]:
    """transformers' model and inputs, padded on the left, and ours."""
    if name == "mllama":
        hf, model, config = mllama.tiny("gqa")
        samples = mllama.batch("everything")
        inputs = mllama.our_inputs(samples, config, "hf")
        return hf, mllama.hf_inputs(samples, config, is_left_padded=True), model, inputs
    hf, model, config = tiny(name)
    prompts = Prompts(config, seed=0)
    return hf, prompts.hf("left"), model, prompts.ours("left")


def theirs(name: str, ends: tuple[int, ...], **options: Any) -> np.ndarray:
    """transformers' new tokens; padding after the last one it made."""
    hf, inputs, _, _ = both(name)
    with torch.no_grad():
        out = hf.generate(
            **inputs,
            max_new_tokens=NEW,
            eos_token_id=list(ends),
            pad_token_id=PAD,
            do_sample=False,
            # T5's cache of transformers wants as many decoder layers as encoder layers
            use_cache=not name.startswith("t5"),
            **options,
        ).numpy()
    prompt = 1 if name.startswith("t5") else inputs["input_ids"].shape[1]
    tokens = np.full((len(out), NEW), PAD)
    tokens[:, : out.shape[1] - prompt] = out[:, prompt:]
    return tokens


def ours(name: str, ends: tuple[int, ...], how: Any, inputs: Any = None) -> programs.Generated:
    _, _, model, batch = both(name)
    return programs.generate(
        model,
        (),
        batch if inputs is None else inputs,
        how,
        Stop(
            ends=jnp.asarray(ends, jnp.int32), pad=jnp.asarray(PAD, jnp.int32), max_new_tokens=NEW
        ),
    )


def how(num_beams: int, early: Any, penalty: float, minimum: int) -> Any:
    """Our search."""
    rules = Rules.of(min_new_tokens=minimum)
    return beams(num_beams, early_stopping=early, length_penalty=penalty, rules=rules)


@functools.cache
def frequent(name: str) -> list[tuple[int, int]]:
    """Pairs of tokens that occur early in some answers, so that they make good end tokens."""
    free = theirs(name, UNREACHABLE, num_beams=2)
    assert (free != PAD).any()
    early, late = (np.unique(free[:, part]).tolist() for part in (slice(2), slice(3, None)))
    pairs = [(one, other) for one in early for other in late if one != other]
    return [pairs[int(place)] for place in np.linspace(0, len(pairs) - 1, 3)]


@pytest.mark.parametrize(("name", "num_beams", "early"), PAIRS)
def test_answers_are_transformers(name: str, num_beams: int, early: str):
    pairs, lengths = [*frequent(name), (40, 41)], []
    for ends, penalty, minimum in zip(pairs, (2.0, -1.0, 1.0, 0.0), (0, 1, 3, 0), strict=True):
        options = {"length_penalty": penalty, "min_new_tokens": minimum}
        expected = theirs(name, ends, num_beams=num_beams, early_stopping=EARLY[early], **options)
        out = ours(name, ends, how(num_beams, early, penalty, minimum))
        np.testing.assert_array_equal(out.tokens, expected)
        lengths += out.lengths.tolist()
    assert min(lengths) < NEW / 2  # ends do occur, and not everywhere
    assert max(lengths) == NEW


@pytest.mark.parametrize("name", ["opt untied", "t5 untied"])
@pytest.mark.parametrize("minimum", [0, 3])
def test_greedy_tokens_are_transformers(name: str, minimum: int):
    _, _, model, inputs = both(name)
    for ends in [UNREACHABLE, *frequent(name)]:
        out = programs.generate(
            model,
            (),
            inputs,
            sampling(inputs.tokens.shape[0], rules=Rules.of(min_new_tokens=minimum)),
            Stop(
                ends=jnp.asarray(ends, jnp.int32),
                pad=jnp.asarray(PAD, jnp.int32),
                max_new_tokens=NEW,
            ),
        )
        np.testing.assert_array_equal(out.tokens, theirs(name, ends, min_new_tokens=minimum))


def turned(inputs: Any) -> Any:
    """The same prompts, padded on the right."""
    tokens, valid = (np.asarray(array) for array in (inputs.tokens, inputs.token_valid))
    lengths = valid.sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    rolled = [np.roll(row, int(size), axis=0) for row, size in zip(tokens, lengths, strict=True)]
    kept = np.arange(tokens.shape[1])[None] < lengths[:, None]
    return replace(inputs, tokens=jnp.asarray(np.stack(rolled)), token_valid=jnp.asarray(kept))


@pytest.mark.parametrize("name", ["opt untied", "t5 untied"])
def test_the_side_of_the_padding_and_the_neighbours_do_not_matter(name: str):
    num_beams, early = CASES[name][1]
    how, ends = beams(num_beams, early_stopping=early), frequent(name)[0]
    _, _, _, inputs = both(name)
    left = ours(name, ends, how)
    right = ours(name, ends, how, turned(inputs))
    np.testing.assert_array_equal(left.tokens, right.tokens)
    row, own = 1, np.asarray(inputs.token_valid[1])
    alone = replace(
        inputs,
        image_index=inputs.image_index[row : row + 1],
        tokens=inputs.tokens[row : row + 1, own],
        token_valid=jnp.ones((1, int(own.sum())), bool),
    )
    out = ours(name, ends, how, alone)
    np.testing.assert_array_equal(out.tokens[0], left.tokens[row])
