"""Answers in pieces: the same text as at once, with and without pruning."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import catp_jax
from catp_jax.generation import generate as programs
from catp_jax.pruning import TrimmedLlama
from catp_jax.readers.token_text import pieces
from catp_jax.struct import replace
from tests.shallow import ASSETS, shallow

CIRCLE, PROMPT, NEW = ASSETS / "blue-circle.png", "what color is the shape?", 8
FREE: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW - 1}


@pytest.fixture(scope="module")
def llama():
    return catp_jax.load(shallow("mini-llama-vision"))


@pytest.fixture(scope="module")
def opt():
    return catp_jax.load(shallow("mini-blip2-opt"))


ASKED: list[dict[str, Any]] = [
    FREE,
    {"max_new_tokens": NEW},
    {**FREE, "temperature": 1.5, "top_k": 30, "seed": 4},
    {**FREE, "no_repeat_ngram_size": 1, "prune": "fastv", "keep": "50%"},
]


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("asked", ASKED, ids=["free", "short", "drawn", "pruned"])
def test_pieces_are_the_answer(name: str, asked: dict[str, Any], request: pytest.FixtureRequest):
    model = request.getfixturevalue(name)
    found = [*model.stream(CIRCLE, PROMPT, **asked)]
    assert "".join(found) == model.generate([CIRCLE], [PROMPT], **asked).text[0]
    assert all(found)
    if asked is FREE:
        assert len(found) > 2


def test_a_method_that_finds_its_own_number_streams(llama: Any):
    pruners = [TrimmedLlama(keep=None, k_ratio=0.05)]
    found = "".join(llama.stream(CIRCLE, PROMPT, pruners, **FREE))
    assert found == llama.generate([CIRCLE], [PROMPT], pruners, **FREE).text[0]


def test_a_piece_is_there_before_the_next_token_is(opt: Any, monkeypatch: pytest.MonkeyPatch):
    steps = []
    following = programs.following

    def counted(*arguments: Any) -> Any:
        steps.append(1)
        return following(*arguments)

    monkeypatch.setattr(programs, "following", counted)
    stream = opt.stream(CIRCLE, PROMPT, **FREE)
    assert not steps
    next(stream)
    before = len(steps)
    assert before < NEW - 1
    next(stream)
    assert len(steps) > before


def test_a_second_stream_compiles_nothing(opt: Any):
    [*opt.stream(CIRCLE, PROMPT, **FREE)]
    compiled = [f._cache_size() for f in (programs.prefill, programs.first, programs.following)]
    [*opt.stream(CIRCLE, "is there a circle?", **FREE)]
    again = [f._cache_size() for f in (programs.prefill, programs.first, programs.following)]
    assert again == compiled


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"num_beams": 2}, "one answer, drawn or greedy"),
        ({"num_return_sequences": 2, "temperature": 1.0}, "one answer, drawn or greedy"),
        ({"logprobs": 2}, "a stream is text alone"),
        ({"prune": "l2"}, "got 1 methods and 0 budgets"),
        ({"max_new_tokens": 10_000}, "do not fit"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_the_first_piece(opt: Any, asked: Any, says: str):
    with pytest.raises(ValueError, match=says):
        opt.stream(CIRCLE, PROMPT, **asked)


def test_logits_that_are_not_finite_end_a_stream(opt: Any):
    packed = opt.prepare([CIRCLE], [PROMPT])
    inputs = replace(packed.inputs, pixels=np.asarray(packed.inputs.pixels) * np.nan)
    asked = opt._asked(packed, (), [], opt._options(FREE))
    packed = type(packed)(**{**vars(packed), "inputs": inputs})
    with pytest.raises(ValueError, match="logits are not finite"):
        next(opt._tokens(packed, *asked))


TEXTS = [
    "a plain answer, in words.",
    "naïve café 😀 été",
    " leading and trailing  ",
    "line\nbreak\n\n and   spaces",
    "it isn't , is it ? we 've done 's . no n't",
    "",
    "�",
]


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("name", ["mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision"])
def test_text_of_any_kind_comes_in_pieces(name: str, cleans: bool):
    tokenizer: Any = AutoTokenizer.from_pretrained(
        ASSETS / name, clean_up_tokenization_spaces=cleans
    )
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"]
        found = [*pieces(tokenizer, tokens)]
        assert "".join(found) == tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert all(found)
        if text != "�":
            assert "�" not in "".join(found)
    assert len([*pieces(tokenizer, tokenizer(TEXTS[0])["input_ids"])]) > 5
