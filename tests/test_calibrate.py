"""`catp-jax calibrate`, as a user meets it: what is learned can be used, and bad input."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import catp_jax as package
from catp_jax import cli_calibrate
from catp_jax.models.blocks import capacity
from catp_jax.pruning.eigen import Gather
from catp_jax.pruning.named import named
from catp_jax.pruning.named import pruners as pruners_of
from catp_jax.study.cost import sizes
from catp_jax.training import attention_predictor as training
from tests.command import catp_jax
from tests.random_instructblip import save_random
from tests.shallow import ASSETS, shallow

QUESTIONS = ("what color is the shape?", "what shape is present?", "is there a circle?")
ANSWERS = ("red", "square", "no")
OF_PREDICTOR = ("--method", "attention_predictor", "--block", 4, "--rows", 6, "--steps", 3)


def data(folder: Path, images: int = 8, questions: int = 3, longer: int = 1) -> Path:
    """A file of questions about plain images of several sizes."""
    lines = []
    for number in range(images):
        size = (64, 64) if number % 2 else (100, 50)
        Image.new("RGB", size, (20 * number, 200, 90)).save(folder / f"{number}.png")
        for question, answer in list(zip(QUESTIONS, ANSWERS, strict=True))[:questions]:
            asked = " ".join([question] * longer)
            lines.append({"image": f"{number}.png", "question": asked, "answer": answer})
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def calibrate(model: Path, *words: object, cwd: Path) -> Any:
    return catp_jax("calibrate", model, *words, cwd=cwd)


def refused(done: Any, *said: str) -> None:
    """One plain message, a non-zero exit, nothing on stdout."""
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    message = " ".join(done.stderr.replace("│", " ").split())  # typer frames its own
    for words in said:
        assert words in message
    if done.returncode == 1:
        assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def eigen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("eigen")
    (folder / "new.work").mkdir()  # somebody's own
    (folder / "new.work" / "mine").write_text("hello")
    words = ("--method", "eigen", "--out", "new", "--samples", 8, "--seed", 3)
    return calibrate(shallow("mini-llama-vision"), *words, cwd=folder), folder


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("predictor")
    words = ("--task", "jsonl", "--data", data(folder), "--out", "runs/new", *OF_PREDICTOR)
    return calibrate(shallow("mini-blip2-opt"), *words, cwd=folder), folder


def test_eigen_learns_directions_and_says_what_they_leave(eigen: tuple[Any, Path]):
    done, folder = eigen
    assert done.returncode == 0, done.stderr
    assert done.stderr == "catp-jax: written: new; use it as --prune eigen:new\n"
    ranks, left = done.stdout.splitlines()
    assert re.fullmatch(
        r"ranks of keys .* within 2.5 % \(--keep auto\): \{'1': \[\d+, \d+\]\}", ranks
    )
    assert 0 < float(left.removeprefix("share of the bytes that they leave: ")) <= 1
    record = json.loads((folder / "new" / "learned.json").read_text())
    model = package.load(shallow("mini-llama-vision"))
    assert record["model"] == model.describe()
    assert record["learned_from"].items() >= {"task": "scenes", "samples": 8, "seed": 3}.items()
    kv, channels = model.config.text.num_key_value_heads, model.config.text.head_dim
    with np.load(folder / "new" / "arrays.npz") as arrays:
        for name in ("1.keys", "1.values"):
            alike = np.swapaxes(arrays[name], 1, 2) @ arrays[name]
            np.testing.assert_allclose(alike, np.tile(np.eye(channels), (kv, 1, 1)), atol=1e-5)
    assert (folder / "new.work" / "mine").read_text() == "hello"


def test_a_model_answers_with_the_directions_it_has_learned(eigen: tuple[Any, Path]):
    _, folder = eigen
    model = package.load(shallow("mini-llama-vision"))
    asked = ([Image.new("RGB", (64, 64), "red")], [QUESTIONS[0]])
    whole = model.generate(*asked, max_new_tokens=3)
    full, half = (
        model.generate(*asked, prune=f"eigen:{folder / 'new'}", keep=keep, max_new_tokens=3)
        for keep in ("100%", "50%")
    )
    np.testing.assert_allclose(full.logits, whole.logits, atol=1e-4)
    assert full.tokens == whole.tokens
    assert half.kept is None
    assert np.isfinite(half.logits).all()


def test_a_model_answers_in_the_ranks_that_were_searched_and_its_cache_has_their_bytes(
    eigen: tuple[Any, Path],
):
    done, folder = eigen
    (said,) = re.findall(r"\{'1': \[(\d+), (\d+)\]\}", done.stdout)
    ranks = [int(rank) for rank in said]
    model, spec = package.load(shallow("mini-llama-vision")), f"eigen:{folder / 'new'}"
    kv, channels = model.config.text.num_key_value_heads, model.config.text.head_dim
    packed = model.prepare([Image.new("RGB", (64, 64), "red")], [QUESTIONS[0]])

    def cost(*pruners: Any) -> Any:
        return sizes(model.network, pruners, packed.given, 1, 3).cache_bytes

    methods = named(spec, "auto")
    own = pruners_of(methods, packed.available, packed.capacity, model.sites)
    each, matrix = capacity(packed.capacity) * kv * 4, channels * kv * 4  # bytes of a channel
    left = sum(rank * (each + matrix * (rank < channels)) for rank in ranks)
    assert cost(*own) - cost() == left - 2 * each * channels
    answers = model.generate_packed(packed, prune=spec, keep="auto", max_new_tokens=3)
    assert np.isfinite(answers.logits).all()
    with pytest.raises(ValueError, match="give it a percentage such as 50%, got 8"):
        model.generate_packed(packed, prune=spec, keep=8)


def test_every_prompt_is_learned_from_once():
    """The last batch is not full."""
    model = package.load(shallow("mini-blip2-opt"))
    prompts = [(Image.new("RGB", (64, 64), (20 * n, 9, 9)), QUESTIONS[n % 3]) for n in range(10)]
    batches = list(cli_calibrate._states(model, prompts, Gather()))
    keys = np.concatenate([states[0].keys for states in batches])
    assert len(keys) == 10
    for number in (0, 7, 9):
        (alone,) = cli_calibrate._states(model, [prompts[number]], Gather())
        np.testing.assert_allclose(keys[number], alone[0].keys[0], rtol=1e-4, atol=1e-3)
    assert not np.allclose(keys[9], keys[8], rtol=1e-2)


def test_a_predictor_learns_and_says_what_it_foresees(predictor: tuple[Any, Path]):
    done, folder = predictor
    assert done.returncode == 0, done.stderr
    assert "use it as --prune attention_predictor:runs/new" in done.stderr
    rates = [line for line in done.stdout.splitlines() if line.startswith("foreseen of ")]
    assert len(rates) == 9
    assert all(0 <= float(line.rpartition(": ")[2]) <= 1 for line in rates)
    assert [path.name for path in (folder / "runs").iterdir()] == ["new"]
    record = json.loads((folder / "runs" / "new" / "learned.json").read_text())
    assert record["settings"] == {"block": 4, "rows": 6}
    assert record["learned_from"].items() >= {"task": "jsonl", "samples": 8, "steps": 3}.items()


def test_a_command_answers_with_the_network_that_was_trained(predictor: tuple[Any, Path]):
    _, folder = predictor
    words = ("generate", shallow("mini-blip2-opt"), "--image", "1.png", "--prompt", QUESTIONS[0])
    spec = "attention_predictor:runs/new:refresh=2"
    done = catp_jax(*words, "--prune", spec, "--keep", "50%", "--max-new-tokens", 3, cwd=folder)
    assert done.returncode == 0, done.stderr
    whole, full = (
        catp_jax(*words, *some, "--max-new-tokens", 3, cwd=folder)
        for some in ((), ("--prune", spec, "--keep", "100%"))
    )
    assert full.stdout == whole.stdout
    other = shallow("mini-llama-vision")
    words = ("generate", other, "--image", "1.png", "--prompt", QUESTIONS[0], "--prune", spec)
    refused(catp_jax(*words, "--keep", 8, cwd=folder), "has learned is of another model")


def test_an_interrupted_run_goes_on_with_the_same_options_alone(
    predictor: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, model = data(tmp_path), shallow("mini-blip2-opt")
    words = ("--task", "jsonl", "--data", path, "--out", "new", *OF_PREDICTOR)
    whole, ran = training.train, []

    def interrupted(*given: Any, **options: Any) -> Any:
        whole(*given, **options, stop_at=2)
        raise ValueError("interrupted")

    def watched(stage: Any, *given: Any, **options: Any) -> Any:
        some = stage.batches
        object.__setattr__(stage, "batches", lambda step: ran.append(step) or some(step))
        return whole(stage, *given, **options)

    monkeypatch.setattr(training, "train", interrupted)
    assert calibrate(model, *words, cwd=tmp_path).returncode == 1
    assert not (tmp_path / "new").exists()
    refused(
        calibrate(model, *words, "--steps", 4, cwd=tmp_path),
        *("new.work holds a run with steps 3, not 4", "choose another --out or delete it"),
    )
    path.write_text(path.read_text().replace('"red"', '"blue"'))
    refused(calibrate(model, *words, cwd=tmp_path), "new.work holds a run with questions")
    path.write_text(path.read_text().replace('"blue"', '"red"'))
    monkeypatch.setattr(training, "train", watched)
    assert calibrate(model, *words, cwd=tmp_path).returncode == 0
    assert ran == [2]
    assert not (tmp_path / "new.work").exists()
    mine, expected = (
        np.load(place / "arrays.npz") for place in (tmp_path / "new", predictor[1] / "runs" / "new")
    )
    for name in expected.files:
        np.testing.assert_array_equal(mine[name], expected[name])


@pytest.mark.parametrize("questions", [1, 2, 3])
def test_a_prompt_is_what_is_asked_about_an_image_with_answers_but_the_last(
    questions: int, tmp_path: Path
):
    prompts, _ = cli_calibrate._prompts("jsonl", data(tmp_path, 5, questions), 4)
    expected = [
        "what color is the shape?",
        "what color is the shape? red what shape is present?",
        "what color is the shape? red what shape is present? square is there a circle?",
    ]
    assert prompts == [(tmp_path / f"{n}.png", expected[questions - 1]) for n in range(4)]


def test_more_samples_than_a_task_has_are_all_it_has(tmp_path: Path):
    prompts, _ = cli_calibrate._prompts("jsonl", data(tmp_path, 5), 1000)
    assert len(prompts) == 5


def test_scenes_have_dials_and_four_questions_at_most():
    prompts, digest = cli_calibrate._prompts("scenes:objects=4,tiles=1", None, 5)
    assert len(prompts) == 5
    assert {image.shape for image, _ in prompts} == {(64, 64, 3)}
    assert all(1 <= text.count("?") <= 4 and text.endswith("?") for _, text in prompts)
    assert cli_calibrate._prompts("scenes:objects=4,tiles=1", None, 5)[1] == digest
    assert cli_calibrate._prompts("scenes:objects=4,tiles=1", None, 6)[1] != digest


WRONG = {
    "a task": (("--task", "pictures"), "--task is scenes, easy-vqa or jsonl"),
    "dials of easy-vqa": (("--task", "easy-vqa:objects=3"), "scenes alone takes dials"),
    "a dial": (("--task", "scenes:objects=99"), "got objects=99"),
    "no data": (("--task", "jsonl"), "--task jsonl and --data go together"),
    "data for scenes": (("--data", "mine.jsonl"), "--task jsonl and --data go together"),
    "samples": (("--samples", 3), "should be greater than or equal to 4"),
    "steps": (("--steps", 0), "should be greater than or equal to 1"),
    "block": (("--block", 0), "should be greater than or equal to 1"),
    "rows": (("--rows", -1), "should be greater than or equal to 1"),
    "a colon": (("--out", "a:b"), "--out has a colon or a comma, which --prune cuts at: a:b"),
    "no file": (("--task", "jsonl", "--data", "other.jsonl"), "other.jsonl is not a file"),
    "out exists": (("--out", "there"), "there exists already; choose another folder or delete it"),
    "out in a file": (("--out", "mine.jsonl/a"), "mine.jsonl is not a folder"),
    "few images": (
        ("--task", "jsonl", "--data", "mine.jsonl"),
        "calibration wants at least 4 images, jsonl has 3",
    ),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG)
def test_bad_words_are_refused_before_a_model_is_loaded(
    words: tuple[Any, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data(tmp_path, 3)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("catp_jax.api.load", lambda *_, **__: pytest.fail("it was loaded"))
    given = ("--method", "eigen", "--out", "new", *words)
    refused(calibrate(shallow("mini-llama-vision"), *given, cwd=tmp_path), said)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == [
        "mine.jsonl",
        "there",
    ]


def test_a_method_that_learns_nothing_is_refused(tmp_path: Path):
    words = ("--method", "k_norm", "--out", "new")
    done = calibrate(shallow("mini-llama-vision"), *words, cwd=tmp_path)
    refused(done, "'k_norm' is not one of 'eigen', 'attention_predictor'")


@pytest.mark.parametrize("method", ["eigen", "attention_predictor"])
def test_a_model_that_caches_no_visual_tokens_is_refused(method: str, tmp_path: Path):
    words = ("--method", method, "--out", "new", "--samples", 4)
    done = calibrate(shallow("mini-blip2-t5"), *words, cwd=tmp_path)
    refused(done, f"{method} wants a model that caches visual tokens, which T5 does not")
    assert [*tmp_path.iterdir()] == []


def test_eigen_refuses_visual_tokens_with_rope(tmp_path: Path):
    words = ("--method", "eigen", "--out", "new", "--samples", 4)
    done = calibrate(save_random("vicuna", tmp_path / "model"), *words, cwd=tmp_path)
    refused(done, "eigen wants keys of visual tokens without RoPE", "this is Llama")


@pytest.mark.parametrize("method", ["eigen", "attention_predictor"])
def test_prompts_that_are_too_long_are_refused(method: str, tmp_path: Path):
    path = data(tmp_path, 4, longer=40)
    words = ("--method", method, "--out", "new", "--task", "jsonl", "--data", path)
    done = calibrate(shallow("mini-blip2-opt"), *words, cwd=tmp_path)
    refused(done, "tokens and 0 new ones do not fit the model's", "positions; shorten either")
    assert not [*tmp_path.glob("new*")]


def test_a_folder_in_the_way_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "new.work").mkdir()
    (tmp_path / "new.work" / "mine").write_text("hello")
    words = ("--out", "new", "--samples", 4, *OF_PREDICTOR)
    done = calibrate(shallow("mini-blip2-opt"), *words, cwd=tmp_path)
    refused(done, "new.work is in the way", "choose another --out")
    assert (tmp_path / "new.work" / "mine").read_text() == "hello"


def test_a_grouping_is_learned_and_used_with_as_many_groups(tmp_path: Path):
    model = ASSETS / "scenes-blip2-opt"
    words = ("--method", "vistog_grouping", "--groups", 6, "--samples", 8, "--steps", 2)
    done = calibrate(model, *words, "--out", "groups", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = "right answers with "
    lines = [line for line in done.stdout.splitlines() if line.startswith(said)]
    names = [line.removeprefix(said).split(":")[0] for line in lines]
    assert names == ["unpruned", "vistog_grouping", "nearest_centroid", "pool"]
    assert {path.name for path in tmp_path.iterdir()} == {"groups"}
    loaded = package.load(model)
    prune = {"prune": f"vistog_grouping:{tmp_path / 'groups'}", "max_new_tokens": 3}
    picture = Image.new("RGB", (128, 128), "red")
    answers = loaded.generate([picture], ["what?"], **prune, keep=6)
    assert answers.is_merged
    assert answers.capacity == 6
    with pytest.raises(ValueError, match="made for keep=6, its number of semantic tokens"):
        loaded.generate([picture], ["what?"], **prune, keep=8)


def test_a_grouping_is_for_scenes_and_a_blip2(tmp_path: Path):
    words = ("--method", "vistog_grouping", "--samples", 4, "--steps", 1, "--out", "new")
    done = calibrate(ASSETS / "scenes-blip2-opt", *words, "--task", "easy-vqa", cwd=tmp_path)
    refused(done, "vistog_grouping learns from --task scenes, without dials")
    done = calibrate(ASSETS / "scenes-llama-vision", *words, cwd=tmp_path)
    refused(done, "vistog_grouping groups the queries of a BLIP-2", "this is Mllama")
    assert not list(tmp_path.iterdir())
