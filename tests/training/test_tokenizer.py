"""The mini models' tokenizer and processor."""

import json

import numpy as np
import pytest
from PIL import Image

from catp_jax.training.tokenizer import (
    BOS,
    IMAGE,
    PAD,
    load_processor,
    make_processor,
    train_tokenizer,
    write_processor,
)

TEXTS = ["what color is the shape? blue", "is there a circle? yes", "is there no circle? no"] * 3
SIZE = 320


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer(TEXTS, SIZE, 64), tile_size=32, max_num_tiles=4)


def test_vocabulary_is_exact_and_the_image_token_is_the_first_beyond_it(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(IMAGE) == SIZE
    assert len(tokenizer) == SIZE + 1
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE + 1))


@pytest.mark.parametrize("text", [TEXTS[0], "Ein Fußgänger, 12345 mal…", " two  spaces\n", "🙂"])
def test_any_text_comes_back(processor, text):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_answer_words_are_single_tokens(processor):
    for word in (" blue", " yes", " no"):
        assert len(processor.tokenizer.encode(word)) == 1


def test_special_tokens_are_left_out_of_an_answer(processor):
    tokenizer = processor.tokenizer
    ids = [*tokenizer.encode(" yes"), tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "yes"


def test_a_prompt_holds_one_image_and_one_start(processor):
    image = Image.new("RGB", (64, 64), "white")
    texts = ["<|image|>is there a circle?", "<|image|>what color is the shape? It is"]
    found = processor(images=[[image], [image]], text=texts, padding=True, return_tensors="np")
    tokenizer = processor.tokenizer
    bos, pad = (tokenizer.convert_tokens_to_ids(name) for name in (BOS, PAD))
    for row in found["input_ids"]:
        assert row[:2].tolist() == [SIZE, bos]
        assert (row == bos).sum() == 1
        assert (row == SIZE).sum() == 1
    assert found["input_ids"][0, -1] == pad  # the shorter one is padded on the right
    assert found["attention_mask"][0].tolist() == (found["input_ids"][0] != pad).tolist()


def test_text_alone_holds_one_start(processor):
    ids = processor(text=["is there a circle?"])["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids(BOS)) == 1


def test_an_image_of_64_pixels_is_four_tiles_as_it_is(processor):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = processor(
        images=[Image.fromarray(pixels)], text=["<|image|>what?"], return_tensors="np"
    )
    assert found["pixel_values"].shape == (1, 1, 4, 3, 32, 32)
    assert found["aspect_ratio_ids"].tolist() == [[6]]
    assert found["aspect_ratio_mask"].sum() == 4
    second = (pixels[:32, 32:].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(found["pixel_values"][0, 0, 1], second, atol=1e-6)


def test_written_and_read_it_is_the_same(processor, tmp_path):
    write_processor(processor, tmp_path)
    again = load_processor(tmp_path)
    image = Image.new("RGB", (64, 40), "teal")
    text = "<|image|>what is the weather like?"
    first, second = (
        p(images=[image], text=[text], return_tensors="np") for p in (processor, again)
    )
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="261"):
        train_tokenizer(TEXTS, 260, 64)
