"""A hundred folders broken at random: each ends in one message, or loads as what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("with_torch")
def test_folders_that_are_broken_at_random_end_clearly():
    command = [sys.executable, "-m", "tests.convert.mutations", "--number", "120"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    bad = ("traceback", "hang", "elsewhere", "converted changed")
    assert not [name for name in counts if name.endswith(bad)], done.stdout
    assert "Traceback" not in done.stderr  # Orbax's threads go on when it has given up
    assert sum(count for name, count in counts.items() if name.endswith("clear")) > 80
    assert sum(counts.values()) == 120
