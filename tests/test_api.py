"""`catp_jax.load` and `generate` on the shipped mini checkpoint, up to transformers end to end."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import catp_jax
from catp_jax.generation import generate as programs
from catp_jax.pruning import FastV, KNorm, Random, TrimmedLlama
from catp_jax.readers.mllama_packing import locate
from catp_jax.study.tasks import easy_vqa
from tests.shallow import shallow

ROOT = Path(__file__).resolve().parents[1]
MINI = shallow("mini-llama-vision")
CIRCLE = ROOT / "catp_jax" / "assets" / "blue-circle.png"
COLOR, SHAPE = "what color is the shape?", "what shape is present?"


@pytest.fixture(scope="module")
def model():
    return catp_jax.load(MINI)


@pytest.fixture(scope="module")
def pictures():
    """Images of 4, 1 and 2 tiles."""
    circle = Image.open(CIRCLE).convert("RGB")
    return [circle, circle.crop((0, 0, 32, 32)), circle.crop((0, 16, 64, 48))]


@pytest.fixture(scope="module")
def mixed(pictures):
    """One batch with everything: sizes, several images, text before the image, no image."""
    four, one, two = pictures
    images = [four, [one, four], None, two, [two, one, four]]
    prompts = [
        COLOR,
        f"<|image|>first, <|image|>{SHAPE}",
        "hello",
        f"look: <|image|>{COLOR}",
        f"<|image|><|image|>two <|image|>{SHAPE}",
    ]
    return images, prompts


def test_answers_come_with_their_tokens_and_the_number_of_visual_tokens(model, mixed):
    out = model.generate(*mixed, max_new_tokens=6)
    assert out.text[0] == "blue"
    assert out.available == (260, 325, 0, 130, 455)
    assert out.kept is None
    assert out.capacity == 8 * 65  # seven tiles at most, in a bucket of eight
    assert all(1 <= len(tokens) <= 6 for tokens in out.tokens)
    assert out.logits.shape == (5, model.config.text.vocab_size)


@pytest.mark.parametrize("pruners", [[], [TrimmedLlama(keep=20)]], ids=["unpruned", "pruned"])
def test_each_prompt_is_answered_as_if_it_were_alone(model, mixed, pruners):
    together = model.generate(*mixed, pruners, max_new_tokens=6)
    scale = np.abs(together.logits).max()
    for row, (image, prompt) in enumerate(zip(*mixed, strict=True)):
        alone = model.generate([image], [prompt], pruners, max_new_tokens=6)
        assert alone.text == together.text[row : row + 1]
        assert np.abs(alone.logits[0] - together.logits[row]).max() <= 1e-5 * scale
        if alone.kept is not None and image is not None:
            np.testing.assert_array_equal(alone.kept[0].number, together.kept[row].number)


def test_images_that_were_encoded_before_are_answered_about_alike(model, mixed):
    packed = model.prepare(*mixed)
    encoded = model.encode(packed)
    for pruner in (TrimmedLlama(keep=20), TrimmedLlama(keep=None, k_ratio=0.05)):
        whole, halves = (
            model.generate_packed(some, [pruner], max_new_tokens=6) for some in (packed, encoded)
        )
        assert halves.tokens == whole.tokens
        for one, other in zip(halves.kept, whole.kept, strict=True):
            np.testing.assert_array_equal(one.number, other.number)


def test_kept_places_are_real_and_in_order(model, mixed):
    out = model.generate(*mixed, [Random(keep=40)], max_new_tokens=1)
    tiles = model.prepare(*mixed).tiles
    for kept, own, available in zip(out.kept, tiles, out.available, strict=True):
        assert len(kept.number) == min(40, available)
        assert (np.diff(kept.number) > 0).all()
        assert set(zip(kept.image, kept.tile, strict=True)) <= set(own)
        again = locate(kept.number, own, model.config)
        np.testing.assert_array_equal(again.row * 8 + again.column, kept.row * 8 + kept.column)


def test_an_image_may_be_a_path_a_picture_or_an_array(model):
    picture = Image.open(CIRCLE).convert("RGB")
    kinds = [CIRCLE, str(CIRCLE), picture, np.asarray(picture), np.asarray(picture) / 255]
    out = model.generate(kinds, [COLOR] * 5, max_new_tokens=4)
    assert out.text == ["blue"] * 5
    np.testing.assert_allclose(out.logits, out.logits[:1].repeat(5, 0), atol=1e-5)


def test_images_that_are_made_as_they_are_asked_for_are_not_mixed_up(model):
    class Column(Sequence):
        """Like a dataset's column: every access decodes anew, and nobody keeps the picture."""

        colors = ("red", "blue", "black", "yellow") * 5

        def __len__(self):
            return len(self.colors)

        def __getitem__(self, index):
            return Image.new("RGB", (64, 64), self.colors[index])

    packed = model.prepare(Column(), [COLOR] * 20)
    images = packed.inputs.images
    assert images.pixels.shape[0] == 24  # 20, in a bucket
    own = np.asarray(images.pixels)[np.asarray(images.tile_index[:, 0]) // 4]
    for row, color in enumerate(Column.colors):
        expected = model.reader.process_image(Image.new("RGB", (64, 64), color)).pixels
        np.testing.assert_array_equal(own[row], expected)


def test_a_prepared_batch_is_put_on_the_device_once_for_all_calls(model):
    packed = model.prepare([CIRCLE], [COLOR])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(packed.inputs))


