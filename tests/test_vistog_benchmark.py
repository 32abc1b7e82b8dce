"""`benchmarks.vistog`: its arithmetic, what it trains, and that it runs; figures are not tested."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import told_methods, vistog
from catp_jax.pruning.vistog_grouping import Grouping
from catp_jax.training.blip2_start import QUERIES, initialise
from catp_jax.training.mini_blip2 import write
from catp_jax.training.scene_questions import FAMILIES
from catp_jax.training.scenes import make_scene
from catp_jax.training.scenes_blip2 import know_places, make_tokenizer
from catp_jax.training.tokenizer import make_blip2_processor
from tests.training.test_scenes_blip2 import toy_config

NAMES = [f"vistog_grouping, {name}" for name in ("grouping", "projector", "language_model")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained BLIP-2 of few layers."""
    model = initialise(toy_config("t5"), 0)
    know_places(model.vision_model)
    tokenizer = make_tokenizer("t5", [make_scene("train", number) for number in range(6)])
    out = tmp_path_factory.mktemp("model") / "toy"
    write(model, make_blip2_processor(tokenizer, model.config.vision.image_size, QUERIES), out)
    return out


def test_it_trains_each_kind_once_a_seed_and_tells_all_apart(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """With trainings that return at once, at a rate that is best by what validation says."""
    asked: list[tuple[str, Any, int, float]] = []

    def train_grouping(model: Any, bank: Any, keep: int, work: Path, **options: Any) -> Any:
        seed = options.get("seed", 0)
        asked.append((options["trained"], keep, seed, options["model_peak"]))
        assert work.parent == tmp_path
        centres = np.random.default_rng(seed).normal(size=(keep, bank.features.shape[-1]))
        return Grouping.around(jnp.asarray(centres, jnp.float32)), model

    def train_reading(model: Any, bank: Any, method: Any, work: Path, **options: Any) -> Any:
        asked.append((options["trained"], method, options["seed"], options["model_peak"]))
        return model

    monkeypatch.setattr(vistog, "train_grouping", train_grouping)
    monkeypatch.setattr(vistog, "train_reading", train_reading)
    monkeypatch.setattr(vistog, "DRAWS", 2)
    words = ["--model", folder, "--work", tmp_path, "--keeps", 4, "--seeds", 2, "--scenes", 4]
    vistog.main([*map(str, words), "--train-scenes", "4", "--rates", "0.1", "0.2"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rate = record["settings"]["model_peak"]
    shares = record["settings"]["validation by rate"]
    assert {*shares} == {"0.1", "0.2"}
    assert shares[str(rate)] == max(shares.values())
    assert [one[3] for one in asked[:2]] == [0.1, 0.2]
    names = ["grouping", "projector", "language_model", "language_model"]
    assert [one[0] for one in asked[2:]] == 2 * names
    assert [one[2] for one in asked[2:]] == [0] * 4 + [1] * 4
    assert {one[3] for one in asked[2:]} == {rate}
    plain = ["nearest_centroid", "pool", "random, 2 seeds"]
    named = [f"{name}, 4" for name in (*plain, *NAMES, "nearest_centroid, language_model")]
    assert [*record["rows"]] == ["unpruned", *named]
    for name, row in record["rows"].items():
        for family in ("", *(f", {family}" for family in FAMILIES)):
            mean, low, high = row[f"accuracy{family}"]
            assert 0 <= low <= mean <= high <= 1
            if name != "unpruned":
                whole = record["rows"]["unpruned"][f"accuracy{family}"][0]
                assert row[f"against unpruned{family}"][0] == pytest.approx(mean - whole, abs=2e-5)
    row = record["rows"][f"{NAMES[2]}, 4"]
    assert len(row["by seed"]) == 2
    assert np.mean(row["by seed"]) == pytest.approx(row["accuracy"][0], abs=2e-5)
    assert {"against nearest_centroid", "against nearest_centroid, language_model"} <= {*row}
    same = record["rows"]["nearest_centroid, language_model, 4"]["against nearest_centroid"]
    assert same == [0, 0, 0]


def test_images_are_drawn_with_all_their_questions():
    """Three images, in all of one a question is right: intervals of whole images."""
    judges = vistog.Judges.__new__(vistog.Judges)
    judges.images = np.array([0, 0, 1, 1, 2, 2])
    judges.families = np.array(["count", "attribute"] * 3)
    scores = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    mean, low, high = judges.estimate(scores)
    assert mean == pytest.approx(2 / 3)
    assert (low, high) == (0, 1)
    apart = vistog.figures(judges, scores, {"m": np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])})
    assert apart["against m, count"] == (0, 0, 0)
    assert apart["against m, attribute"][0] == pytest.approx(2 / 3)
    assert apart["against m"][0] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("along", "is_told"), [(0.5, True), (0.6, True), (0.61, False)])
def test_a_projector_that_adds_nothing_is_told(along: float, is_told: bool):
    rows = {
        "vistog_grouping, grouping, 8": {"accuracy": (0.6, 0.55, 0.65)},
        "vistog_grouping, projector, 8": {"accuracy": (along, along - 0.02, along + 0.02)},
    }
    said = told_methods.no_better(rows, 8)
    assert bool(said) == is_told
    assert not is_told or f"{100 * along:.0f} ± 2 % against 60 ± 5 %" in said
