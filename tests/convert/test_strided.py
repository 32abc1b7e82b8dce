"""convert.strided: any view of a file is read as NumPy sees it, and no byte besides."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import strided

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
START = 24  # bytes before the array in its file
VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.T,
    "rows": lambda x: x[2:7].T,
    "columns": lambda x: x[:, 3:8],
    "columns, transposed": lambda x: x[:, 3:8].T,
    "both": lambda x: x[1:12:1, 2:9].T,
    "one number": lambda x: x[3:4, 5:6],
    "nothing": lambda x: x[:, 4:4],
    "three, split": lambda x: x.reshape(3, 4, 10).transpose(2, 0, 1)[2:7],
    "three, heads": lambda x: x.reshape(3, 4, 10).transpose(2, 0, 1)[:, :, 1:3],
    "patches": lambda x: x.reshape(12, 5, 2).reshape(12, -1).T[:, 4:9],
    "flat": lambda x: x.reshape(-1)[7:90],
    "every other": lambda x: x[:, ::2],
    "deep": lambda x: x.reshape(2, 3, 2, 5, 2)[:, 1:, :, 2:4].transpose(4, 0, 3, 1, 2),
}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where the file was read, from and to."""
    found, preadv = [], os.preadv

    def count(file, pieces, position: int) -> int:
        found.append((position, position + sum(piece.nbytes for piece in pieces)))
        return preadv(file, pieces, position)

    monkeypatch.setattr(os, "preadv", count)
    return found


@pytest.mark.parametrize("page", [0, 9, 4096])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("dtype", "wanted"), [("<f4", "<f4"), (BFLOAT16, "<f4"), ("<f2", BFLOAT16)]
)
def test_every_view_is_read(
    tmp_path: Path, monkeypatch, spans, dtype, wanted, view: str, page: int
):
    monkeypatch.setattr(strided, "PAGE", page)
    monkeypatch.setattr(strided, "ROWS", 3)
    monkeypatch.setattr(strided, "RUN", 40)
    whole = np.random.default_rng(0).standard_normal((12, 10)).astype(dtype)
    part = VIEWS[view](whole)
    (tmp_path / "x").write_bytes(bytes(START) + whole.tobytes())  # nothing behind it
    start = START + part.ctypes.data - whole.ctypes.data
    out = np.empty(part.shape, wanted)
    with (tmp_path / "x").open("rb") as file:
        strided.read(file, start, part, out)
    np.testing.assert_array_equal(out, part.astype(wanted))
    read = [byte for first, last in spans for byte in range(first, last)]
    assert len(read) == len({*read})
    addresses = np.zeros(whole.shape, np.int64)
    addresses.reshape(-1)[:] = START + whole.itemsize * np.arange(whole.size)
    shown = {*np.ravel(VIEWS[view](addresses))}
    needed = {byte + more for byte in shown for more in range(whole.itemsize)}
    assert {*read} >= needed
    if page == 0:
        assert {*read} == needed


def test_bytes_between_rows_are_left_out_where_a_page_or_more(tmp_path: Path, spans):
    whole = np.arange(40 * 6000, dtype=np.float32).reshape(40, 6000)
    whole.tofile(tmp_path / "x")
    for columns, alike in (3000, True), (5500, False):
        spans.clear()
        part = whole[:, :columns].T
        out = np.empty(part.shape, np.float32)
        with (tmp_path / "x").open("rb") as file:
            strided.read(file, 0, part, out)
        np.testing.assert_array_equal(out, part)
        read = sum(last - first for first, last in spans)
        assert (read == part.nbytes) == alike
        assert len(spans) == (40 if alike else 1)


def test_a_file_system_that_gives_less_is_asked_again(tmp_path: Path, monkeypatch):
    whole = np.arange(120, dtype=np.float32).reshape(12, 10)
    whole.tofile(tmp_path / "x")
    monkeypatch.setattr(os, "preadv", lambda file, pieces, position: 1)
    out = np.empty((10, 12), np.float32)
    with (tmp_path / "x").open("rb") as file:
        strided.read(file, 0, whole.T, out)
    np.testing.assert_array_equal(out, whole.T)


def test_a_file_that_ends_too_early_is_named(tmp_path: Path):
    (tmp_path / "x").write_bytes(bytes(470))
    out = np.empty((10, 12), np.float32)
    with (tmp_path / "x").open("rb") as file, pytest.raises(ValueError, match="x ended within"):
        strided.read(file, 0, np.zeros((12, 10), np.float32).T, out)
