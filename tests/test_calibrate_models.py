"""`catp-jax calibrate --train`: a model is trained along, and is used by its folder alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import catp_jax as package
from catp_jax.training import vistog_grouping as training
from tests.command import catp_jax
from tests.shallow import ASSETS, shallow
from tests.test_calibrate import QUESTIONS, refused

MODEL = ASSETS / "scenes-blip2-t5"
WORDS = ("--method", "vistog_grouping", "--groups", 4, "--samples", 4, "--steps", 2, "--seed", 5)
PICTURE = ASSETS / "blue-circle.png"


def calibrate(*words: object, cwd: Path, model: Path = MODEL) -> Any:
    return catp_jax("calibrate", model, *WORDS, *words, cwd=cwd)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return calibrate("--train", "language_model", "--out", "new", cwd=folder), folder / "new"


def test_a_model_lies_beside_what_was_learned_of_it(learned: tuple[Any, Path]):
    done, folder = learned
    assert done.returncode == 0, done.stderr
    said = "written: new; use it as --prune vistog_grouping:new with the model new/model"
    assert said in done.stderr
    assert {path.name for path in folder.parent.iterdir()} == {"new"}
    assert {path.name for path in folder.iterdir()} == {"learned.json", "arrays.npz", "model"}
    record = json.loads((folder / "learned.json").read_text())
    first, own = package.load(MODEL), package.load(folder / "model")
    assert record["model"] == own.describe()
    assert record["learned_from"]["trained_from"] == first.describe()
    assert record["learned_from"]["train"] == "language_model"
    assert first.checksum != own.checksum
    names, own_names = (
        {path.name for path in place.iterdir()} for place in (MODEL, folder / "model")
    )
    assert names - own_names == {"README.md", "training_log.jsonl"}  # of the first model's training
    assert first.describe() == own.describe() | {"checksum": first.checksum}


def test_a_study_of_that_folder_needs_nothing_else(learned: tuple[Any, Path]):
    _, folder = learned
    words = ("--task", "scenes", "--limit", 4, "--keep", 4, "--out", "report")
    prune = ("--prune", f"vistog_grouping:{folder}")
    done = catp_jax("study", folder / "model", *words, *prune, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "vistog_grouping" in done.stdout


def test_the_first_model_is_refused(learned: tuple[Any, Path]):
    _, folder = learned
    words = ("--image", PICTURE, "--prompt", QUESTIONS[0], "--prune", f"vistog_grouping:{folder}")
    done = catp_jax("generate", MODEL, *words, "--keep", 4, cwd=folder.parent)
    refused(done, "what VisToGGrouping has learned is of another model")


def test_an_interrupted_run_writes_the_same_model(
    learned: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cut off in training, and once more behind the writing of the model."""
    whole = training.train
    words = ("--train", "language_model", "--out", "new")

    def interrupted(*given: Any, **options: Any) -> Any:
        whole(*given, **{**options, "stop_at": 1})
        raise ValueError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", interrupted)
        assert calibrate(*words, cwd=tmp_path).returncode == 1
    refused(
        calibrate("--train", "projector", "--out", "new", cwd=tmp_path),
        *("new.work holds a run with train language_model, not projector", "another --out"),
    )
    written = training.write_trained

    def cut_off(*given: Any) -> None:
        written(*given)
        raise ValueError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_trained", cut_off)
        assert calibrate(*words, cwd=tmp_path).returncode == 1
    assert not (tmp_path / "new").exists()
    assert calibrate(*words, cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
    for name in ("model.safetensors", "config.json"):
        mine, other = (place / "model" / name for place in (tmp_path / "new", learned[1]))
        assert mine.read_bytes() == other.read_bytes()
    with (
        np.load(tmp_path / "new" / "arrays.npz") as mine,
        np.load(learned[1] / "arrays.npz") as other,
    ):
        for name in other.files:
            np.testing.assert_array_equal(mine[name], other[name])


WRONG = {
    "a name": (("--train", "qformer"), "'qformer' is not one of"),
    "a method": (
        ("--train", "projector", "--method", "eigen"),
        "--train projector is for vistog_grouping, not for eigen",
    ),
    "a processor": (
        ("--train", "projector", "--processor", MODEL),
        "with its own files; leave out --processor",
    ),
    "a key": (
        ("--train", "projector", "--ignore-config", "text_config.x"),
        "with its own files; leave out --ignore-config",
    ),
    "weights": (
        ("--train", "projector", "--weights", "int8"),
        "with its own files; leave out --weights",
    ),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_trained_is_refused_before_a_model_is_loaded(
    words: tuple[Any, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("catp_jax.api.load", lambda *_, **__: pytest.fail("it was loaded"))
    refused(calibrate(*words, "--out", "new", cwd=tmp_path), said)
    assert not [*tmp_path.iterdir()]


def test_a_model_of_fewer_bits_is_refused(tmp_path: Path):
    words = ("--train", "projector", "--dtype", "bfloat16", "--out", "new")
    refused(
        calibrate(*words, cwd=tmp_path),
        *("training the projector wants all weights in float32", "dtype float32"),
    )
    assert not [*tmp_path.iterdir()]


def test_the_loading_of_a_model_of_another_size_is_refused(tmp_path: Path):
    words = ("--train", "projector", "--out", "new")
    done = calibrate(*words, cwd=tmp_path, model=shallow("mini-blip2-t5"))
    refused(done, "scenes have 128×128 pixels")
    assert not [*tmp_path.iterdir()]
