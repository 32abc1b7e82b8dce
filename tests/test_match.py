"""Image-text matching from a folder, up to transformers: `load_matcher` and `catp-jax match`."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Blip2ForImageTextRetrieval, Blip2Processor, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import catp_jax
from tests.command import catp_jax as command
from tests.convert.test_adapter import adapted
from tests.parity.tiny_blip2 import tiny_hf

WORDS = ["<pad>", "<unk>", "a", "red", "blue", "green", "circle", "square", "and", "of", "two"]
TEXTS = ["a red circle", "two blue", "a green square and a blue circle"]
ASSETS = Path(catp_jax.__file__).parent / "assets"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (side, 20, 3), dtype=np.uint8)) for side in (12, 31)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random matching model with a processor of words."""
    path = tmp_path_factory.mktemp("matcher")
    tiny_hf("retrieval").save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )
    Blip2Processor(BlipImageProcessorPil(size={"height": 12, "width": 12}), fast).save_pretrained(
        path
    )
    return path


@pytest.fixture(scope="module")
def expected(folder: Path, pictures) -> tuple[np.ndarray, np.ndarray]:
    return scores_of(Blip2ForImageTextRetrieval.from_pretrained(folder).eval(), folder, pictures)


def scores_of(
    hf: torch.nn.Module, folder: Path, pictures: list[Image.Image]
) -> tuple[np.ndarray, np.ndarray]:
    """transformers' ITC of all with all, and ITM probabilities of all pairs, one at a time."""
    processor = Blip2Processor.from_pretrained(folder)
    itc, itm = np.zeros((2, 3)), np.zeros((2, 3))
    for i, picture in enumerate(pictures):
        for t, text in enumerate(TEXTS):
            inputs = processor(images=picture, text=text, return_tensors="pt")
            with torch.no_grad():
                itc[i, t] = hf(**inputs).logits_per_image
                matched = hf(**inputs, use_image_text_matching_head=True).logits_per_image
            itm[i, t] = torch.softmax(matched, dim=1)[0, 1]
    return itc, itm


def test_scores_are_those_of_transformers_however_texts_are_batched(folder, pictures, expected):
    matcher = catp_jax.load_matcher(folder)
    itc, itm = expected
    np.testing.assert_allclose(matcher.itc(pictures, TEXTS), itc, atol=1e-5)
    pairs = [(i, t) for i in range(2) for t in range(3)]
    scores = matcher.itm([pictures[i] for i, _ in pairs], [TEXTS[t] for _, t in pairs])
    np.testing.assert_allclose(scores, [itm[pair] for pair in pairs], atol=1e-5)
    assert np.ptp(itc) > 1e-3
    assert np.ptp(itm) > 1e-3


def test_many_pairs_are_matched_in_one_shape_and_each_image_read_once(
    folder, pictures, expected, monkeypatch
):
    matcher = catp_jax.load_matcher(folder)
    read = []
    process = type(matcher.reader).read_image
    monkeypatch.setattr(
        type(matcher.reader), "read_image", lambda self, x: read.append(x) or process(self, x)
    )
    pairs = [(n % 2, n % 3) for n in range(41)]
    scores = matcher.itm([pictures[i] for i, _ in pairs], [TEXTS[t] for _, t in pairs])
    np.testing.assert_allclose(scores, [expected[1][pair] for pair in pairs], atol=1e-5)
    assert len(read) == 2


