"""The benchmark of GPU programs, at toy size: its floor, counted by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from catp_jax import targets

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json
from benchmarks.gpu_programs import step_of
from tests.random_mllama import CONFIG
print(json.dumps([step_of(CONFIG, "h100", 2, percent) for percent in (100, 50)]))
"""


@pytest.mark.skipif(
    not targets.is_available(),
    reason="JAX's CUDA compiler (jax-cuda13-pjrt, jax-cuda13-plugin) is not installed",
)
def test_a_step_is_held_against_its_weights_and_its_cache():
    # in a process of its own: shapes that are checked at each call take no abstract parameters
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    whole, half = json.loads(run.stdout)

    # bfloat16: two products for keys and values only in self-attention, as those of images are kept
    mlp, square, narrow, head = 3 * 24 * 32, 2 * 24 * 24, 2 * 24 * 12, 24 * 50
    weights = 2 * (4 * (mlp + square) + 2 * narrow + head)
    slots = 2 * (64 + 64) + 2 * 40  # of two self- and two cross-attention layers, a sample
    cache = 2 * (2 * slots * 3 * 4) * 2
    # beside them norms, gates, positions and validity
    assert weights + cache < whole["floor"] < 1.1 * (weights + cache)
    assert whole["kept"] == 2 * half["kept"] == 40
    saved = 2 * (2 * (2 * 20) * 3 * 4) * 2
    assert saved < whole["floor"] - half["floor"] < 1.15 * saved
    assert whole["moved"] > whole["floor"]
    assert whole["graphs"] >= 1
