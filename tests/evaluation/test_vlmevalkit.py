"""The adapter for VLMEvalKit, by the protocol of its base class."""

import base64
import csv
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import catp_jax
from tests.evaluation.stand_ins import HAS_VLMEVAL, module
from tests.shallow import ASSETS, shallow

adapter = module("catp_jax.evaluation.vlmevalkit")
CatpJax = adapter.CatpJax
CIRCLE = str(ASSETS / "blue-circle.png")
MESSAGE = [
    {"type": "text", "value": "look:"},
    {"type": "image", "value": CIRCLE},
    {"type": "text", "value": "is there a circle?"},
]
OPTIONS = {"max_new_tokens": 3}
TEMPLATE = (
    "{{ bos_token }}{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
)


def test_a_message_is_asked_images_first():
    model = CatpJax(pretrained=str(shallow("mini-llama-vision")), options=OPTIONS)
    (expected,) = model.evaluated.model.generate(
        [CIRCLE], ["look:\nis there a circle?"], **OPTIONS
    ).text
    assert model.generate(MESSAGE, dataset="POPE") == expected


def test_a_template_has_images_where_the_message_has_them(tmp_path: Path):
    folder = tmp_path / "chat"
    shutil.copytree(shallow("mini-llama-vision"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model = CatpJax(pretrained=str(folder), options=OPTIONS)
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
    """A checkout has it beside the package, the wheel inside."""
    package = tmp_path / "vlmeval"
    package.mkdir()
    for name in ("vlmeval", "vlmeval.vlm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vlmeval = sys.modules["vlmeval"]
    monkeypatch.setattr(vlmeval, "__file__", str(package / "__init__.py"), raising=False)
    monkeypatch.setattr(vlmeval, "vlm", sys.modules["vlmeval.vlm"], raising=False)
    with pytest.raises(SystemExit, match=r"run.py is neither in .*vlmeval nor beside it; "):
        adapter.main()
    script = (package if inside else tmp_path) / "run.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    import pathlib, vlmeval.vlm\n"
        f"    pathlib.Path({str(tmp_path / 'said')!r}).write_text(vlmeval.vlm.CatpJax.__name__)\n"
    )
    adapter.main()
    assert (tmp_path / "said").read_text() == "CatpJax"


@pytest.mark.usefixtures("with_torch")
@pytest.mark.skipif(not HAS_VLMEVAL, reason="VLMEvalKit is not installed")
def test_vlmevalkit_runs_it_from_its_own_command(tmp_path: Path):
    """Its data sets, its loop and its file of predictions, pruned."""
    folder, asked = str(shallow("mini-llama-vision")), ["is there a circle?", "what color is it?"]
    image = base64.b64encode(Path(CIRCLE).read_bytes()).decode()
    rows = [[str(number), image, question, "yes"] for number, question in enumerate(asked)]
    table = map("\t".join, [["index", "image", "question", "answer"], *rows])
    (tmp_path / "shapes.tsv").write_text("\n".join(table) + "\n")
    of_model = {"pretrained": folder, "prune": "uniform", "keep": 8, "options": OPTIONS}
    config = {
        "model": {"mini": {"class": "CatpJax", **of_model}},
        "data": {"shapes": {"class": "CustomVQADataset", "dataset": "shapes"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = "-m catp_jax.evaluation.vlmevalkit --config config.json --mode infer --work-dir out"
    subprocess.run(
        [sys.executable, *words.split()],
        cwd=tmp_path,
        env={**os.environ, "LMUData": str(tmp_path), "PRED_FORMAT": "tsv"},
        check=True,
    )
    (found,) = (tmp_path / "out").rglob("mini_shapes.tsv")
    expected = catp_jax.load(folder).generate(
        [CIRCLE] * 2, asked, prune="uniform", keep=8, **OPTIONS
    )
    with found.open(newline="") as file:
        said = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
    assert said == expected.text


def test_a_batch_size_is_refused():
    with pytest.raises(ValueError, match="one question at a time; leave out batch_size"):
        CatpJax(pretrained="nowhere", batch_size=8)
