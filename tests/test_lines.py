"""A file that only grows: one process writes it, and a kill leaves it whole."""

import os
import signal
import subprocess
import sys
import time

import pytest

from catp_jax.lines import JsonLines

WHAT, OPENING = "a file of numbers", '{"n": '


def opened(path, rows=None):
    """The file, and its rows in a list."""
    found = [] if rows is None else rows
    return JsonLines(path, WHAT, OPENING, lambda number, row: found.append(row))


def numbers(path):
    opened(path, rows := [])
    return [row["n"] for row in rows]


def test_rows_come_back_and_more_are_added(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    first = opened(path)
    first.append({"n": 0, "text": "é\n\ud800"})
    first.release()
    opened(path).append({"n": 1})
    opened(path, rows := [])
    assert rows == [{"n": 0, "text": "é\n\ud800"}, {"n": 1}]
    assert numbers(path) == [0, 1]  # a reader waits for nobody


def test_of_two_writers_one_is_refused_before_it_has_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = (opened(path) for _ in range(2))
    first.append({"n": 0})
    with pytest.raises(ValueError, match="another process is writing"):
        second.append({"n": 1})
    first.release()
    with pytest.raises(ValueError, match="another process has written"):
        second.claim()
    assert numbers(path) == [0]


def test_a_file_without_a_row_is_not_left(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = opened(path)
    lines.claim()
    assert path.read_bytes() == b""
    lines.release()
    assert not path.exists()
    lines.append({"n": 0})
    lines.release()
    assert numbers(path) == [0]


def test_half_a_row_that_a_full_disk_left_is_taken_away(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    lines = opened(path)
    lines.append({"n": 0})
    write = os.write

    def full(file, data):
        monkeypatch.setattr(os, "write", refuse)
        return write(file, data[:4])

    def refuse(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        lines.append({"n": 1})
    monkeypatch.setattr(os, "write", write)
    lines.append({"n": 2})
    assert numbers(path) == [0, 2]


def test_a_file_that_vanished_or_shrank_is_not_filled_up(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\n')
    lines = opened(path)
    path.write_text('{"n": 0}\n')
    with pytest.raises(ValueError, match="has written"):
        lines.append({"n": 2})
    path.unlink()
    with pytest.raises(ValueError, match="has written"):
        lines.append({"n": 2})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        opened(tmp_path / "rows.jsonl").claim()


def test_a_file_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        opened(tmp_path / "notes" / "rows.jsonl").claim()


def test_a_writer_that_is_killed_leaves_whole_rows_and_its_lock_goes(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys, itertools; from pathlib import Path; from catp_jax.lines import JsonLines; "
        f"rows = []; read = lambda number, row: rows.append(row); "
        f"lines = JsonLines(Path(sys.argv[1]), {WHAT!r}, {OPENING!r}, read); "
        "[lines.append({'n': n, 'x': 'x' * 9999}) for n in itertools.count(len(rows))]"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        before, end = path.stat().st_size if path.exists() else 0, time.monotonic() + 30
        while not path.exists() or path.stat().st_size < before + 200_000:
            assert time.monotonic() < end, "nothing is written"
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    found = numbers(path)
    assert found == list(range(len(found)))
    assert len(found) > 50
