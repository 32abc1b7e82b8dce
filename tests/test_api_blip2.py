"""BLIP-2 from the shipped folders: answers, pruning, errors, up to transformers end to end.

What is asked is mostly the same, so that tests share programs.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

import catp_jax
from catp_jax.contract import Site
from catp_jax.pruning import CATP, FastV, L2Norm, Random, TrimmedLlama
from catp_jax.study.tasks import easy_vqa
from tests.shallow import ASSETS, shallow

CIRCLE = ASSETS / "blue-circle.png"
COLOR, SHAPE = "what color is the shape?", "what shape is present?"
MINIS = ("mini-blip2-opt", "mini-blip2-t5")
NEW = 6  # tokens, at most
BEAMS: dict = {"num_beams": 2, "max_new_tokens": NEW}


@pytest.fixture(scope="module", params=MINIS)
def folder(request: pytest.FixtureRequest) -> Path:
    return shallow(request.param)


@pytest.fixture(scope="module")
def model(folder: Path):
    return catp_jax.load(folder)


@pytest.fixture(scope="module")
def asked() -> tuple[list[Path], list[str]]:
    """Images, and twelve questions of different lengths about them."""
    every = list(easy_vqa("test"))
    some = every[:: len(every) // 10][:10]
    return [CIRCLE, CIRCLE, *(q.image for q in some)], [COLOR, SHAPE, *(q.question for q in some)]


def test_answers_come_with_their_tokens_and_the_number_of_visual_tokens(model, asked):
    out = model.generate(*asked, max_new_tokens=NEW)
    texts = model.reader.tokenizer.batch_decode(out.tokens, skip_special_tokens=True)
    assert out.text == [text.strip() for text in texts]
    assert out.available == (32,) * 12
    assert out.kept is None
    assert out.capacity == 32
    assert out.logits.shape == (12, model.config.text.vocab_size)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_transformers(folder, model, asked, beams):
    hf = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = Blip2Processor.from_pretrained(folder)
    inputs = processor(
        images=[Image.open(image) for image in asked[0]],
        text=asked[1],
        padding=True,
        return_tensors="pt",
    )
    options: dict = {"num_beams": beams, "max_new_tokens": NEW}
    if beams > 1:
        options["length_penalty"] = 0.0
    out = hf.generate(**inputs, **options, do_sample=False)
    if folder.name == "mini-blip2-opt":
        out = out[:, inputs["input_ids"].shape[1] :]
    expected = [t.strip() for t in processor.batch_decode(out, skip_special_tokens=True)]
    ours = model.generate(*asked, **options)
    assert ours.text == expected
    assert len({*expected}) > 2


def test_logits_are_those_of_transformers(folder, model, asked):
    hf = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = Blip2Processor.from_pretrained(folder)
    ours = model.generate(*asked, max_new_tokens=NEW)
    for row in (1, 2, 3):
        image, prompt = Image.open(asked[0][row]), asked[1][row]
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        if folder.name == "mini-blip2-t5":
            inputs["decoder_input_ids"] = torch.zeros((1, 1), dtype=torch.long)
        with torch.no_grad():
            logits = hf(**inputs).logits[0, -1].numpy()
        np.testing.assert_allclose(ours.logits[row], logits, atol=1e-4 * np.abs(logits).max())


def test_a_prompt_answers_in_a_batch_as_alone(model, asked):
    # not CATP: its votes go by rank, and rounding may decide between queries of equal standing
    together = model.generate(*asked, [L2Norm(keep=8)], **BEAMS)
    for row in (0, 5, 11):
        own = ([what[row]] for what in asked)
        alone = model.generate(*own, [L2Norm(keep=8)], **BEAMS)
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_array_equal(alone.kept[0].number, together.kept[row].number)


def test_kept_queries_come_back_in_order_and_take_as_many_slots(model, asked):
    out = model.generate(*asked, [CATP(keep=8, layers="first")], max_new_tokens=NEW)
    assert out.capacity == 8
    for kept in out.kept:
        assert kept.number.tolist() == sorted({*kept.number.tolist()})
        assert len(kept.number) == 8
        assert 0 <= kept.number.min() <= kept.number.max() < 32
        assert kept.as_rows() == [{"query": number} for number in kept.number.tolist()]


def test_an_image_of_several_prompts_is_encoded_once(model):
    packed = model.prepare([CIRCLE] * 4, [COLOR, SHAPE, COLOR, "is there a circle?"])
    assert packed.inputs.pixels.shape[0] == 1
    assert packed.inputs.image_index.tolist() == [0] * 4


def test_an_empty_prompt_asks_for_a_caption_as_in_transformers(folder, model):
    hf = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = Blip2Processor.from_pretrained(folder)
    inputs = processor(images=Image.open(CIRCLE).convert("RGB"), text="", return_tensors="pt")
    some = inputs["input_ids"].shape[1]
    expected = []
    for length in (some, 32):  # also where a tokenizer adds nothing, so that the queries are alone
        for name in ("input_ids", "attention_mask"):
            inputs[name] = inputs[name][:, :length]
        out = hf.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist()
        expected.append(out[1:] if folder.name == "mini-blip2-t5" else out[length:])
    caption = model.read(CIRCLE, "")
    alone = dataclasses.replace(caption, tokens=[])
    ours = model.generate_packed(model.pack([caption, alone]), max_new_tokens=NEW)
    assert ours.tokens == expected
    assert len(model.generate([CIRCLE], [""], [L2Norm(keep=8)], **BEAMS).text) == 1


def test_the_map_shows_where_kept_queries_look(model):
    packed = model.prepare([CIRCLE], [COLOR])
    out = model.generate_packed(packed, [L2Norm(keep=8)], **BEAMS)
    grid = model.config.vision.grid
    shown = model.reader.kept_map(model.network, packed, 0, out.kept[0])
    assert shown.shape == (grid, grid)
    assert shown.max() == pytest.approx(1)
    assert shown.min() >= 0
    side = model.config.vision.image_size
    assert model.reader.picture(CIRCLE).shape == (side, side, 3)


def test_a_model_describes_itself_in_json_apart_from_others(model, folder):
    mine = model.describe()
    assert json.loads(json.dumps(mine)) == mine
    assert mine == catp_jax.load(folder).describe()
    other = catp_jax.load(shallow(next(name for name in MINIS if name != folder.name)))
    assert other.describe() != mine


def test_a_changed_processor_is_another_model(model, folder, tmp_path):
    mine = model.describe()
    for name, change in (
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ):
        other = shutil.copytree(folder, tmp_path / name)
        (other / "processor_config.json").unlink()
        config = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(config | change))
        theirs = catp_jax.load(folder, processor=other).describe()
        assert {key for key in mine if mine[key] != theirs[key]} == {"processor"}, name


@pytest.mark.parametrize(
    ("images", "prompts", "says"),
    [
        ([None], [COLOR], "takes one image with each prompt, got 0"),
        ([[CIRCLE, CIRCLE]], [COLOR], "takes one image with each prompt, got 2"),
        ([CIRCLE], [f"<image>{COLOR}"], "leave it out"),
        ([CIRCLE], [[{"role": "user", "content": COLOR}]], "no chat template"),
        ([CIRCLE, None], [COLOR, COLOR], "prompt 1: BLIP-2 takes one image"),
    ],
)
def test_questions_that_do_not_fit_are_refused(model, images, prompts, says):
    with pytest.raises(ValueError, match=says):
        model.generate(images, prompts)


@pytest.mark.parametrize(
    ("pruners", "says"),
    [
        ([CATP(keep=33)], "keep is 33, but there are only 32 visual tokens"),
        ([CATP(keep=8), L2Norm(keep=9)], "keep is 9, but there are only 8 visual tokens"),
        ([CATP(keep=8, weights=jnp.ones(5))], r"got 5 layer weights, but this model has 1"),
        ([CATP(keep=8, layers=7)], "layers=7, but this model's cross-attention layers are 1 to 1"),
        ([TrimmedLlama(keep=8)], "site CROSS.*does not have"),
        ([Random(keep=8, site=Site.CROSS)], "give Random site=Site.ENTRY"),
    ],
)
def test_pruners_that_do_not_fit_are_refused(model, pruners, says):
    with pytest.raises(ValueError, match=says):
        model.generate([CIRCLE], [COLOR], pruners)


def test_fastv_works_between_opt_layers_that_exist():
    model = catp_jax.load(shallow("mini-blip2-opt"))
    depth = model.config.text.num_hidden_layers
    out = model.generate([CIRCLE], [COLOR], [FastV(keep=8, layer=1)])
    assert len(out.kept[0].number) == 8
    with pytest.raises(ValueError, match=f"FastV works at layer {depth}, which this model does"):
        model.generate([CIRCLE], [COLOR], [FastV(keep=8, site=Site.LAYER, layer=depth)])


def test_methods_by_name_are_those_by_class(asked):
    model = catp_jax.load(shallow("mini-blip2-opt"))
    options = {"max_new_tokens": NEW}
    by_name = model.generate(*asked, prune="catp:layers=first", keep="25%", **options)
    by_class = model.generate(*asked, [CATP(keep=8, layers="first")], **options)
    assert by_name.tokens == by_class.tokens
    for ours, theirs in zip(by_name.kept, by_class.kept, strict=True):
        np.testing.assert_array_equal(ours.number, theirs.number)
    two = model.generate(*asked, prune=["l2", "random:seed=3"], keep=["50%", 4], **options)
    assert [len(kept.number) for kept in two.kept] == [4] * 12


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prune": "catp"}, "wants its budget to keep: got 1 methods and 0 budgets"),
        ({"keep": 8}, "got 0 methods and 1 budgets"),
        ({"prune": ["catp", "l2"], "keep": 8}, "got 2 methods and 1 budgets"),
        ({"prune": "captain", "keep": 8}, "unknown pruning method 'captain'"),
        ({"prune": "trimmed_llama", "keep": 8}, "trimmed_llama prunes a place that this model"),
        ({"prune": "catp", "keep": "0%"}, "above 0%"),
        ({"prune": "catp", "keep": "auto"}, "catp wants a number"),
        ({"prune": ["catp", "l2"], "keep": ["25%", 9]}, "keep is 9, but there are only 8"),
        ({"prune": "catp", "keep": 8, "pruners": [CATP(keep=8)]}, "not both"),
    ],
)
def test_methods_by_name_that_do_not_fit_are_refused(model, asked, says):
    with pytest.raises(ValueError, match=says):
        model.generate([CIRCLE], [COLOR], **asked)


def test_beams_and_a_temperature_do_not_go_together(model):
    with pytest.raises(ValueError, match="num_beams or a temperature"):
        model.generate([CIRCLE], [COLOR], num_beams=2, temperature=0.5)
