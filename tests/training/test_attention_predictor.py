"""Training AttentionPredictor's network: its histories, that it learns, and that it resumes."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from catp_jax.pruning.attention_predictor import Network
from catp_jax.training import attention_predictor as training
from catp_jax.training.attention_predictor import Sequences, histories, hit_rates, train_network

ROWS, BLOCKS, STEPS = 5, 6, 30


def sequences(seed: int = 0, number: int = 12, width: int = 7) -> Sequences:
    """Of different lengths, from none to all; each third one has fewer blocks. The highest block
    moves on by one from row to row.
    """
    rng = np.random.default_rng(seed)
    rows = np.zeros((number, width, BLOCKS), np.float32)
    real = np.ones((number, BLOCKS), bool)
    length = np.asarray([(3 * place) % (width + 1) for place in range(number)])
    for place in range(number):
        blocks = BLOCKS - 2 * (place % 3 == 0)
        real[place, blocks:] = False
        for row in range(width - length[place], width):
            rows[place, row, :blocks] = rng.uniform(0.05, 0.2, blocks)
            rows[place, row, (place + row) % blocks] += 0.6
    return Sequences(rows=rows, real=real, length=length)


def test_histories_are_the_rows_before_and_zeros_in_front():
    some = sequences()
    which, back = np.asarray([2, 5, 5, 7, 9]), np.asarray([0, 0, 4, 3, 1])
    found = histories(some, which, back, ROWS)
    assert found.history.shape == (5, ROWS, BLOCKS)
    for place, (one, before) in enumerate(zip(which, back, strict=True)):
        rows = some.rows[one].tolist()
        end = len(rows) - 1 - before
        expected = [rows[n] if n >= 0 else [0.0] * BLOCKS for n in range(end - ROWS, end)]
        np.testing.assert_array_equal(found.history[place], np.asarray(expected, np.float32))
        np.testing.assert_array_equal(found.row[place], np.float32(rows[end]))
        np.testing.assert_array_equal(found.real[place], some.real[one])


def train(folder: Path, some: Sequences, **options: Any) -> Network:
    return train_network(
        some,
        **{"rows": ROWS, "steps": STEPS, "seed": 0, **options},
        folder=folder / "network",
        log=folder / "log.jsonl",
    )


def error(network: Network, some: Sequences) -> float:
    """Of the last rows, by hand."""
    usable = np.flatnonzero(some.length > 1)
    batch = histories(some, usable, np.zeros_like(usable), ROWS)
    off = np.asarray(network(batch.history, batch.real) - batch.row)
    return float((off**2).sum() / np.asarray(batch.real).sum())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, sequences()), folder


def test_the_error_falls_on_others_too(trained: tuple[Network, Path]):
    network, folder = trained
    for some in (sequences(), sequences(1)):
        assert error(network, some) < 0.8 * error(Network.start(jax.random.key(0)), some)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 30]
    assert lines[1]["error"] < 0.8 * error(Network.start(jax.random.key(0)), sequences())


def test_cut_off_and_resumed_it_ends_in_the_same_bits(
    trained: tuple[Network, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", functools.partial(training.train, stop_at=7))
        part = train(tmp_path, sequences())
    whole, resumed = trained[0], train(tmp_path, sequences())
    leaves = zip(*map(jax.tree.leaves, (part, resumed, whole)), strict=True)
    for early, mine, expected in leaves:
        assert bool((early != expected).any())
        np.testing.assert_array_equal(mine, expected)


def test_every_place_of_a_sequence_is_drawn_that_has_a_row_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    drawn, some, place = [], sequences(), training.histories

    def note(*draw: Any) -> training.Histories:
        drawn.append(draw[1:3])
        return place(*draw)

    def watch(stage: Any, *given: Any) -> Network:
        for step in range(20):
            stage.batches(step)
        return given[0]

    monkeypatch.setattr(training, "histories", note)
    monkeypatch.setattr(training, "train", watch)
    train(tmp_path, some)
    places = {pair for draw in drawn for pair in zip(*map(np.ndarray.tolist, draw), strict=True)}
    lengths = some.length.tolist()
    assert places == {(n, back) for n, size in enumerate(lengths) for back in range(size - 1)}


@pytest.mark.parametrize("length", [0, 1])
def test_sequences_of_single_rows_are_refused(length: int, tmp_path: Path):
    some = sequences(number=3)
    some = Sequences(rows=some.rows, real=some.real, length=np.full(3, length))
    with pytest.raises(ValueError, match="no prompt has two rows of attention; give longer"):
        train(tmp_path, some)
    assert hit_rates(Network.start(jax.random.key(0)), some, rows=ROWS, seed=0) == {}


def rates(some: Sequences) -> dict[str, float]:
    return hit_rates(Network.start(jax.random.key(0)), some, rows=ROWS, seed=0)


def test_of_rows_that_repeat_the_row_before_foresees_all():
    rng = np.random.default_rng(0)
    row = rng.permuted(np.tile(np.linspace(0.1, 0.9, 8, dtype=np.float32), (90, 1)), axis=1)
    real = np.ones((90, 8), bool)
    some = Sequences(rows=np.repeat(row[:, None], 4, axis=1), real=real, length=np.full(90, 4))
    found = rates(some)
    assert len(found) == 9
    for share in (0.5, 0.25, 0.125):
        assert found[f"{share:.1%} of the blocks, the row before"] == 1
        assert abs(found[f"{share:.1%} of the blocks, chance"] - share) < 0.15
        assert 0 <= found[f"{share:.1%} of the blocks, network"] < 1


def test_a_share_is_one_of_a_prompts_own_blocks():
    """Half of two blocks is one, however many another prompt has; of the last two rows, one has the
    other block first.
    """
    rows, real = np.zeros((2, 2, 8), np.float32), np.ones((2, 8), bool)
    rows[0, :, :2], real[0, 2:] = [[0.9, 0.1], [0.1, 0.9]], False
    rows[1] = np.linspace(0.1, 0.9, 8)
    found = rates(Sequences(rows=rows, real=real, length=np.full(2, 2)))
    assert found["50.0% of the blocks, the row before"] == 0.5
    assert found["12.5% of the blocks, the row before"] == 0.5
