"""Texts that end an answer, against transformers' criteria and against plain search."""

import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation.stopping_criteria import StopStringCriteria

import catp_jax
from catp_jax.generation import generate as programs
from catp_jax.generation.options import Options
from catp_jax.generation.stop_strings import machine
from catp_jax.readers.token_text import token_bytes
from tests.generation.second_order import ours, table

ASSETS = Path(catp_jax.__file__).parent / "assets"
WORDS = [b"a", b"b", b"ab", b"ba", b"aab", b" ", b"bb a", b"", b"\xc3", b"\xa4", b"\xc3\xa4b"]


@pytest.mark.parametrize(
    "strings",
    [["a"], ["ab"], ["aab", "bab"], ["b a", "aaaa"], ["ä"], ["äb", "ba"], ["abaab", "aba b"]],
)
def test_a_string_is_found_with_the_token_that_completes_it(strings: list[str]):
    states = machine(strings, WORDS)
    assert len(states) & (len(states) - 1) == 0
    for tokens in itertools.product(range(len(WORDS)), repeat=4):
        state, text, is_found = 0, b"", False
        for token in tokens:
            state, text = states[state, token], text + WORDS[token]
            is_found = any(string.encode() in text for string in strings)
            assert (state == len(states) - 1) == is_found
            if is_found:
                break


def test_other_strings_of_like_length_have_as_many_states():
    assert machine(["stop", "end"], WORDS).shape == machine(["halt", "now"], WORDS).shape


@pytest.mark.parametrize("name", ["mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision"])
def test_texts_end_where_they_do_in_transformers(name: str):
    tokenizer: Any = AutoTokenizer.from_pretrained(ASSETS / name)
    size, rng = len(tokenizer), np.random.default_rng(0)
    written = token_bytes(tokenizer, size)
    for strings in (["t"], [" the"], ["e", "is "], ["colo", "or i"], ["\n"], ["é"]):
        states, theirs = machine(strings, written), StopStringCriteria(tokenizer, strings)
        texts = [rng.integers(3, size, 12) for _ in range(20)]
        texts += [tokenizer(f"what is the color in it?\n{word}é")["input_ids"] for word in strings]
        for text in texts:
            state = 0
            for place, token in enumerate(text, start=1):
                state = states[state, token]
                ends = theirs(torch.tensor(text[:place])[None], None)
                assert bool(ends[0]) == (state == len(states) - 1)
                if ends[0]:
                    break


def test_what_tokens_write_is_the_text():
    for name in ("mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision"):
        tokenizer: Any = AutoTokenizer.from_pretrained(ASSETS / name)
        text = "is this a blue ciRcle?\n naïve 😀"
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        written = token_bytes(tokenizer, len(tokenizer))
        assert b"".join(written[token] for token in tokens).decode().lstrip() == text


def test_bytes_of_a_sentencepiece_vocabulary():
    class Tokenizer:
        """As Vicuna's, with a piece, a byte, and a special token."""

        def get_vocab(self) -> dict[str, int]:
            return {"▁the": 0, "<0x0A>": 1, "</s>": 2, "x": 9}

        def get_added_vocab(self) -> dict[str, int]:
            return {"</s>": 2}

    assert token_bytes(Tokenizer(), 5) == [b" the", b"\n", b"</s>", b"", b""]


VOCAB, PAD, NEW = 11, 1, 9
PROMPTS = np.asarray([[2, 4], [5, 6], [9, 9], [0, 2]])
LETTERS = [b"a", b"b", b"c", b"d", b"ab", b"bc", b"cd", b"da", b"e", b"f", b"g"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_end_in_the_loop_with_a_string(num_beams: int):
    options = Options(NEW, num_beams=num_beams, stop_strings=["bc", "dab"])
    stop = options.stop((), PAD, machine(options.strings, LETTERS))
    lengths = []
    for seed in range(4):
        out = programs.generate(
            ours(table(VOCAB, seed, (), 0.0)),
            (),
            jnp.asarray(PROMPTS, jnp.int32),
            options.decoding(len(PROMPTS)),
            stop,
        )
        for tokens, length in zip(np.asarray(out.tokens), out.lengths.tolist(), strict=True):
            texts = [b"".join(LETTERS[t] for t in tokens[:size]) for size in range(NEW + 1)]
            found = [any(string in text for string in (b"bc", b"dab")) for text in texts]
            assert found[length] or length == NEW
            assert not any(found[:length])
            assert (tokens[length:] == PAD).all()
            lengths.append(length)
    assert min(lengths) < NEW / 2
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("given", ["", [""], ["a", ""]])
def test_empty_strings_are_refused(given: Any):
    with pytest.raises(ValueError, match="stop_strings are texts, and none is empty"):
        Options(stop_strings=given)
