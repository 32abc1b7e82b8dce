"""GPU programs on shallow models of real widths, compiled for an H100: how near their floor."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from catp_jax import targets

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json
from benchmarks.gpu_programs import row_of
from benchmarks.programs import LLAMA, OPT, T5, Case

cases = {
    "toy": (Case(LLAMA, "step", 2), "toy"),
    "one": (Case(LLAMA, "step", 1), "shallow"),
    "int8": (Case(LLAMA, "step", 1, weights="int8"), "shallow"),
    "many": (Case(LLAMA, "step", 32), "shallow"),
    "half": (Case(LLAMA, "step", 32, 50), "shallow"),
    "beams": (Case(LLAMA, "step", 8, beams=5), "shallow"),
    "opt": (Case(OPT, "step", 16), "shallow"),
    "t5": (Case(T5, "step", 64), "shallow"),
    "fused": (Case(OPT, "step", 16, beams=5, fused=True), "shallow"),
    "csp": (Case(LLAMA, "step", 32, 25, method="csp"), "shallow"),
    "think": (Case(LLAMA, "step", 32, 25, method="think"), "shallow"),
    "eigen": (Case(LLAMA, "step", 32, 25, method="eigen"), "shallow"),
    "attention_predictor": (
        Case(LLAMA, "step", 32, 25, method="attention_predictor"), "shallow"
    ),
}
NOT = ("toy", "int8")
print(json.dumps({
    name: row_of(case, "h100", size, with_whole_sums=case.method == "k_norm" and name not in NOT)
    for name, (case, size) in cases.items()
}))
"""

pytestmark = pytest.mark.skipif(
    not targets.is_available(),
    reason="JAX's CUDA compiler (jax-cuda13-pjrt, jax-cuda13-plugin) is not installed",
)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    # in a process of its own: shapes that are checked at each call take no abstract parameters
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_the_floor_is_the_weights_that_a_step_reads_and_its_cache(rows):
    # bfloat16: of images' keys and values the products are not read, nor is the embedding
    mlp, square, narrow, head = 3 * 32 * 48, 2 * 32 * 32, 2 * 32 * 16, 32 * 256
    weights = 2 * (4 * (mlp + square) + 2 * narrow + head)
    text, visual = 64 + 64, rows["toy"]["kept"]
    cache = 2 * 2 * (2 * text + 2 * visual) * 2 * 8 * 2
    # beside them norms, gates, positions, what is seen
    assert weights + cache < rows["toy"]["floor"] < 1.1 * (weights + cache)
    assert rows["toy"]["moved"] > rows["toy"]["floor"]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("one", 1.06),
        ("many", 1.06),
        ("half", 1.06),
        ("opt", 1.08),
        ("t5", 1.08),
        ("beams", 1.10),
        ("fused", 1.13),  # 1.07 at full depth
    ],
)
def test_a_step_moves_little_more_than_its_floor(rows, name: str, most: float):
    assert 1 <= rows[name]["ratio_whole_sums"] < most


def test_what_pruning_takes_from_the_cache_is_not_moved(rows):
    many, half = rows["many"], rows["half"]
    slots = 32 * 8 * 128 * 2 * 2  # bytes of a slot in a layer, at batch 32
    fewer = 6432 - 3232  # multiples of 32; of each, its number and whether it is valid
    assert many["cache"] - half["cache"] == fewer * (slots + 32 * (4 + 1))
    assert many["moved"] - half["moved"] >= 0.95 * (many["floor"] - half["floor"])


@pytest.mark.parametrize("method", ["csp", "think", "eigen"])
def test_what_leaves_a_layers_cache_is_not_moved(rows, method: str):
    """Tokens of each head, channels of keys, directions of keys and values."""
    many, pruned = rows["many"], rows[method]
    saved = many["cache"] - pruned["cache"]
    left = {"csp": 0.32, "think": 0.58, "eigen": 0.32}[method]  # text has a cache of its own
    assert pruned["cache"] < left * many["cache"]
    assert many["moved"] - pruned["moved"] >= 0.95 * saved


def test_a_network_that_foresees_attention_moves_more_than_it_spares(rows):
    """AttentionPredictor as released: its products read what it chose, but the network's arrays
    weigh more. What it reads of the cache is tested with it.
    """
    assert rows["attention_predictor"]["moved"] > 2 * rows["many"]["moved"]


def test_beams_read_their_prompt_once(rows):
    beams = rows["beams"]
    assert beams["cache"] < 1.1 * 8 * 2 * (6432 + 4 * (64 + 5 * 64)) * 8 * 128 * 2


def test_narrow_weights_are_read_narrow(rows):
    one, int8 = rows["one"], rows["int8"]
    head = 2 * 4096 * 128256  # which stays
    assert int8["moved"] - head < 0.56 * (one["moved"] - head)


def test_a_step_is_one_cuda_graph_and_copies_no_cache(rows):
    for name in ("one", "many", "half", "beams", "opt", "t5", "fused"):
        assert rows[name]["graphs"] == 1, name
        assert rows[name]["temporaries"] < 0.1 * rows[name]["cache"] + 60e6, name
