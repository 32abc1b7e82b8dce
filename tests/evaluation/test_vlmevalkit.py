"""The adapter for VLMEvalKit, by the protocol of its base class."""

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.stand_ins import module
from tests.shallow import ASSETS, shallow

adapter = module("catp_jax.evaluation.vlmevalkit")
CatpJax = adapter.CatpJax
CIRCLE = str(ASSETS / "blue-circle.png")
MESSAGE = [
    {"type": "text", "value": "look:"},
    {"type": "image", "value": CIRCLE},
    {"type": "text", "value": "is there a circle?"},
]
TEMPLATE = (
    "{{ bos_token }}{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
)


def test_a_message_is_asked_images_first():
    model = CatpJax(pretrained=str(shallow("mini-llama-vision")), options={"max_new_tokens": 3})
    (expected,) = model.evaluated.model.generate(
        [CIRCLE], ["look:\nis there a circle?"], max_new_tokens=3
    ).text
    assert model.generate(MESSAGE, dataset="POPE") == expected


def test_a_template_has_images_where_the_message_has_them(tmp_path: Path):
    folder = tmp_path / "chat"
    shutil.copytree(shallow("mini-llama-vision"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model = CatpJax(pretrained=str(folder), options={"max_new_tokens": 3})
    assert model.evaluated.is_chat
    asked: list[Any] = []
    model.evaluated.answers = lambda some: asked.extend(some) or ["it"]
    assert model.generate(MESSAGE) == "it"
    assert asked[0].prompt == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look:"},
                {"type": "image"},
                {"type": "text", "text": "is there a circle?"},
            ],
        }
    ]
    assert asked[0].images() == [CIRCLE]


def test_several_images_to_a_model_of_one_say_why():
    model = CatpJax(pretrained=str(shallow("mini-blip2-opt")))
    with pytest.warns(UserWarning, match="got no answer"):
        text = model.generate([*MESSAGE, MESSAGE[1]])
    assert text.endswith("takes one image with each prompt, got 2]")


@pytest.mark.parametrize("inside", [False, True])
def test_the_command_is_their_script_with_our_class_among_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
):
    """A checkout has it beside the package, some wheels inside."""
    package = tmp_path / "vlmeval"
    package.mkdir()
    for name in ("vlmeval", "vlmeval.vlm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vlmeval = sys.modules["vlmeval"]
    monkeypatch.setattr(vlmeval, "__file__", str(package / "__init__.py"), raising=False)
    monkeypatch.setattr(vlmeval, "vlm", sys.modules["vlmeval.vlm"], raising=False)
    with pytest.raises(SystemExit, match=r"run.py is not beside .*vlmeval; clone"):
        adapter.main()
    script = (package if inside else tmp_path) / "run.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    import pathlib, vlmeval.vlm\n"
        f"    pathlib.Path({str(tmp_path / 'said')!r}).write_text(vlmeval.vlm.CatpJax.__name__)\n"
    )
    adapter.main()
    assert (tmp_path / "said").read_text() == "CatpJax"


def test_a_batch_size_is_refused():
    with pytest.raises(ValueError, match="one question at a time; leave out batch_size"):
        CatpJax(pretrained="nowhere", batch_size=8)
