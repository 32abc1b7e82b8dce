"""convert.streams: every byte arrives, in order, and no more is under way than was agreed."""

import threading
import time
from collections import deque

import ml_dtypes
import numpy as np
import pytest

from convert import streams
from convert.rules import IDENTITY, THREE, THREE_BIASES, TRANSPOSE, patches
from convert.streams import ahead, copy, padded, parts

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("wanted", [np.float32, BFLOAT16])
def test_copy_is_what_numpy_copies(dtype: np.dtype, wanted: np.dtype):
    matrix = np.random.default_rng(0).standard_normal((300, 5)).astype(dtype)
    for view in (matrix, matrix.T, matrix[::2].T, matrix[:, 0], matrix[0, 0, None][0:1]):
        found = copy(view, np.dtype(wanted))
        assert found.dtype == wanted
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, view.astype(wanted))


def test_rows_are_padded():
    matrix = padded(3, 512, BFLOAT16)
    assert matrix.shape == (3, 512)
    assert matrix.strides == (1024 + 64, 2)


def test_runs_cost_no_more_than_the_limit():
    assert parts([3, 3, 3, 9, 1, 1, 1, 1], lambda item: item, 6) == [[3, 3], [3], [9], [1, 1, 1, 1]]
    assert parts([], lambda item: item, 6) == []


def test_results_come_in_order_and_are_let_go(monkeypatch):
    monkeypatch.setattr(streams, "AHEAD", 100)
    runs = [[1, 2], [3], [], [4, 5, 6]]
    before: list = []
    found = []
    for run in ahead(runs, lambda item: (time.sleep(0.02 / item), -item)[1], lambda item: item):
        assert before == []
        found.append(list(run))
        before = run
    assert found == [[(item, -item) for item in run] for run in runs]


@pytest.mark.parametrize("behind", [0, 1, 2])
@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_under_way_is_bounded(monkeypatch, threads: int, behind: int):
    """Counted where it happens: begun by a thread, and not yet given back by the caller."""
    monkeypatch.setattr(streams, "READERS", threads)
    monkeypatch.setattr(streams, "AHEAD", 10)
    costs = [*np.random.default_rng(0).integers(1, 8, 60).tolist(), 50, 50, 3, 3, 50]
    lock, now, highest, most = threading.Lock(), 0, 0, 0

    def work(cost: int) -> int:
        nonlocal now, highest
        with lock:
            now += cost
            highest = max(highest, now)
        time.sleep(0.001)
        return cost

    had: deque[int] = deque()
    results = []
    for run in ahead([[cost] for cost in costs], work, lambda cost: cost, behind):
        assert all(cost == same for cost, same in run)
        had.append(sum(cost for cost, _ in run))
        results += [cost for cost, _ in run]
        most = max(most, now - sum(had))
        time.sleep(0.001)
        if len(had) > behind:
            with lock:
                now -= had.popleft()
    assert results == costs
    assert now == sum(had)
    assert highest <= 50 + 10
    assert most > 0  # others were begun while the caller had one


def test_several_threads_work_at_a_time(monkeypatch):
    monkeypatch.setattr(streams, "READERS", 3)
    together = threading.Barrier(3, timeout=20)
    runs = [[0], [1], [2]]
    assert len(list(ahead(runs, lambda item: together.wait(), lambda item: 1))) == 3


def test_error_of_a_thread_is_raised_and_the_rest_left_undone(monkeypatch):
    monkeypatch.setattr(streams, "READERS", 1)
    monkeypatch.setattr(streams, "AHEAD", 2)
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        list(ahead([[item] for item in range(50)], work, lambda item: 1))
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
