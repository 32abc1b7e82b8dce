"""InstructBLIP from a folder, up to transformers: both tokenizers, answers, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InstructBlipProcessor

import catp_jax
import convert
from catp_jax.contract import Site
from catp_jax.pruning import CATP, SelfAttention
from tests.parity.tiny_blip2 import QUERIES
from tests.parity.tiny_instructblip import tiny_hf
from tests.random_instructblip import WORDS, save_processor, save_random

PROMPTS = ["what color is the circle?", "circle?", "what is the square?"]
FREE = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture(scope="module", params=["vicuna", "t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model; its Q-Former numbers the words the other way round."""
    return save_random(request.param, tmp_path_factory.mktemp("random") / request.param)


@pytest.fixture(scope="module")
def model(folder: Path):
    return catp_jax.load(folder)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 12, 3), dtype=np.uint8)) for _ in range(2)]


def test_answers_are_those_of_transformers(folder: Path, model, pictures):
    """One batch of ours, its prompts of different lengths and two of them about one image, against
    one prompt at a time: transformers counts a Q-Former's positions from its left padding on.
    """
    hf = tiny_hf(folder.name)
    processor = InstructBlipProcessor.from_pretrained(folder)
    images = [pictures[0], pictures[0], pictures[1]]
    is_t5, expected = folder.name == "t5", []
    for image, prompt in zip(images, PROMPTS, strict=True):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            out = hf.generate(**inputs, **FREE, do_sample=False, use_cache=not is_t5)
        expected.append(out[0, 1 if is_t5 else inputs["input_ids"].shape[1] :].tolist())
    ours = model.generate(images, PROMPTS, **FREE)
    assert ours.tokens == expected
    assert ours.available == (QUERIES,) * 3
    assert len({*map(tuple, expected)}) > 1


def test_pruned_answers_and_where_the_kept_queries_look(model, pictures):
    packed = model.prepare([pictures[0]] * 3, PROMPTS)
    assert packed.inputs.pixels.shape[0] == 1
    out = model.generate_packed(packed, (SelfAttention(keep=3),), max_new_tokens=2)
    assert out.capacity == 3
    assert out.kept is not None
    maps = [
        model.reader.kept_map(model.network, packed, row, kept) for row, kept in enumerate(out.kept)
    ]
    assert maps[0].shape == (3, 3)
    assert np.ptp(maps[0]) > 0
    assert not np.allclose(maps[0], maps[1])  # the same image, another instruction


def test_sites_and_positions_are_the_language_models(folder: Path, model):
    if folder.name == "vicuna":
        assert model.sites == {Site.ENTRY, Site.LAYER, Site.CACHE, Site.READ}
        assert (model.reader.positions, model.end_tokens, model.pad_token) == (64, (2,), 0)
    else:
        assert model.sites == {Site.ENTRY}
        assert (model.reader.positions, model.end_tokens, model.pad_token) == (None, (1,), 0)


def test_both_tokenizers_go_along_with_a_conversion(folder: Path, tmp_path: Path):
    convert.to_orbax(folder, tmp_path / "converted")
    convert.to_hf(tmp_path / "converted", tmp_path / "again")
    for out in ("converted", "again"):
        for path in (folder / "qformer_tokenizer").iterdir():
            copy = tmp_path / out / "qformer_tokenizer" / path.name
            assert copy.read_bytes() == path.read_bytes()
    assert catp_jax.load(tmp_path / "converted").end_tokens


def test_bad_input_is_refused(model, pictures):
    with pytest.raises(ValueError, match="InstructBLIP takes one image with each prompt, got 2"):
        model.generate([[*pictures]], PROMPTS[:1])
    with pytest.raises(ValueError, match="one image with each prompt, got 0"):
        model.generate([None], PROMPTS[:1])
    with pytest.raises(ValueError, match="28 tokens for the Q-Former; it takes 26"):
        model.generate([pictures[0]], ["circle " * 28])
    with pytest.raises(ValueError, match="leave it out"):
        model.generate([pictures[0]], ["<image> circle"])
    with pytest.raises(ValueError, match="no chat template"):
        model.generate([pictures[0]], [[{"role": "user", "content": "circle"}]])
    with pytest.raises(ValueError, match="keep"):
        model.generate([pictures[0]], PROMPTS[:1], [CATP(keep=QUERIES + 1)])


def test_processors_that_do_not_fit_are_refused(folder: Path, pictures, tmp_path: Path):
    other = shutil.copytree(folder, tmp_path / "other")
    save_processor(other, WORDS, queries=5)
    with pytest.raises(ValueError, match="num_query_tokens: 5, not 7"):
        catp_jax.load(other)
    save_processor(other, [*WORDS[:2], *(f"word{number}" for number in range(60)), "circle"])
    with pytest.raises(ValueError, match="token 62 of the prompt"):
        catp_jax.load(other).generate([pictures[0]], ["circle"])
    shutil.rmtree(other / "qformer_tokenizer")
    with pytest.raises(ValueError, match="qformer_tokenizer: the tokenizer is missing"):
        catp_jax.load(other)
    with pytest.raises(ValueError, match=r"for Llama 3\.2 Vision only"):
        catp_jax.load(folder, mask_mode="hf")


def test_a_processor_of_plain_blip2_is_refused(folder: Path, tmp_path: Path):
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "qformer_tokenizer")
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (path := other / file).is_file():
            text = path.read_text().replace("InstructBlipProcessor", "Blip2Processor")
            path.write_text(json.dumps(json.loads(text)))
    with pytest.raises(ValueError, match="qformer_tokenizer: the tokenizer is missing"):
        catp_jax.load(other)
