"""Scenes and their questions: the same everywhere, balanced, answered by what they need."""

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from catp_jax.training.scene_batches import LABELS, cut, patch_labels
from catp_jax.training.scene_questions import (
    COUNTS,
    FAMILIES,
    TAUGHT,
    WORDS,
    drawn,
    questions_of,
    scenes_task,
)
from catp_jax.training.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    SPLITS,
    Dials,
    Dice,
    make_scene,
    mask_of,
)


@pytest.fixture(scope="module")
def asked():
    return questions_of("test", 150)


def test_a_scene_has_the_same_pixels_on_any_machine():
    pixels = b"".join(make_scene("test", number).pixels.tobytes() for number in range(3))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "22116ebe37b301f7"


def test_splits_and_seeds_share_no_scene():
    seen = Counter()
    for split in SPLITS:
        for seed in (0, 1):
            for number in range(100):
                seen[make_scene(split, number, seed=seed).pixels.tobytes()] += 1
    assert len(seen) == 600


@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("size", ["small", "large", "mixed"])
def test_dials_say_what_a_scene_has(tiles, size):
    dials = Dials(objects=4 * tiles if tiles < 4 else 12, size=size, tiles=tiles)
    for number in range(10):
        scene = make_scene("train", number, dials)
        assert len(scene.things) == dials.objects
        assert scene.pixels.size == tiles * 64 * 64 * 3
        assert len({(t.row, t.column) for t in scene.things}) == dials.objects  # a cell each
        assert {t.size for t in scene.things} <= ({size} if size in SIZES else set(SIZES))
        digits = [thing for thing in scene.things if thing.is_digit]
        assert len(digits) >= 2
        assert len({thing.colour for thing in digits}) == len(digits)


def test_an_object_is_seen_inside_its_box_and_in_its_colour():
    for number in range(20):
        scene = make_scene("validation", number)
        height, width, _ = scene.pixels.shape
        for thing in scene.things:
            mask = mask_of(thing, height, width)
            left, top, right, bottom = (round(x * width) for x in scene.box(thing))
            rows, columns = np.nonzero(mask)
            assert left <= columns.min() <= columns.max() <= right
            assert top <= rows.min() <= rows.max() <= bottom
            assert mask.sum() > 30
            seen = scene.pixels[mask].mean(axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(seen - COLOURS[name]).sum())
            assert nearest == thing.colour


def answer(question, things):
    """The answer by other means than the generator's: from the question's words."""
    words = question.removesuffix("?").split()
    shapes = [t for t in things if not t.is_digit]

    def fits(thing, described):
        return all(w in ("object", thing.name, thing.colour, thing.size) for w in described)

    if words[:2] == ["is", "there"]:
        return "yes" if any(fits(t, words[3:]) for t in shapes) else "no"
    if words[:2] == ["how", "many"]:
        which = words[2].removesuffix("s").removesuffix("e") if words[3] == "are" else words[2]
        found = [t for t in things if which in (t.colour, t.name, t.name.removesuffix("e"))]
        return [None, "one", "two", "three", "four"][len(found)]
    if words[:2] == ["what", "digit"]:
        return next(t.name for t in things if t.is_digit and t.colour == words[3])
    if "digit" in words:
        return next(t.colour for t in things if t.name == words[-1])
    if "nearest" in words:
        one = next(t for t in shapes if fits(t, words[-2:]))
        others = [t for t in things if t is not one]
        return min(others, key=lambda t: np.hypot(t.row - one.row, t.column - one.column)).colour
    if words[0] == "is":
        one = next(t for t in shapes if fits(t, words[2:4]))
        other = next(t for t in shapes if fits(t, words[-2:]))
        so = {
            "left": one.x < other.x - 9,
            "right": one.x > other.x + 9,
            "above": one.y < other.y - 9,
            "below": one.y > other.y + 9,
        }[words[4]]
        return "yes" if so else "no"
    if words[0] == "which":
        one = next(t for t in shapes if fits(t, words[4:6]))
        place = one.y if words[1] == "row" else one.x
        return COUNTS[place // 32]
    (thing,) = (t for t in shapes if fits(t, words[4:]))
    return thing.colour if words[1] == "color" else thing.name


def test_answers_are_right_and_one_question_has_one_answer(asked):
    for scene, questions in asked:
        for one in questions:
            assert answer(one.question, scene.things) == one.answer, one
        for make in TAUGHT.values():
            answers = defaultdict(set)
            for one in make(scene):
                answers[one.question].add(one.answer)
                assert answer(one.question, scene.things) == one.answer, one
            assert all(len(some) == 1 for some in answers.values())


def test_what_is_needed_decides_the_answer(asked):
    """With the needed objects alone the answer is the same."""
    for scene, questions in asked:
        for one in questions:
            assert one.needed
            assert set(one.needed) <= set(scene.things)
            assert answer(one.question, one.needed) == one.answer, one


def test_no_answer_is_likelier_than_another_of_its_kind():
    said = defaultdict(Counter)
    for _, questions in questions_of("test", 400):
        for one in questions:
            said[one.family, one.kind][one.answer] += 1
    assert {family for family, _ in said} == set(FAMILIES)
    for key, counts in said.items():
        assert max(counts.values()) <= 1.2 * sum(counts.values()) / len(counts) + 3, (key, counts)


def test_every_word_of_questions_is_listed(asked):
    words = {one.answer for _, questions in asked for one in questions}
    assert words <= set(WORDS)
    assert {*SHAPES, *COLOURS} <= words


def test_training_draws_a_question_of_each_family():
    scene, dice = make_scene("train", 5), Dice(1)
    found = [drawn(dice, scene, TAUGHT) for _ in range(20)]
    assert {one.family for some in found for one in some} == set(TAUGHT)
    assert len({one.question for some in found for one in some}) > 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("objects=20", r"16 cells, so 4 to 16 objects, got objects=20"),
        ("objects=3", r"4 to 16 objects, got objects=3"),
        ("objects=5,tiles=1", r"1 tiles has 4 cells"),
        ("tiles=3", r"1 or 2 or 4 tiles, got tiles=3"),
        ("size=huge", "small or large or mixed, got size=huge"),
        ("objects=many", "a whole number, got 'objects=many'"),
        ("object=5", "the dials objects or size or tiles.*got 'object=5'"),
        ("objects=5,objects=6", "each once"),
        ("small", "got 'small'"),
    ],
)
def test_dials_that_cannot_be_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        Dials.parse(text)


