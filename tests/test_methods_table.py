"""The table of methods, pairs of them and claims: arithmetic, and that they run at toy size."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import fidelity, fronts, methods_table, pairs, performance, testbed, told_methods
from catp_jax.contract import Site
from catp_jax.study.records import GpuCost
from tests.shallow import shallow
from tests.test_benchmarks import SCENES, last_line, result


def test_the_table_of_methods_has_every_form_and_what_a_study_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(methods_table, "DRAWS", testbed.DRAWS[:2])
    monkeypatch.setattr(methods_table, "methods_for", lambda sites: ["random", "fastv", "csp"])
    monkeypatch.setattr(methods_table, "FORMS", {"elastic_cache:evicts": {Site.CACHE}})
    model = shallow("mini-llama-vision")

    def on_gpu(gpu: str, network: object, given: list, new_slots: int) -> list[GpuCost]:
        return [GpuCost(gpu, 30, 20, 10 + len(pruners)) for pruners, _ in given]

    monkeypatch.setattr(methods_table, "on_gpu", on_gpu)
    asked = ["--shares", "25%", "--prune", "think", "--full", "--gpu", "h100"]
    methods_table.main([str(model), *SCENES, *asked])
    (found,) = last_line(capsys)["models"].values()
    moved = {name: row["gpu"]["token_bytes"] for name, row in found["rows"].items()}
    assert moved.pop("unpruned") == 10
    assert {*moved.values()} == {11}
    assert {*found["full"]} == {"fastv", "csp", "elastic_cache:evicts", "think"}
    for full in found["full"].values():
        assert full["other answers"] == 0
        assert full["against unpruned"] == [0, 0, 0]
        assert full["accuracy"] == found["rows"]["unpruned"]["accuracy"]
        assert full["KL, nats"] < 1e-6
    named = ("fastv", "csp", "elastic_cache:evicts", "think", "oracle", "anti")
    assert {*found["rows"]} == {
        "unpruned",
        "random, 2 seeds, 25%",
        "random:site=cache, 2 seeds, 25%",
        *(f"{name}, 25%" for name in named),
    }
    assert found["late"]
    for name in ("csp", "elastic_cache:evicts", "think"):
        assert "against random:site=cache, attribute" in found["rows"][f"{name}, 25%"]
    assert "against random:site=cache" not in found["rows"]["fastv, 25%"]
    row = found["rows"]["csp, 25%"]
    assert row["cache"] < 0.6
    assert {"accuracy", "accuracy, attribute", "against random", "against unpruned"} <= {*row}


def test_methods_are_held_against_random_tokens_at_their_own_place():
    sites = frozenset({Site.ENTRY, Site.LAYER, Site.CACHE})
    for method, where in {
        "fastv:rows=all": "random:site=layer",
        "k_norm": "random:site=cache",
        "eigen:/some/where": "random:site=cache",
        "l2": None,
        "oracle": None,
        "random:site=cache": None,
    }.items():
        assert methods_table.baseline(method, sites) == where
    sites = frozenset({Site.CROSS, Site.CACHE})
    assert methods_table.baseline("k_norm", sites) is None
    assert methods_table.baseline("k_norm:site=cache", sites) == "random:site=cache"


def rows_of_two_places() -> dict[str, dict]:
    there = {"against random:site=cache": (0.0, 0.0, 0.0)}
    return {
        setting: {"cache": cache, "accuracy, attribute": (right, right - 0.1, right + 0.1), **more}
        for setting, cache, right, more in (
            ("unpruned", 1.0, 0.9, {}),
            ("fastv, 50%", 0.6, 0.8, {}),
            ("fastv, 25%", 0.3, 0.5, {}),
            ("fastv:rows=all, 25%", 0.3, 0.4, {}),
            ("k_norm, 25%", 0.3, 0.3, {}),
            ("k_norm:site=cache, 25%", 0.3, 0.2, there),
            ("csp:ratio=0.1, 25%", 0.3, 0.6, there),
            ("csp, 25%", 0.3, 0.7, there),
            ("attention_predictor, 25%", 1.0, 0.9, there),
            ("oracle, 25%", 0.3, 0.9, {}),
            ("random, 5 seeds, 25%", 0.3, 0.4, {}),
            ("random:site=cache, 5 seeds, 25%", 0.3, 0.5, {}),
        )
    }


def test_pictures_have_each_method_where_it_prunes_and_know_their_figures(tmp_path: Path):
    rows, path = rows_of_two_places(), tmp_path / "a.png"
    before, after = fronts.panels(rows)
    assert [line.name for line in before.lines] == ["fastv", "k_norm", "random, 5 seeds"]
    names = ["k_norm:site=cache", "csp", "random:site=cache, 5 seeds"]
    assert sorted(line.name for line in after.lines) == sorted(names)
    (fastv, *_) = before.lines
    assert fastv.places == (30.0, 60.0)
    assert [value.mean for value in fastv.values] == [0.5, 0.8]
    assert not fronts.is_current(rows, path)
    fronts.draw(rows, path)
    assert fronts.is_current(rows, path)
    rows["csp, 25%"]["cache"] = 0.4
    assert not fronts.is_current(rows, path)


def test_a_full_budget_is_one_row_and_one_for_each_that_changes_answers(
    monkeypatch: pytest.MonkeyPatch,
):
    def kept(other: int, kl: float) -> dict:
        right, apart = (0.9, 0.8, 1.0), (-0.1 * other, -0.2 * other, 0.0)
        return {
            "other answers": other,
            "accuracy": right,
            "against unpruned": apart,
            "KL, nats": kl,
        }

    full = {"csp": kept(0, 0.01), "zipvl": kept(1, 0.2), "fastv": kept(0, 0.04)}
    found = {"rows": {"unpruned": {}}, "full": full}
    monkeypatch.setattr(told_methods, "methods_of", lambda name: found)
    same, other = told_methods.methods_at("llama").splitlines()[2:]
    assert same.startswith("| 2 of 3 methods, 100% | 90 ± 10 |  |  | +0.0 [+0.0, +0.0] | 0.04 |")
    assert other.startswith("| `zipvl`, 100% | 90 ± 10 |  |  | -10.0 [-20.0, +0.0] | 0.20 |")


def test_the_pictures_are_of_the_results():
    for name, path in performance.PICTURES.items():
        assert fronts.is_current(told_methods.methods_of(name)["rows"], path)
        assert path.stat().st_size < 100_000


def test_learned_methods_are_called_without_their_folder():
    assert methods_table.label("eigen:/some/where") == "eigen"
    assert methods_table.label("attention_predictor:runs/a:refresh=3") == (
        "attention_predictor:refresh=3"
    )
    assert methods_table.label("fastv:rows=all") == "fastv:rows=all"


def test_pairs_are_held_against_the_best_single_method_on_other_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pairs, "TOKENS", ("csp",))
    monkeypatch.setattr(pairs, "BUDGETS", {"25%": {"think": ("75%", "33.3%")}})
    pairs.main([str(shallow("mini-llama-vision")), *SCENES])
    found = last_line(capsys)["budgets"]["25%"]
    assert {*found["rows"]} == {"csp", "csp and think"}  # which take the same, as far as can be
    assert found["too large"] == ["think"]
    assert found["best"] == {"alone": "csp", "pair": "csp and think"}
    assert found["rows"]["csp"]["to best"] == [0, 0, 0]
    left, right = pairs.halves(result([1, 0, 1, 0, 1]).answers)
    assert [one.image for one in left] == [0, 2, 4]
    assert [one.image for one in right] == [1, 3]


@pytest.mark.parametrize(
    ("gain", "better", "kept"),
    [
        ((0.1, 0.02, 0.2), "agrees", "agrees"),
        ((-0.005, -0.02, 0.01), "undecided", "agrees"),
        ((0.0, 0.0, 0.0), "the same", "agrees"),
        ((0.01, 0.0, 0.02), "undecided", "agrees"),
        ((-0.03, -0.05, 0.01), "undecided", "undecided"),
        ((-0.03, -0.05, -0.01), "disagrees", "undecided"),
        ((-0.1, -0.2, -0.05), "disagrees", "disagrees"),
    ],
)
def test_a_claim_is_judged_by_the_whole_interval(
    gain: tuple[float, float, float], better: str, kept: str
):
    claim = fidelity.Claim("m", "says", "m, 25%", "random")
    assert claim.verdict(gain) == better
    whole = dataclasses.replace(claim, is_kept=True)
    assert whole.verdict(gain) == kept
    harsher = dataclasses.replace(whole, is_harsher=True).verdict(gain)
    assert harsher == ("undecided" if kept == "disagrees" else kept)


def test_a_claim_for_the_other_way_is_turned_around():
    rows = {"m, 25%": {"against n": [0.2, 0.1, 0.3], "against n, count": [-0.2, -0.3, -0.1]}}
    claim = fidelity.Claim("m", "n is better", "m, 25%", "n", is_reversed=True)
    assert claim.found(rows) == (-0.2, -0.3, -0.1)
    assert dataclasses.replace(claim, family="count").found(rows) == (0.2, 0.1, 0.3)
    assert claim.found({}) is None
