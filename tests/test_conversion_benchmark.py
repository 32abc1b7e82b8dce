"""benchmarks/conversion.py runs at toy size and cleans up; figures are not tested."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "conversion.py"


def test_conversion_runs_at_toy_size(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    options = ["--size", "toy", "--rounds", "1", "--folder", tmp_path / "disk"]
    options += ["--steps", "to_orbax, verified", "load_converted", "--out", tmp_path / "out.json"]
    run = subprocess.run(
        [sys.executable, BENCHMARK, *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    assert figures["files"] == 5
    assert figures["largest_tensor_bytes"] == 128264 * 64 * 2
    assert [row["step"] for row in figures["steps"]] == ["to_orbax, verified", "load_converted"]
    for row in figures["steps"]:
        assert 0 < row["rss_bytes"] < row["bound_bytes"]
        assert row["is_within_bound"]
        assert row["of_copy"] > 0
    assert list((tmp_path / "disk").iterdir()) == []
