"""A little of `tests.broken`, which runs large by hand: what is broken is refused in one clear
message or read as transformers reads it.
"""

import pytest

from tests.broken import run


@pytest.mark.parametrize(("kind", "number"), [("processor", 60), ("image", 300), ("prompt", 300)])
def test_what_is_broken_at_random_is_refused_or_read_as_in_transformers(kind: str, number: int):
    counts, faults = run(kind, number, seed=0)
    assert not faults
    assert min(counts["clear"], counts["same"]) > number / 10