def test_dials_are_read():
    assert Dials.parse("") == Dials()
    assert Dials.parse("objects=12,size=small") == Dials(objects=12, size="small")
    assert Dials.parse("tiles=1") == Dials(tiles=1)


def test_a_split_that_is_none_is_refused():
    with pytest.raises(ValueError, match="train or validation or test, not 'dev'"):
        make_scene("dev", 0)


def test_the_task_has_images_families_and_boxes():
    task = scenes_task(Dials(objects=8), scenes=3)
    assert {example.family for example in task.examples} == set(FAMILIES)
    assert len({example.id for example in task.examples}) == len(task.examples) == 15
    for example in task.examples:
        assert example.image.shape == (128, 128, 3)
        assert example.needed
        assert all(0 <= x <= 1 for box in example.needed for x in box)
    assert task.source["objects"] == 8


def test_patches_are_labelled_with_what_covers_them():
    for number in range(10):
        scene = make_scene("train", number)
        labels, weights = patch_labels(scene, 8)
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        assert weights[labels["name"] > 0].sum() == pytest.approx(0.5, abs=1e-5)
        assert labels["middle"].sum() == len(scene.things)
        for thing in scene.things:
            row, column = (thing.y - 1) // 8, (thing.x - 1) // 8
            assert LABELS["row"][labels["row"][row, column]] == str(thing.row)
            assert LABELS["column"][labels["column"][row, column]] == str(thing.column)
            around = {
                name: {
                    LABELS[name][value]
                    for value in np.unique(labels[name][row : row + 2, column : column + 2])
                }
                for name in ("name", "colour", "size")
            }
            assert thing.name in around["name"]
            assert thing.colour in around["colour"]
            assert thing.size in around["size"]


def test_tiles_are_cut_row_by_row():
    image = np.arange(4 * 6).reshape(4, 6)
    tiles = cut(image, (2, 3))
    assert tiles.shape == (6, 2, 2)
    np.testing.assert_array_equal(tiles[1], image[:2, 2:4])
    np.testing.assert_array_equal(tiles[3], image[2:, :2])


def test_the_sheet_is_drawn_and_faults_are_one_line(tmp_path):
    command = [sys.executable, "-m", "catp_jax.training.scenes", "--show"]
    out = tmp_path / "sheet.png"
    subprocess.run([*command, out, "--scenes", "2"], check=True, timeout=120)
    assert out.stat().st_size > 10_000
    bad = subprocess.run(
        [*command, tmp_path / "x.png", "--dials", "objects=99"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: a scene of 4 tiles")
    assert not (tmp_path / "x.png").exists()
