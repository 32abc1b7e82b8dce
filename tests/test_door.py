"""The front door refuses what it cannot use, before weights are read where that can be."""

import inspect
from typing import Any

import pytest

import catp_jax
from catp_jax.readers import hub
from tests.command import catp_jax as command
from tests.shallow import ASSETS, shallow

LLAMA, OPT = shallow("mini-llama-vision"), shallow("mini-blip2-opt")
CIRCLE, ASKED = ASSETS / "blue-circle.png", "what?"

# as a user calls them, without our checks of types
load: Any = inspect.unwrap(catp_jax.load)
find_folder: Any = inspect.unwrap(hub.find_folder)


@pytest.fixture(scope="module")
def model():
    return catp_jax.load(OPT)


@pytest.mark.parametrize(
    "folder",
    [None, 5, b"a", ["a"], "a" * 5000, "a\0b", "~/" + "a" * 5000],
    ids=["none", "number", "bytes", "list", "long", "zero byte", "long at home"],
)
def test_what_is_no_folder_is_refused(folder: Any):
    with pytest.raises(ValueError, match=r"is not a folder|a model is a folder or a name"):
        find_folder(folder)


@pytest.mark.parametrize("name", ["mask_mode", "vision_mode"])
@pytest.mark.parametrize("value", ["x", "", 5, [], "Meta"])
def test_modes_that_are_none_are_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} is (meta or hf|hf or meta), got "):
        load(LLAMA, **{name: value})


@pytest.mark.parametrize("call", ["generate", "generate_packed", "begin", "stream"])
def test_an_option_that_is_none_is_refused_with_those_there_are(model: Any, call: str):
    asked = (CIRCLE, ASKED) if call == "stream" else ([CIRCLE], [ASKED])
    given = (model.prepare(*asked),) if call in ("generate_packed", "begin") else asked
    with pytest.raises(ValueError, match="foo: no option of generation; there are max_new_tokens"):
        getattr(model, call)(*given, foo=1)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("bad_words", ["\ud800"]),
        ("bad_words", ["red", "a\udfff"]),
        ("stop_strings", ["\ud800"]),
        ("stop_strings", "a\ud800"),
    ],
    ids=["a word", "the second word", "an end", "the only end"],
)
def test_half_a_character_is_refused_in_what_must_not_be_written(model: Any, name: str, texts: Any):
    with pytest.raises(ValueError, match=f"one of {name} holds half a character"):
        model.generate([CIRCLE], [ASKED], **{name: texts})


@pytest.mark.parametrize("option", ["--bad-word", "--stop"])
def test_half_a_character_is_refused_by_the_command(option: str):
    done = command("generate", OPT, "--image", CIRCLE, "--prompt", ASKED, option, "a\udcff")
    assert done.returncode == 1
    assert "half a character" in done.stderr
