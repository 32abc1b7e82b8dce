"""The mini Llama Vision for scenes that ships with the package."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import catp_jax
import convert
from catp_jax.training.scene_questions import questions_of
from catp_jax.training.scenes_llama_vision import scenes_config
from tests.training.test_asset import inputs_from

FOLDER = Path(catp_jax.__file__).parent / "assets" / "scenes-llama-vision"
WANTED = {"attribute": 0.98, "existence": 0.93, "count": 0.85, "relation": 0.85}


@pytest.fixture(scope="module")
def last():
    return json.loads((FOLDER / "training_log.jsonl").read_text().splitlines()[-1])


def test_it_is_small_and_what_the_command_trains():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000
    assert convert.load(FOLDER)[1] == scenes_config()


def test_it_answered_the_test_scenes(last):
    assert last["scenes"] == 400
    assert {family: last[family] >= least for family, least in WANTED.items()} == dict.fromkeys(
        WANTED, True
    )
    assert last["minutes of training"] < 60


def test_its_readme_says_what_the_log_says(last):
    readme = (FOLDER / "README.md").read_text()
    rows = [line.split("|")[1:3] for line in readme.splitlines() if line.endswith("% |")]
    assert len(rows) == len(last.keys() - {"stage", "scenes", "minutes of training"})
    for name, share in rows:
        told = float(share.strip(" %"))
        assert told == pytest.approx(100 * last[name.strip(" …")], abs=0.051)
    assert f"{last['minutes of training']:.0f} minutes" in readme


def test_transformers_loads_it_and_gets_the_same_logits_and_answers():
    import torch
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    network = MllamaForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(FOLDER)
    scenes = questions_of("test", 2)
    images = [[Image.fromarray(scene.pixels)] for scene, asked in scenes for _ in asked]
    prompts = [f"<|image|>{one.question}" for _, asked in scenes for one in asked]
    found = processor(images=images, text=prompts, padding=True, return_tensors="np")
    with torch.no_grad():
        wanted = network(**{name: torch.tensor(value) for name, value in found.items()}).logits
    wanted, valid = wanted.numpy(), found["attention_mask"].astype(bool)
    got = np.asarray(convert.load(FOLDER)[0](inputs_from(found)))
    assert np.abs(got - wanted)[valid].max() <= 1e-4 * np.abs(wanted[valid]).max()

    said = [
        network.generate(
            **processor(images=image, text=[prompt], return_tensors="pt"),
            max_new_tokens=4,
            do_sample=False,
        )
        for image, prompt in zip(images, prompts, strict=True)
    ]
    texts = [
        processor.decode(row[0], skip_special_tokens=True).removeprefix(prompt[9:]).strip()
        for row, prompt in zip(said, prompts, strict=True)
    ]
    loaded = catp_jax.load(FOLDER, generation_config=False)
    mine = loaded.generate(
        [image[0] for image in images], [prompt[9:] for prompt in prompts], max_new_tokens=4
    )
    assert [text.strip() for text in mine.text] == texts
