"""The benchmarks' own arithmetic, and that they run at toy size; figures are not tested."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import catp_table, testbed, trimmed_table
from benchmarks.catp_table import BUDGETS
from catp_jax.study.records import Answer, Cost, Result, Setting
from catp_jax.training.scene_questions import scenes_task

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
METHODS = ("l2", "self_attention", "position", "random")


def result(method: str, keep: int, accuracy: float, half: float = 0.02) -> Result:
    return Result(
        setting=Setting(method, keep),
        accuracy=accuracy,
        low=accuracy - half,
        high=accuracy + half,
        visual_tokens=float(keep),
        agreement=1.0,
        kl=0.0,
        milliseconds=1.0,
        spread=0.0,
        questions=1,
        images=1,
        cost=Cost(cache_bytes=1, prefill_flops=1.0),
        pruners=(),
        seed=1,
        versions={},
    )


def test_rank_correlation_is_spearmans():
    assert catp_table.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert catp_table.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 0.5, 0.5, 2 against 0, 1, 2: covariance 1.5 over √(1.5·2)
    assert catp_table.rank_correlation([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
    assert catp_table.rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_words_follow_the_intervals():
    layers = range(1, 7)
    by = {(f"catp:layers={n}", k): result("catp", k, 0.9) for n in layers for k in BUDGETS}
    by |= {(m, k): result(m, k, 0.9) for m in METHODS for k in BUDGETS}
    words = "\n".join(catp_table.in_words(by, 6))
    assert words.count("no layer votes better here") == 3
    assert "up to 12.1 in the paper: does not agree" in words
    assert "better," not in words

    by |= {("self_attention", k): result("self_attention", k, 0.3) for k in BUDGETS}
    by |= {("catp:layers=2", k): result("catp", k, 0.99) for k in BUDGETS}
    words = "\n".join(catp_table.in_words(by, 6))
    assert words.count("layer 2 votes best here") == 3
    assert "self_attention at 1/2, 1/4, 1/8: better, better, better" in words
    assert "3.00 to 3.00 times its accuracy, up to 12.1 in the paper: agrees" in words
    assert "random at 1/2, 1/4, 1/8: equal, equal, equal" in words


def test_what_trimmed_llama_loses_is_told_by_family():
    """Twenty images, a question of two families about each; what is left out costs the counts."""

    def answers(kept: int) -> tuple[Answer, ...]:
        return tuple(
            Answer(
                id=f"{image} {family}",
                text="",
                score=float(kept == 8 or family != "count"),
                kl=0.0,
                image=image,
                available=8,
                kept=tuple(range(kept)),
                family=family,
            )
            for image in range(20)
            for family in ("attribute", "count")
        )

    whole, half = (
        dataclasses.replace(result("trimmed_llama", 1, 1.0), answers=answers(kept))
        for kept in (8, 2)
    )
    assert trimmed_table.share_kept(half) == 0.25
    (words,) = trimmed_table.in_words({"25%": half}, whole)
    assert "attribute +0.0 [+0.0, +0.0];" in words
    assert "count -100.0 [-100.0, -100.0] (not equal)." in words
    assert "all questions -50.0 [-50.0, -50.0] (not equal)" in words


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


def test_counts_lean_to_the_side_of_their_mean_error():
    """Said three of two, one of one, and no number at all; yes once in three."""
    answers = tuple(
        Answer(id=str(n), text=text, score=0.0, kl=0.0, image=n, available=8, kept=None)
        for n, text in enumerate(["three", " one", "yes"])
    )
    right = {"0": "two", "1": "one", "2": "four"}
    assert testbed.miscounted(answers, right, [0, 1, 2]) == 0.5
    assert np.isnan(testbed.miscounted(answers, right, [2]))
    assert testbed.said_yes(answers, [0, 1, 2]) == pytest.approx(1 / 3)


def test_what_is_known_unseen_is_the_commonest_answer():
    known = testbed.without_looking(scenes_task(scenes=200))
    assert set(known) == {"attribute", "existence", "count", "relation", "reading"}
    assert known["existence"] == pytest.approx(0.5, abs=0.1)
    assert known["attribute"] < 0.35
    assert known["reading"] < 0.35
