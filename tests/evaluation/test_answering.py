"""Options and settings as harnesses say them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import catp_jax
from catp_jax.evaluation.answering import Asked, Evaluated, cut, options_of
from catp_jax.generation.options import Options
from tests.shallow import shallow

ASSETS = Path(catp_jax.__file__).parent / "assets"
GQA: dict[str, Any] = {  # a task's, as lmms-eval has it
    "max_new_tokens": 16,
    "temperature": 0,
    "top_p": 1.0,
    "num_beams": 1,
    "do_sample": False,
}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (GQA, Options(16)),
        ({}, Options(1024)),
        ({"until": "\n"}, Options(1024, stop_strings=("\n",))),
        ({"until": ["\n\n", "", "Q:"]}, Options(1024, stop_strings=("\n\n", "Q:"))),
        ({"temperature": 0.7, "max_new_tokens": 5}, Options(5, temperature=0.7)),
        ({"temperature": 0.7, "do_sample": False}, Options(1024)),
        ({"do_sample": True, "top_p": 0.9}, Options(1024, temperature=1.0, top_p=0.9)),
        ({"do_sample": True, "temperature": 0, "top_k": 5}, Options(1024)),
        ({"do_sample": True, "top_k": 5, "top_p": None}, Options(1024, temperature=1.0, top_k=5)),
        ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True}, Options(1024)),
        (
            {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
            Options(1024, num_beams=3, length_penalty=2.0, early_stopping="first"),
        ),
        ({"num_beams": 3, "early_stopping": False}, Options(1024, num_beams=3)),
        ({"repetition_penalty": 1.2}, Options(1024, repetition_penalty=1.2)),
    ],
)
def test_options_of_transformers_are_ours(given: dict[str, Any], options: Options):
    assert options_of(given) == options


def test_an_option_that_is_none_here_is_named():
    with pytest.warns(UserWarning, match="no option of generation here: image_aspect_ratio"):
        assert options_of({"image_aspect_ratio": "pad", **GQA}) == Options(16)


def test_an_option_out_of_range_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens is at least 1, got 0"):
        options_of({"max_new_tokens": 0})


@pytest.mark.parametrize(
    ("text", "strings", "left"),
    [("a b", (), "a b"), ("a\nb.c", (".", "\n"), "a"), ("ab", ("ab",), ""), ("ab", ("c",), "ab")],
)
def test_a_text_is_cut_at_the_first_string(text: str, strings: tuple[str, ...], left: str):
    assert cut(text, strings) == left


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prunes": "l2"}, "prunes: no setting of a model; there are pretrained, prune, keep,"),
        ({"batch_size": "auto"}, "batch_size is a number of at least 1, got 'auto'"),
        ({"batch_size": 0}, "batch_size is a number of at least 1, got 0"),
        ({"prune": "l3", "keep": 8}, "l3"),
        ({"prune": "l2"}, "got 1 methods and 0 budgets"),
        ({"prune": "l2", "keep": 0.5}, "got '0.5'"),
        ({"prompt": 5}, "a prompt must have {question} where the question goes, got 5"),
        ({"prompt": "Question:"}, "a prompt must have {question} where the question goes"),
    ],
)
def test_settings_that_are_none_are_refused_before_anything_is_loaded(settings: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Evaluated("nowhere", **settings)


def test_a_folder_that_is_none_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        Evaluated("nowhere")


def test_a_question_goes_into_the_prompt_where_there_is_no_chat():
    asked = "what shape is present?"
    worded = "Question: {question} Short answer:"
    alike = []
    for settings, text in (
        ({"prompt": worded}, asked),
        ({}, worded.format(question=asked)),
        ({}, asked),
    ):
        model = Evaluated(str(ASSETS / "mini-blip2-opt"), **settings)
        one = Asked(text, lambda: [ASSETS / "blue-circle.png"], {"max_new_tokens": 3})
        (likelihood,) = model.likelihoods([(one, " circle")])
        assert likelihood is not None
        alike.append((model.answers([one]), likelihood.total))
    assert alike[0] == alike[1]
    assert alike[0][1] != alike[2][1]


def test_a_prompt_beside_a_chat_template_is_refused(tmp_path: Path):
    worded = "Q: {question}"
    with pytest.raises(ValueError, match="leave out prompt or chat"):
        Evaluated("nowhere", prompt=worded, is_chat=True)  # before anything is loaded
    folder = tmp_path / "chatting"
    shutil.copytree(shallow("mini-llama-vision"), folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"has a chat template, .* or say chat=false"):
        Evaluated(str(folder), prompt=worded)
    assert not Evaluated(str(folder), prompt=worded, is_chat=False).is_chat
