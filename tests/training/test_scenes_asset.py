"""The minis for scenes that ship with the package."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import catp_jax
import convert
from catp_jax.training import scenes_blip2, scenes_llama_vision
from catp_jax.training.scene_questions import questions_of, scenes_task
from tests.training import test_asset, test_blip2_assets

ASSETS = Path(catp_jax.__file__).parent / "assets"
WANTED = {
    "llama-vision": {"attribute": 0.98, "existence": 0.93, "count": 0.85, "relation": 0.85},
    "llama-vision-guide": {"attribute": 0.95, "existence": 0.9},
    "blip2-opt": {
        "attribute": 0.95,
        "existence": 0.95,
        "count": 0.85,
        "relation": 0.95,
        "reading": 0.9,
    },
    "blip2-t5": {
        "attribute": 0.95,
        "existence": 0.95,
        "count": 0.84,
        "relation": 0.95,
        "reading": 0.9,
    },
}


def test_all_that_ship_are_tested():
    found = sorted(path.name for path in ASSETS.glob("scenes-*"))
    assert found == sorted(f"scenes-{kind}" for kind in WANTED)


@pytest.fixture(scope="module", params=WANTED)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind):
    return ASSETS / f"scenes-{kind}"


@pytest.fixture(scope="module")
def last(folder):
    return json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])


def test_it_is_small_and_what_the_command_trains(folder, kind):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    family, _, language = kind.partition("-")
    if family == "llama":
        size = "guide" if kind.endswith("guide") else "mini"
        wanted = scenes_llama_vision.SIZES[size].config
    else:
        wanted = scenes_blip2.scenes_config(language)
    assert convert.load(folder)[1] == wanted


def test_it_answered_the_test_scenes(last, kind):
    assert last["scenes"] == 400
    enough = {family: last[family] >= least for family, least in WANTED[kind].items()}
    assert enough == dict.fromkeys(WANTED[kind], True)
    assert last["minutes of training"] < 60


def test_it_answers_as_well_as_its_log_says(folder, last):
    """Of 24 scenes; a share of 120 questions has a standard error of 3 points at most."""
    task = scenes_task(scenes=24)
    model = catp_jax.load(folder, generation_config=False)
    asked = [(one.image, one.question) for one in task.examples]
    texts = model.generate(*map(list, zip(*asked, strict=True)), max_new_tokens=4).text
    right = [text.strip() == one.answer for text, one in zip(texts, task.examples, strict=True)]
    told = [last[one.family] for one in task.examples]
    assert np.mean(right) == pytest.approx(np.mean(told), abs=0.09)


def test_its_readme_says_what_the_log_says(folder, last):
    readme = (folder / "README.md").read_text()
    rows = [line.split("|")[1:3] for line in readme.splitlines() if line.endswith("% |")]
    assert len(rows) == len(last.keys() - {"stage", "scenes", "minutes of training"})
    for name, share in rows:
        told = float(share.strip(" %"))
        assert told == pytest.approx(100 * last[name.strip(" …")], abs=0.051)
    assert f"{last['minutes of training']:.0f} minutes" in readme


def test_transformers_loads_it_and_gets_the_same_logits_and_answers(folder, kind):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    network = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(folder)
    is_llama = kind.startswith("llama")
    mark = "<|image|>" if is_llama else ""
    scenes = questions_of("test", 2)
    images = [Image.fromarray(scene.pixels) for scene, asked in scenes for _ in asked]
    questions = [one.question for _, asked in scenes for one in asked]
    prompts = [f"{mark}{question}" for question in questions]
    found = processor(
        images=[[image] for image in images], text=prompts, padding=True, return_tensors="np"
    )
    decoder = {}
    if kind == "blip2-t5":
        decoder = {"decoder_input_ids": np.array([[0, 300 + n] for n in range(len(images))])}
    with torch.no_grad():
        given = {name: torch.tensor(value) for name, value in {**found, **decoder}.items()}
        wanted = network(**given).logits.numpy()
    rows = found["attention_mask"].astype(bool)
    model = convert.load(folder)[0]
    if is_llama:
        got = model(test_asset.inputs_from(found))
    else:
        begun = [jnp.asarray(tokens, jnp.int32) for tokens in decoder.values()]
        got = model(test_blip2_assets.inputs_from(found), None, *begun)
        rows = np.ones(wanted.shape[:2], bool) if decoder else rows
    assert np.abs(np.asarray(got) - wanted)[rows].max() <= 1e-4 * np.abs(wanted[rows]).max()

    texts = []
    for image, prompt in zip(images, prompts, strict=True):
        alone = processor(images=[image], text=[prompt], return_tensors="pt")
        said = network.generate(**alone, max_new_tokens=4, do_sample=False)[0]
        new = said if kind == "blip2-t5" else said[alone["input_ids"].shape[1] :]
        texts.append(processor.decode(new, skip_special_tokens=True).strip())
    loaded = catp_jax.load(folder, generation_config=False)
    mine = loaded.generate(images, questions, max_new_tokens=4)
    assert [text.strip() for text in mine.text] == texts
