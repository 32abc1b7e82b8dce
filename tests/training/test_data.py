"""Batches of easy-VQA: labels, composition, tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from catp_jax.study.tasks import easy_vqa
from catp_jax.training.data import (
    TEXT_LENGTH,
    Composer,
    Text,
    evaluation_batches,
    patch_coverage,
    split_tiles,
)
from catp_jax.training.mini_llama_vision import mini_config
from catp_jax.training.photos import (
    COLOURS,
    SHAPES,
    careless,
    dense_weights,
    names_in,
    normalise,
    read_image,
    take_apart,
)
from catp_jax.training.tokenizer import make_processor, train_tokenizer

CONFIG = mini_config().vision
FOUR = (2, 2)


@pytest.fixture(scope="module")
def examples():
    return list(easy_vqa("train", 1500))


@pytest.fixture(scope="module")
def composer(examples):
    return Composer(examples, CONFIG, seed=3)


@pytest.fixture(scope="module")
def tokenizer(examples):
    return train_tokenizer((f"{e.question} {e.answer}" for e in examples), 352, 512)


@pytest.fixture(scope="module")
def text(tokenizer):
    end, padding = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|finetune_right_pad_id|>"])
    return Text(encode=tokenizer.encode, end=end, padding=padding)


@pytest.mark.parametrize(
    ("question", "answer", "shape"),
    [
        ("what shape is in the image?", "circle", "circle"),
        ("what color is the circle?", "red", "circle"),
        ("is there a circle?", "yes", "circle"),
        ("is there a circle?", "no", None),
        ("is there not a circle in the image?", "no", "circle"),
        ("is no circle present?", "yes", None),
        ("what color is the shape?", "red", None),
    ],
)
def test_labels_are_read_off_questions_and_answers(question, answer, shape):
    wanted = -1 if shape is None else SHAPES.index(shape)
    assert names_in([(question, answer)], SHAPES) == wanted


def test_questions_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"\['circle', 'triangle'\]"):
        names_in([("is there a circle?", "yes"), ("is there a triangle?", "yes")], SHAPES)


def hand_made() -> np.ndarray:
    """A black 8×12 rectangle on light grey whose left edge cuts through a column of patches."""
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[8:16, 31:43] = 0
    return pixels


def test_an_image_is_taken_apart_and_put_together():
    photo = take_apart(hand_made(), (("is there a black shape?", "yes"),))
    assert photo.matte.shape == (8, 12)
    assert (photo.matte == 1).all()
    assert (photo.ink == 0).all()
    assert (photo.paper == 240).all()
    assert (photo.shape, photo.colour) == (-1, COLOURS.index("black"))


def test_every_training_image_can_be_put_together_again(composer, examples):
    """photo = paper + matte · (ink − paper), to within the rounding of 8 bits."""
    first = {e.image_id: e for e in reversed(examples)}
    for photo, number in zip(composer.photos, sorted(first), strict=True):
        pixels = read_image(first[number]).astype(np.float32)
        area = np.abs(pixels - photo.paper).max(axis=-1) > 0
        rows, columns = (np.flatnonzero(area.any(axis=axis)) for axis in (1, 0))
        shown = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        made = photo.paper + photo.matte[:, :, None] * (photo.ink - photo.paper)
        if made.shape == shown.shape:  # a pixel of rounding can make the matte smaller
            assert np.abs(made - shown).max() <= 3


def test_an_image_of_one_colour_is_refused():
    with pytest.raises(ValueError, match="one colour"):
        take_apart(np.zeros((8, 8, 3), np.uint8), ())


def test_dense_labels_of_a_hand_made_image():
    """Rows 8–15 and columns 31–42: of the left tile a quarter of two patches, of the right tile two
    full columns and three quarters of a third one, two patches high each.
    """
    matte = (hand_made()[:, :, 0] == 0).astype(np.float32)
    coverage = patch_coverage(matte, FOUR, CONFIG)
    grid = coverage[:, 1:].reshape(4, 8, 8)
    wanted = np.zeros((4, 8, 8))
    wanted[0, 2:4, 7] = 0.25
    wanted[1, 2:4, 0:2] = 1
    wanted[1, 2:4, 2] = 0.75
    np.testing.assert_array_equal(grid, wanted)
    assert (coverage[:, 0] == 0).all()

    covered, weights = dense_weights(coverage, real_tiles=4)
    assert covered.sum() == 8
    assert weights.sum() == pytest.approx(1)
    assert weights[covered].sum() == pytest.approx(0.5)
    assert (weights > 0).all()


def test_patches_at_the_edge_and_padding_tiles_have_no_weight():
    matte = np.zeros((32, 32), np.float32)
    matte[0, 0] = 1
    matte[8:12, 8:12] = 1
    _, weights = dense_weights(patch_coverage(matte, (1, 1), CONFIG), real_tiles=1)
    assert weights[0, 1] == 0
    assert weights[0, 1 + 2 * 8 + 2] == pytest.approx(0.5)
    assert (weights[1:] == 0).all()


def test_tiles_are_those_of_the_image_processor(tokenizer):
    processor = make_processor(tokenizer, CONFIG.image_size, CONFIG.max_num_tiles)
    example = next(easy_vqa("test"))
    with Image.open(example.image) as image:
        wanted = processor(images=[image], text=["<|image|>"], return_tensors="np")["pixel_values"]
    tiles = split_tiles(normalise(read_image(example)), FOUR, CONFIG.max_num_tiles)
    np.testing.assert_allclose(tiles, wanted[0, 0], atol=1e-6)


def test_prompts_are_those_of_the_processor(tokenizer, text):
    processor = make_processor(tokenizer, CONFIG.image_size, CONFIG.max_num_tiles)
    question = "what color is the shape?"
    image = Image.new("RGB", (64, 64))
    assert (
        text.prompt(question)
        == processor(images=[image], text=[f"<|image|>{question}"])["input_ids"][0]
    )


def equal(one, other) -> bool:
    same = jax.tree.map(lambda x, y: bool((x == y).all()), one, other)
    return all(jax.tree.leaves(same))


def test_a_batch_is_a_function_of_seed_and_step(composer, examples, text):
    assert equal(composer.dense(7, 4), composer.dense(7, 4))
    assert not equal(composer.dense(7, 4), composer.dense(8, 4))
    other = Composer(examples[:1500], CONFIG, seed=4)
    assert not equal(composer.dense(7, 4), other.dense(7, 4))
    assert equal(composer.questions(7, 3, 2, text), composer.questions(7, 3, 2, text))


def test_dense_batches_name_what_they_show(composer):
    """A patch labelled with a colour shows it, one labelled background is light."""
    batch = composer.dense(0, 64)
    tiles = np.asarray(batch.pixels).reshape(64, 4, 3, 8, 4, 8, 4)
    patches = ((tiles * 0.5 + 0.5) * 255).transpose(0, 1, 3, 5, 2, 4, 6).reshape(64, 4, 64, 3, 16)
    darkest = patches.min(axis=(3, 4))
    colours, weights = np.asarray(batch.colours)[:, :, 1:], np.asarray(batch.weights)[:, :, 1:]
    assert (darkest[(colours == 0) & (weights > 0)] >= 229.5).all()
    red = patches[colours == 1 + COLOURS.index("red")]
    assert len(red)
    assert (np.abs(red - np.array([255, 0, 0])[None, :, None]).max(axis=1).min(axis=1) <= 1).all()
    assert ((np.asarray(batch.shapes) > 0) == (np.asarray(batch.colours) > 0)).all()
    assert len(set(np.asarray(batch.aspect_ratio_ids).tolist())) > 1


def test_plain_batches_have_no_negation(composer, tokenizer, text):
    negations = set(tokenizer.convert_tokens_to_ids(["Ġno", "Ġnot"]))
    plain, usual = (
        np.asarray(composer.questions(0, 16, 4, text, is_plain=plain).tokens)
        for plain in (True, False)
    )
    answers = 2  # the last two tokens that are not padding may be " no" and the end
    for tokens, has_any in ((plain, False), (usual, True)):
        prompts = [
            [t for t in row if t != text.padding][:-answers] for row in tokens.reshape(64, -1)
        ]
        assert any(negations & set(map(int, prompt)) for prompt in prompts) == has_any


def test_rare_answers_are_drawn_as_often_as_common_ones(composer, tokenizer, text):
    """Most "is there a red shape?" are answered no; in a batch about half are."""
    batch = composer.questions(0, 64, 8, text, is_plain=True)
    yes, no = tokenizer.convert_tokens_to_ids(["Ġyes", "Ġno"])
    targets = np.asarray(batch.targets)
    share = (targets == yes).sum() / ((targets == yes) | (targets == no)).sum()
    assert 0.35 < share < 0.65


def test_targets_stand_one_row_before_the_answer(composer, text):
    batch = composer.questions(0, 4, 3, text)
    tokens, targets = np.asarray(batch.tokens), np.asarray(batch.targets)
    assert tokens.shape == (4, 3, TEXT_LENGTH)
    for line, wanted in zip(tokens.reshape(12, -1), targets.reshape(12, -1), strict=True):
        (rows,) = np.nonzero(wanted >= 0)
        assert len(rows) == 2
        assert (line[rows + 1] == wanted[rows]).all()
        assert wanted[rows[-1]] == text.end


def test_careless_typing_changes_no_word():
    rng = np.random.default_rng(0)
    question = "is there a circle?"
    seen = {careless(rng, question) for _ in range(300)}
    assert seen == {
        question, "Is there a circle?", "is there a circle", "Is there a circle"
    }  # fmt: skip


def test_evaluation_asks_every_question_once(examples, text):
    some = examples[:95]
    batches = evaluation_batches(some, text, CONFIG, size=4)
    asked = sum(int((np.asarray(b.targets) >= 0).any(axis=-1).sum()) for b in batches)
    assert asked == len(some)
    assert {b.tokens.shape for b in batches} == {batches[0].tokens.shape}


def test_a_question_too_long_is_named(text):
    with pytest.raises(ValueError, match="tokens of"):
        text.batch(
            np.zeros((1, 4, 3, 32, 32), np.float32),
            np.array([6], np.int32),
            [[("is there " * TEXT_LENGTH, "yes")]],
            each=1,
            config=CONFIG,
        )


def test_too_few_examples_are_refused(examples):
    with pytest.raises(ValueError, match="every shape"):
        Composer([dataclasses.replace(examples[0])], CONFIG, seed=0)
