"""The benchmarks' own arithmetic, and that they run at toy size; figures are not tested."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from catp_jax.study.results import Result, Setting

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
METHODS = ("l2", "self_attention", "position", "random")


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("catp_table", BENCHMARKS / "catp_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(method: str, keep: int, accuracy: float, half: float = 0.02) -> Result:
    figures = dict.fromkeys(
        ("prefill_flops", "prefill_ms", "prefill_spread", "token_ms", "token_spread", "pruner")
    )
    counts = dict.fromkeys(("questions", "images", "cache_bytes", "seed"), 1)
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
        versions={},
        **figures,
        **counts,
    )


def test_rank_correlation_is_spearmans(table: ModuleType):
    assert table.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert table.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 0.5, 0.5, 2 against 0, 1, 2: covariance 1.5 over √(1.5·2)
    assert table.rank_correlation([5, 5, 9], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
    assert table.rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_words_follow_the_intervals(table: ModuleType):
    layers = range(1, 7)
    by = {(f"catp:layers={n}", k): result("catp", k, 0.9) for n in layers for k in table.BUDGETS}
    by |= {(m, k): result(m, k, 0.9) for m in METHODS for k in table.BUDGETS}
    words = "\n".join(table.in_words(by, 6))
    assert words.count("no layer votes better here") == 3
    assert "up to 12.1 in the paper: does not agree" in words
    assert "better," not in words

    by |= {("self_attention", k): result("self_attention", k, 0.3) for k in table.BUDGETS}
    by |= {("catp:layers=2", k): result("catp", k, 0.99) for k in table.BUDGETS}
    words = "\n".join(table.in_words(by, 6))
    assert words.count("layer 2 votes best here") == 3
    assert "self_attention at 1/2, 1/4, 1/8: better, better, better" in words
    assert "3.00 to 3.00 times its accuracy, up to 12.1 in the paper: agrees" in words
    assert "random at 1/2, 1/4, 1/8: equal, equal, equal" in words


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
