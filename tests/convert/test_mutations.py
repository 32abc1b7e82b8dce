"""A few hundred folders broken at random: each ends in one message, or loads as what it says."""

import pytest

from tests.convert import mutations


# Orbax gives up at the first array that it cannot read; the others end later, and find no loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_folders_that_are_broken_at_random_end_clearly():
    told: list[str] = []
    counts = mutations.run(150, seed=0, tell=told.append)
    wrong = ("traceback", "hang", "elsewhere", "converted changed")
    assert not [line for line in told if any(word in line for word in wrong[:3])], told
    assert all(counts[name] == 0 for name in ("elsewhere", "converted changed")), told
    assert sum(count for name, count in counts.items() if name.endswith("clear")) > 100