def test_an_image_that_comes_again_is_encoded_once(model):
    packed = model.prepare([CIRCLE] * 4, [COLOR, SHAPE, COLOR, SHAPE])
    assert packed.inputs.images.pixels.shape[0] == 1
    assert packed.inputs.images.tile_index.shape == (4, 4)


def test_a_budget_left_to_the_data_equals_the_same_budget_given(model):
    images, prompts = [CIRCLE] * 2, [COLOR, "is there a red shape?"]
    free = model.generate(images, prompts, [TrimmedLlama(keep=None, k_ratio=0.05)])
    (report,) = free.reports
    assert report.overflow.tolist() == [0, 0]
    assert [len(kept.number) for kept in free.kept] == report.union.tolist()
    assert max(report.union) <= free.capacity < 260
    given = model.generate(images, prompts, [TrimmedLlama(keep=free.capacity, k_ratio=0.05)])
    assert given.text == free.text
    for a, b in zip(free.kept, given.kept, strict=True):
        np.testing.assert_array_equal(a.number, b.number)


def test_a_steady_stream_compiles_nothing_new(model, pictures):
    four, one, _ = pictures
    pruners = [FastV(keep=30)]
    options = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9}
    model.generate([four, one], [COLOR, SHAPE], pruners, **options)
    before = programs.generate._cache_size()
    model.generate([one, four], ["is there a circle?", COLOR], pruners, **options, seed=5)
    model.generate(
        [four, four.copy()], ["hm", SHAPE], pruners, **options | {"temperature": 1.3, "top_p": 0.5}
    )
    assert programs.generate._cache_size() == before
    model.generate([four, one], [COLOR, SHAPE], [FastV(keep=31)], **options)
    assert programs.generate._cache_size() == before + 1


def test_full_budgets_change_nothing(model, mixed):
    plain = model.generate(*mixed, max_new_tokens=6)
    most = 3 * 260
    # one after another: what a method took, none of the others could bring back
    every = [method(keep=most) for method in (TrimmedLlama, FastV, KNorm, Random)]
    out = model.generate(*mixed, every, max_new_tokens=6)
    assert out.text == plain.text
    np.testing.assert_allclose(out.logits, plain.logits, atol=1e-5 * np.abs(plain.logits).max())
    assert [len(kept.number) for kept in out.kept] == list(plain.available)