def test_the_command_prints_every_image_with_every_text(folder, pictures, expected, tmp_path):
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    words = [w for path in paths for w in ("--image", str(path))]
    words += [w for text in TEXTS for w in ("--text", text)]
    run = subprocess.run(
        [sys.executable, "-m", "catp_jax", "match", str(folder), *words, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(row["image"], row["text"]) for row in rows] == [
        (str(path), text) for path in paths for text in TEXTS
    ]
    np.testing.assert_allclose([row["itc"] for row in rows], expected[0].ravel(), atol=1e-5)
    np.testing.assert_allclose([row["itm"] for row in rows], expected[1].ravel(), atol=1e-5)


def test_one_image_goes_with_all_texts_and_one_text_with_all_images(folder, pictures, expected):
    png = io.BytesIO()
    pictures[1].save(png, "png")
    matcher = catp_jax.load_matcher(folder, fetch=lambda address: png.getvalue())
    scores = matcher.itm(["https://example.org/a.png"], TEXTS)
    np.testing.assert_allclose(scores, expected[1][1], atol=1e-5)
    np.testing.assert_allclose(matcher.itm(pictures, TEXTS[2:]), expected[1][:, 2], atol=1e-5)
    many = matcher.itm(pictures[:1], TEXTS * 12)  # 36 pairs, in two calls
    np.testing.assert_allclose(many, np.tile(expected[1][0], 12), atol=1e-5)


def test_an_adapter_is_merged_and_a_key_passed_over(folder, pictures, expected, tmp_path):
    before = expected
    model = adapted(tiny_hf("retrieval"), target_modules=["query", "qkv", "vision_projection"])
    model.save_pretrained(tmp_path / "adapter")
    expected = scores_of(model, folder, pictures[:1])
    odd = shutil.copytree(folder, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"sparkle": 1}))
    pictures[0].save(tmp_path / "a.png")
    words = ["--image", tmp_path / "a.png", "--text", TEXTS[0], "--json"]
    which = [odd, "--ignore-config", "sparkle", "--adapter", tmp_path / "adapter"]
    got = json.loads(command("match", *which, *words).stdout)
    for score, wanted, plain in zip(("itc", "itm"), expected, before, strict=True):
        np.testing.assert_allclose(got[score], wanted[0, 0], atol=1e-5)
        assert abs(got[score] - plain[0, 0]) > 1e-4


def test_a_matcher_without_its_tokenizer_is_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer is missing \(tokenizer.json"):
        catp_jax.load_matcher(other)
    matcher = catp_jax.load_matcher(other, processor=folder)
    assert len(matcher.itc([np.zeros((4, 4), np.uint8)], TEXTS)[0]) == 3


def test_bad_input_is_refused(folder, pictures, tmp_path):
    matcher = catp_jax.load_matcher(folder)
    with pytest.raises(ValueError, match=r"give one text per image.* got 3 texts for 2"):
        matcher.itm(pictures, TEXTS)
    with pytest.raises(ValueError, match="a list of at least one image"):
        matcher.itm(pictures[0], TEXTS)
    with pytest.raises(ValueError, match="a text is empty"):
        matcher.itc(pictures, ["  "])
    with pytest.raises(ValueError, match="lone surrogate"):
        matcher.itc(pictures, ["a \ud800"])
    with pytest.raises(ValueError, match="a list of at least one text"):
        matcher.itc(pictures, "a red circle")
    with pytest.raises(ValueError, match="at least one image"):
        matcher.itc([], TEXTS)
    with pytest.raises(ValueError, match="the model takes 26 at most"):
        matcher.itc(pictures, ["a " * 40])
    config = matcher.reader.config
    small = replace(config, qformer=replace(config.qformer, vocab_size=8))
    with pytest.raises(ValueError, match=r"token 10 of the prompt, .* embeddings for 8"):
        replace(matcher.reader, config=small).read_text("two")
    with pytest.raises(ValueError, match="is a web address"):
        matcher.itc(["https://example.org/a.png"], TEXTS)
    with pytest.raises(ValueError, match="load_matcher"):
        catp_jax.load(folder)
    with pytest.raises(ValueError, match="generates text; load it with load"):
        catp_jax.load_matcher(ASSETS / "mini-llama-vision")
    other = shutil.copytree(folder, tmp_path / "other")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := other / name).is_file():
            settings = json.loads(path.read_text())
            settings.get("image_processor", settings)["size"] = {"height": 24, "width": 24}
            path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="image height: 24, not 12"):
        catp_jax.load_matcher(other)
