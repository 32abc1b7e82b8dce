"""convert.streams: every byte arrives, in order, and no more is under way than was agreed."""

import threading
import time

import ml_dtypes
import numpy as np
import pytest

from catp_jax import leaves
from convert import streams
from convert.rules import IDENTITY, THREE, THREE_BIASES, TRANSPOSE, patches
from convert.streams import ahead, copy

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("wanted", [np.float32, BFLOAT16])
def test_copy_is_what_numpy_copies(dtype: np.dtype, wanted: np.dtype):
    matrix = np.random.default_rng(0).standard_normal((300, 5)).astype(dtype)
    large = np.resize(matrix, (1100, 24))
    views = (matrix, matrix.T, matrix[::2].T, matrix[:, 0], matrix[0, 0, None][0:1], matrix[:0].T)
    forwards = (TRANSPOSE.forward, THREE.forward, lambda x: x.T[:, 500:1030], lambda x: x.T[3:9])
    square = np.resize(matrix, (1536, 24))
    for view in (*views, *(f(large) for f in forwards[2:]), *(f(square) for f in forwards)):
        found = copy(view, np.dtype(wanted))
        assert found.dtype == wanted
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, view.astype(wanted))


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
    monkeypatch.setattr(streams, "READERS", threads)
    monkeypatch.setattr(streams, "AHEAD", 10)
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
    monkeypatch.setattr(streams, "READERS", 3)
    monkeypatch.setattr(leaves, "RUN", 1)
    together = threading.Barrier(3, timeout=20)
    assert len(list(ahead(lambda name: together.wait(), dict.fromkeys("abc", 1)))) == 3


def test_error_of_a_thread_is_raised_and_the_rest_left_undone(monkeypatch):
    monkeypatch.setattr(streams, "READERS", 1)
    monkeypatch.setattr(streams, "AHEAD", 2)
    monkeypatch.setattr(leaves, "RUN", 1)
    begun = []

    def work(name: str) -> None:
        begun.append(name)
        if name == "3":
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        list(ahead(work, {str(number): 1 for number in range(50)}))
    assert len(begun) < 10


@pytest.mark.parametrize("transform", [IDENTITY, TRANSPOSE, THREE, THREE_BIASES, patches(3)])
def test_every_transform_leads_back_by_a_view(transform):
    """And there by one, so that a tensor can be read straight into the parameter."""
    tensor = np.arange(12 * 3 * 2 * 2)
    shapes = {THREE: (12, 12), THREE_BIASES: (144,), TRANSPOSE: (9, 16)}
    if transform.name == patches(3).name:
        tensor = tensor.reshape(12, 3, 2, 2)
    else:
        tensor = tensor.reshape(shapes.get(transform, (144,)))
    assert np.may_share_memory(transform.forward(tensor), tensor)
    parameter = np.zeros_like(transform.forward(tensor), order="C")
    transform.inverse(parameter)[...] = tensor
    np.testing.assert_array_equal(parameter, transform.forward(tensor))
