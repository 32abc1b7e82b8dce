"""catp_jax.leaves: every array comes, in order, and no more is under way than was agreed."""

import threading
import time

import numpy as np
import pytest

from catp_jax import leaves
from catp_jax.leaves import ahead


def test_results_come_in_order_and_are_let_go(monkeypatch):
    monkeypatch.setattr(leaves, "RUN", 3)
    sizes = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 1}
    before: dict = {}
    found = []
    for run in ahead(lambda name: (time.sleep(0.02 / sizes[name]), name.upper())[1], sizes):
        assert before == {}
        found.append(dict(run))
        before = run
    assert found == [{"a": "A", "b": "B"}, {"c": "C"}, {"d": "D"}, {"e": "E"}]


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_under_way_is_bounded(monkeypatch, threads: int):
    """Counted where it happens: begun by a thread, and not yet given back by the caller."""
    monkeypatch.setattr(leaves, "READERS", threads)
    monkeypatch.setattr(leaves, "AHEAD", 10)
    monkeypatch.setattr(leaves, "RUN", 1)
    costs = [*np.random.default_rng(0).integers(1, 8, 60).tolist(), 50, 50, 3, 3, 50]
    sizes = {str(number): cost for number, cost in enumerate(costs)}
    lock, now, highest, most = threading.Lock(), 0, 0, 0

    def work(name: str) -> int:
        nonlocal now, highest
        with lock:
            now += sizes[name]
            highest = max(highest, now)
        time.sleep(0.001)
        return sizes[name]

    results = []
    for run in ahead(work, sizes):
        (cost,) = run.values()
        results.append(cost)
        most = max(most, now - cost)
        time.sleep(0.001)
        with lock:
            now -= cost
    assert results == costs
    assert highest <= 50 + 10
    assert most > 0  # others were begun while the caller had one


def test_several_threads_work_at_a_time(monkeypatch):
    monkeypatch.setattr(leaves, "READERS", 3)
    monkeypatch.setattr(leaves, "RUN", 1)
    together = threading.Barrier(3, timeout=20)
    assert len(list(ahead(lambda name: together.wait(), dict.fromkeys("abc", 1)))) == 3


def test_error_of_a_thread_is_raised_and_the_rest_left_undone(monkeypatch):
    monkeypatch.setattr(leaves, "READERS", 1)
    monkeypatch.setattr(leaves, "AHEAD", 2)
    monkeypatch.setattr(leaves, "RUN", 1)
    begun = []

    def work(name: str) -> None:
        begun.append(name)
        if name == "3":
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        list(ahead(work, {str(number): 1 for number in range(50)}))
    assert len(begun) < 10
