"""The benchmarks' own arithmetic, and that they run at toy size; figures are not tested."""

import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import catp_jax
from benchmarks import catp_table, testbed, trimmed_table
from benchmarks.catp_table import BUDGETS
from catp_jax.study.records import Answer, Cost, Result, Setting
from catp_jax.training.scene_questions import scenes_task
from tests.shallow import ASSETS, shallow

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FAMILIES = {"attribute", "existence", "count", "relation", "reading"}


def result(right: Sequence[float]) -> Result:
    """A setting's answers, one about each of as many images: how right each is."""
    answers = tuple(
        Answer(id=f"{n}", text="", score=float(score), kl=0.0, image=n, available=8, kept=None)
        for n, score in enumerate(right)
    )
    return Result(
        setting=Setting("l2", 1),
        accuracy=float(np.mean(right)),
        low=0.0,
        high=1.0,
        visual_tokens=1.0,
        agreement=1.0,
        kl=0.0,
        milliseconds=1.0,
        spread=0.0,
        questions=len(right),
        images=len(right),
        cost=Cost(cache_bytes=1, prefill_flops=1.0),
        pruners=(),
        seed=1,
        versions={},
        answers=answers,
    )


def told_checksums() -> dict[str, dict[str, str]]:
    """Of which weights each recorded result is, by model and file."""
    told: dict[str, dict[str, str]] = {}
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        record = json.loads(path.read_text())
        models = record.get("models") or {}
        if isinstance(record.get("model"), str) and "checksum" in record:
            models = {record["model"]: record}
        for model, one in models.items():
            told.setdefault(one.get("name", model), {})[path.name] = one["checksum"]
    return told


def test_recorded_results_are_of_the_weights_that_ship():
    told = told_checksums()
    assert set(told) >= {f"scenes-{kind}" for kind in ("llama-vision", "blip2-opt", "blip2-t5")}
    for name, files in told.items():
        if (ASSETS / name).exists():
            checksum = catp_jax.load(ASSETS / name, generation_config=False).checksum
            assert files == dict.fromkeys(files, checksum), name