@pytest.mark.parametrize(
    ("images", "prompts", "said"),
    [
        ([], [], "at least one prompt"),
        ([None], ["a", "b"], "one entry of images per prompt"),
        ([CIRCLE], [f"<|image|><|image|>{COLOR}"], "2 <|image|> marks and 1 images"),
        ([None], ["<|image|>?"], "1 <|image|> marks and 0 images"),
        ([CIRCLE, ROOT / "no.png"], [COLOR, COLOR], "prompt 1: image"),
        ([CIRCLE], [[{"role": "user", "content": "hi"}]], "no chat template"),
        ([CIRCLE], [COLOR * 200], "positions"),
    ],
)
def test_what_cannot_be_used_is_refused(model, images, prompts, said):
    with pytest.raises(ValueError, match=said.replace("|", r"\|")):
        model.generate(images, prompts)


def test_lists_are_wanted(model):
    with pytest.raises(ValueError, match="are lists"):
        model.generate([CIRCLE], COLOR)
    with pytest.raises(ValueError, match="are lists"):
        model.generate(str(CIRCLE), [COLOR])


@pytest.mark.parametrize("keep", [0, -1])
def test_a_budget_out_of_range_is_refused(model, keep):
    with pytest.raises(ValueError, match="keep"):
        model.generate([CIRCLE], [COLOR], [KNorm(keep=keep)])


def test_a_prompt_with_fewer_visual_tokens_than_the_budget_keeps_them_all(model):
    for pruning in ({"pruners": [KNorm(keep=261)]}, {"prune": "k_norm", "keep": 261}):
        out = model.generate([CIRCLE], [COLOR], max_new_tokens=3, **pruning)
        assert out.kept[0].number.tolist() == list(range(260))


def test_a_processor_that_does_not_fit_the_model_is_refused(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(MINI, folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.get("image_processor", settings)["size"] = {"height": 48, "width": 48}
            (folder / name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="tile height: 48, not 32"):
        catp_jax.load(folder)


def test_the_weights_may_be_cast(model):
    narrow = catp_jax.load(MINI, dtype="bfloat16")
    assert str(narrow.dtype) == "bfloat16"
    out = narrow.generate([CIRCLE], [COLOR], [TrimmedLlama(keep=64)], max_new_tokens=4)
    assert out.text == ["blue"]


def test_tokens_and_text_are_those_of_transformers(model):
    """The whole way, from files to text; they pad the batch on the left, we on the right."""
    import torch
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    examples = list(easy_vqa("test"))[::800]
    theirs = MllamaForConditionalGeneration.from_pretrained(MINI).eval()
    processor = AutoProcessor.from_pretrained(MINI, padding_side="left")
    inputs = processor(
        images=[[Image.open(e.image).convert("RGB")] for e in examples],
        text=[f"<|image|>{e.question}" for e in examples],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        tokens = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :].tolist()

    images, prompts = [e.image for e in examples], [e.question for e in examples]
    model = catp_jax.load(MINI, mask_mode="hf")
    out = model.generate(images, prompts, max_new_tokens=6)
    for ours, other in zip(out.tokens, new, strict=True):
        assert ours == other[: len(ours)]
    assert out.text == [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


def test_the_towers_mode_is_the_checkpoints_unless_one_is_asked_for():
    own, hf, meta = (
        catp_jax.load(MINI, vision_mode=mode).generate([CIRCLE], ["what?"], max_new_tokens=1).logits
        for mode in (None, "hf", "meta")
    )
    np.testing.assert_array_equal(own, hf)  # its config.json says hf
    assert np.abs(own - meta).max() > 1e-3


def test_nothing_is_printed_as_a_model_loads():
    """Of PyTorch neither, which is not there."""
    code = f"import catp_jax; catp_jax.load({str(shallow('mini-blip2-opt'))!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
