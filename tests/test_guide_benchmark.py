"""The benchmark of a guide: its arithmetic, and that it runs at toy size."""

import pytest

from benchmarks import guide, testbed
from tests.shallow import shallow
from tests.test_benchmarks import SCENES, last_line, result


def test_a_guide_is_held_against_the_models_own_attention_at_the_same_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(guide, "DRAWS", testbed.DRAWS[:2])
    monkeypatch.setattr(guide, "OWN", ("fastv",))
    monkeypatch.setattr(guide, "SHARES", ("25%",))
    monkeypatch.setattr(guide, "BATCH", 5)  # two, so that the order of the questions shows
    model = str(shallow("mini-llama-vision"))
    guide.main(["--model", model, "--guide", model, *SCENES])
    record = last_line(capsys)
    rows = record["rows"]
    assert {*rows} == {"unpruned", "guide alone", "sgl, 25%", "fastv, 25%", "random, 25%"}
    # one model guides itself: all that it says alone is what it says unpruned
    assert rows["guide alone"]["against unpruned"] == [0, 0, 0]
    assert {"accuracy, count", "against fastv", "against random, count"} <= {*rows["sgl, 25%"]}
    assert 0 < rows["sgl, 25%"]["needed, kept"] < 1
    shares = [one["share"] for one in record["exits"]["25%"]]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1, 0)


def test_above_a_threshold_the_guides_answers_count(monkeypatch: pytest.MonkeyPatch):
    """Four questions; the guide is sure of two, of which it has one right."""
    monkeypatch.setattr(guide, "THRESHOLDS", (0.0, 0.6, 1.0))
    large, small = result([1, 1, 0, 0]).answers, result([1, 0, 1, 0]).answers
    every, some, none = guide.exits(large, small, [0.9, 0.7, 0.6, 0.2])
    assert [one["share"] for one in (every, some, none)] == [1, 0.5, 0]
    assert [one["accuracy"][0] for one in (every, some, none)] == [0.5, 0.25, 0.5]
    assert some["at random"] == 0.5
    assert some["against sgl"][0] == -0.25
    assert none["against sgl"] == (0, 0, 0)