def test_rank_correlation_is_spearmans():
    assert catp_table.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert catp_table.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 0.5, 0.5, 2 against 0, 1, 2: covariance 1.5 over √(1.5·2)
    assert catp_table.rank_correlation([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
    assert catp_table.rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def first(share: float) -> np.ndarray:
    """Of a hundred questions the first so many are answered."""
    return np.arange(100) < 100 * share


def test_words_follow_the_paired_differences():
    """Layer 1 is best by one question, layer 6 far worse; the baselines answer others."""
    layers = dict(enumerate([0.80, 0.79, 0.79, 0.79, 0.79, 0.30], 1))
    by = {(f"catp:layers={n}", k): result(first(x)) for n, x in layers.items() for k in BUDGETS}
    by |= {("self_attention", k): result(first(0.1)) for k in BUDGETS}
    by |= {("l2", k): result(first(0.3)) for k in BUDGETS}
    by |= {("random", k): result(1 - first(0.7)) for k in BUDGETS}  # as many, but others
    by |= {("position", k): result(first(0.38)) for k in BUDGETS}  # what CATP has, and 8 more
    words = "\n".join(catp_table.in_words(by, 6))
    told = "layer 1 votes best here (layers that are no worse, as far as can be told: 2, 3, 4, 5)"
    assert words.count(told) == 3
    assert "against self_attention at 1/2, 1/4, 1/8: better, better, better" in words
    assert "3.00 to 3.00 times its accuracy, up to 12.1 in the paper: agrees" in words
    assert "against l2 at 1/2, 1/4, 1/8: equal, equal, equal" in words
    assert "up to 6.6 in the paper: does not agree" in words
    assert "against random at 1/2, 1/4, 1/8: equal, equal, equal" in words
    assert "against position at 1/2, 1/4, 1/8: worse, worse, worse" in words


def test_what_trimmed_llama_loses_is_told_by_family():
    """Two hundred images, a question of each family; what is left out costs all counts, and one in
    forty of the relations.
    """

    def answers(kept: int) -> tuple[Answer, ...]:
        def is_right(family: str, image: int) -> bool:
            lost = {"attribute": False, "count": True, "relation": image % 40 == 0}
            return kept == 8 or not lost[family]

        return tuple(
            Answer(
                id=f"{image} {family}",
                text="",
                score=float(is_right(family, image)),
                kl=0.0,
                image=image,
                available=8,
                kept=tuple(range(kept)),
                family=family,
            )
            for image in range(200)
            for family in ("attribute", "count", "relation")
        )

    whole, half = (dataclasses.replace(result([1.0]), answers=answers(kept)) for kept in (8, 2))
    assert trimmed_table.share_kept(half) == 0.25
    (words,) = trimmed_table.in_words({"25%": half}, whole)
    assert "attribute +0.0 [+0.0, +0.0], as good;" in words
    assert "count -100.0 [-100.0, -100.0], worse;" in words
    assert "relation -2.5 [-5.0, -0.5], worse" in words
    assert "all questions -34.2 " in words
    barely = tuple(
        dataclasses.replace(one, score=float(n != 0)) for n, one in enumerate(whole.answers[::3])
    )
    other = [dataclasses.replace(half, answers=some) for some in (barely, whole.answers[::3])]
    (words,) = trimmed_table.in_words({"25%": other[0]}, other[1])
    assert "-0.5 [-1.5, +0.0], as good" in words


SCENES = ["--scenes", "2"]


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a benchmark on scenes prints last, as strict JSON."""
    out = capsys.readouterr().out

    def no_number(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads(out.splitlines()[-1], parse_constant=no_number)


def test_the_testbed_runs_and_two_models_of_one_name_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(testbed, "DRAWS", testbed.DRAWS[:2])
    monkeypatch.setattr(testbed, "methods_for", lambda sites: ["random", "fastv"])
    model = shallow("mini-llama-vision")
    testbed.main([str(model), *SCENES, "--shares", "6%", "--journals", str(tmp_path)])
    record = last_line(capsys)
    (found,) = record["models"].values()
    assert record["task"]["scenes"] == 2
    assert {*found["families"]} == FAMILIES
    kept = found["families"]["count"]["kept"]
    assert {*kept} == {f"{method}, 6%" for method in ("fastv", "random", "oracle", "anti")}
    assert kept["random, 6%"]["to random"] == [0, 0, 0]
    assert {*found["families"]["count"]["leaning"]} == {"what", "unpruned", *kept}
    assert found["needed, kept"]["anti, 6%"] <= found["needed, kept"]["oracle, 6%"]

    other = tmp_path / "other" / model.name
    other.mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"and .*other.* are both called"):
        testbed.main([str(model), str(other)])


def test_blind_images_are_grey_and_as_large():
    whole = scenes_task(scenes=2).examples
    for one, dark in zip(whole, testbed.blind(whole), strict=True):
        assert dark.image.shape == one.image.shape
        assert np.unique(dark.image).size == 1 < np.unique(one.image).size
        assert dark.question == one.question


def test_the_tables_of_both_papers_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trimmed_table, "RATIOS", (0.25,))
    monkeypatch.setattr(trimmed_table, "PARITY", ("50%",))
    trimmed_table.main(["--model", str(shallow("mini-llama-vision")), *SCENES])
    assert last_line(capsys)["settings"]["unpruned"]["kept"] == 1

    monkeypatch.setattr(catp_table, "BUDGETS", (8,))
    others = (*catp_table.BASELINES, "catp:image_weights", "oracle")
    monkeypatch.setattr(catp_table, "OTHERS", others)
    catp_table.main(["--model", str(shallow("mini-blip2-opt")), *SCENES, "--num-beams", "2"])
    (found,) = last_line(capsys)["models"].values()
    assert {"catp:layers=1, keep 8", "oracle, keep 8", "random, keep 8"} <= {*found["accuracy"]}
    assert {*found["paired"]["catp:image_weights − catp:layers=1"]} == {"1/4"}
    with pytest.raises(SystemExit, match="is no BLIP-2 or InstructBLIP"):
        catp_table.main(["--model", str(shallow("mini-llama-vision")), *SCENES])


def test_pruning_overhead_runs_at_toy_size():
    run = subprocess.run(
        [
            sys.executable,
            BENCHMARKS / "pruning_overhead.py",
            "--size",
            "toy",
            "--rounds",
            "2",
            "--methods",
            "catp",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert {row["keep"] for row in figures["saving"]} == {16, 8, 4}
    saved = [row["flops_saved_percent"] for row in figures["saving"]]
    assert 0 < saved[0] < saved[1] < saved[2]
    assert all(row["flops_percent"] < 2 for row in figures["cost"])


def gpu_suite(out: Path, *options: str) -> dict:
    """What the suite prints last, at toy size."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--smoke", "--out", out, *options]
    run = subprocess.run(
        command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures == json.loads(out.read_text())
    return figures


@pytest.mark.usefixtures("with_torch")
def test_the_gpu_suite_runs_at_toy_size_and_holds_programs_against_their_floor(tmp_path: Path):
    figures = gpu_suite(tmp_path / "results.json", "--minutes", "20")
    assert figures["not_reached"] == []
    assert [row["error"] for row in figures["rows"] if "error" in row] == []
    rows = {row["program"]: row for row in figures["rows"]}

    opt = rows["blip2-opt-2.7b decode, batch 2"]
    # bfloat16, two layers: products and biases, norms; the head is the embedding; the last norm
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    weights = 2 * (2 * layer + 256 * 32 + 2 * 32)
    # 32 queries, 64 text tokens, 64 new; beside keys and values: what is valid, seen, which, where
    cache = 2 * (2 * 2 * 2 * (32 + 64 + 64) * 32)
    assert weights + cache < opt["floor_bytes"] < weights + cache + 2 * (5 * 96 + 5 * 64 + 8) + 64
    assert opt["flops"] == 2 * 2 * (2 * (4 * 32**2 + 2 * 32 * 64 + 2 * 160 * 32) + 256 * 32)
    seconds = max(
        opt["floor_bytes"] / figures["card"]["bandwidth"],
        opt["flops"] / figures["card"]["flops_per_s"],
    )
    assert opt["ratio"] == pytest.approx(opt["ms"] / (1000 * seconds))

    # a prompt's beams share its cache: a second one adds a tail alone
    beams = rows["blip2-opt-2.7b decode, batch 2, 2 beams"]["floor_bytes"]
    tails = 2 * (2 * 2 * 2 * 64 * 32)
    assert tails <= beams - opt["floor_bytes"] < tails + 2 * 64 * 8 + 64
    assert rows["Llama-3.2-11B-Vision decode, batch 2, 50 % kept"]["kept"] == 10
    assert rows["blip2-opt-2.7b largest"]["batch"] == 3
    assert "token_ratio" in rows["blip2-opt-2.7b, batch 2"]


def test_the_gpu_suite_says_what_did_not_fit_into_its_time(tmp_path: Path):
    figures = gpu_suite(tmp_path / "results.json", "--minutes", "0")
    assert figures["rows"] == []
    assert "catp-jax: Llama-3.2-11B-Vision prefill, batch 2" in figures["not_reached"]
    assert "transformers, sdpa: blip2-opt-2.7b, batch 2" in figures["not_reached"]


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize("model", ["opt", "llama"])
def test_all_who_are_compared_give_the_same_tokens(model: str):
    command = [sys.executable, "-m", "benchmarks.vs_peers", "--size", "toy", "--model", model]
    options = ["--batches", "2", "--new", "5", "--rounds", "2", "--without"]
    run = subprocess.run(
        [*command, *options, "transformers, compiled", "keras-hub"],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["skipped"] == {}
    same = {row["implementation"]: row["same_tokens"] for row in figures["rows"]}
    assert same == {"catp-jax": 1, "transformers": 1}
    assert all(row["prefill_ms"] > 0 for row in figures["rows"])


def test_tables_of_the_pages_are_what_the_results_say():
    from benchmarks import performance

    for path in performance.FILES:
        assert performance.filled(path.read_text()) == path.read_text(), (
            f"{path.name}: python -m benchmarks.performance"
        )


def test_a_page_is_filled_between_its_marks_alone(monkeypatch: pytest.MonkeyPatch):
    from benchmarks import performance

    prose = "word " * 30
    monkeypatch.setattr(performance, "PARTS", {"a": lambda: "| x |\n| y |", "b": lambda: prose})
    page = "one\n<!-- a -->\nold\n<!-- end -->\ntwo\n<!-- b -->\n<!-- end -->\nthree\n"
    out = performance.filled(page)
    assert out.startswith("one\n<!-- a -->\n\n| x |\n| y |\n\n<!-- end -->\ntwo\n")
    assert max(map(len, out.splitlines())) <= 100
    assert performance.filled(out) == out


def test_to_which_side_answers_lean():
    """Said three of two, one of one, and no number at all; yes once in three."""
    answers = tuple(
        Answer(id=str(n), text=text, score=0.0, kl=0.0, image=n, available=8, kept=None)
        for n, text in enumerate(["three", " one", "yes"])
    )
    right = {"0": "two", "1": "one", "2": "four"}
    assert testbed.off_by(answers, right) == (0.5, pytest.approx(1 / 3))
    assert testbed.off_by(answers[2:], right) == (None, 1)
    assert testbed.said_yes(answers, right) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_what_is_guessed_is_the_commonest_answer():
    known = testbed.guessed(scenes_task(scenes=200))
    assert {*known} == FAMILIES
    assert known["existence"] == pytest.approx(0.5, abs=0.1)
    assert known["attribute"] < 0.35
    assert known["reading"] < 0.35


COMMANDS = sorted(
    path.stem for path in BENCHMARKS.glob("*.py") if "ArgumentParser(" in path.read_text()
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_can_be_read(name, monkeypatch, capsys):
    """A bare percent sign in a help text prints the parser's own insides."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert told.startswith("usage: ")
    assert "option_strings" not in told
