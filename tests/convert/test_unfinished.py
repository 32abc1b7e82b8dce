"""Output folders: never a half that looks whole, however a run ends."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from catp_jax import leaves
from convert import folders
from tests.convert.folders import (
    hf_folder,
)
from tests.convert.test_reader import assert_same
from tests.parity.tiny import tiny


def test_existing_folder_is_refused_and_kept(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"out exists already; choose another folder or delete"):
        convert.to_orbax(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(ValueError, match=r"there is no folder .*deep"):
        convert.to_orbax(folder, tmp_path / "deep" / "out")


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch):
    folder = hf_folder(tmp_path / "hf")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match=r"out could not be written: No space left on device"):
        convert.to_orbax(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says to each process that it found no torch; the tests hide it."""
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@pytest.mark.parametrize("step", ["to_orbax", "to_hf"])
@pytest.mark.usefixtures("quiet")
def test_write_that_the_system_refuses_leaves_nothing(tmp_path: Path, step: str):
    """A limit on the size of files stands for a full disk: some writes succeed, others do not."""
    source = hf_folder(tmp_path / "hf")
    if step == "to_hf":
        convert.to_orbax(source, tmp_path / "converted")
        source = tmp_path / "converted"
    before = sorted(path.name for path in tmp_path.iterdir())
    script = f"""
import resource, sys
from pathlib import Path
from convert.command import run
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    run(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), to_hf={step == "to_hf"})
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "out could not be written: File too large; nothing of it was kept" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(leaves, "RUN", 1000)
    with pytest.raises(KeyboardInterrupt):
        convert.to_orbax(hf_folder(tmp_path / "hf"), tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


KILLED = """
import os, signal, convert
from catp_jax import leaves
leaves.RUN = 5000
def die(done, total):
    if done {when} total:
        os.kill(os.getpid(), signal.SIGKILL)
convert.{step}({source!r}, {out!r}, progress=die)
"""


def kill(step: str, source: Path, out: Path, when: str) -> None:
    """Converts in a process that is killed: when all is read ("=="), or at the first news ("<")."""
    script = KILLED.format(step=step, source=str(source), out=str(out), when=when)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_run_after_a_killed_one_starts_over_cleanly(tmp_path: Path):
    source = hf_folder(tmp_path / "hf")
    kill("to_orbax", source, tmp_path / "out", "<")
    (left,) = tmp_path.glob("out.unfinished-*")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is what an interrupted conversion left"):
        convert.load(left)
    with pytest.raises(ValueError, match="is not a folder"):
        convert.load(tmp_path / "out")
    convert.to_orbax(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    model, _ = convert.load(tmp_path / "out")
    assert_same(model, tiny("gqa")[1])


def test_leftovers_are_removed_unless_they_are_anothers(tmp_path: Path):
    with folders.new_folder(tmp_path / "out") as living:
        assert folders.remove_leftovers(tmp_path / "out") == []
        assert living.is_dir()
    halves = ("out.unfinished-0123abcd", "other.unfinished-0123abcd", "out.unfinished-mine")
    for name in halves:
        (tmp_path / name).mkdir()
    assert folders.remove_leftovers(tmp_path / "out") == [tmp_path / halves[0]]
    assert {path.name for path in tmp_path.iterdir()} == {"out", *halves[1:]}


def test_a_whole_folder_that_was_not_renamed_does_not_load_and_goes(tmp_path: Path):
    """Killed between the last two steps."""
    source = hf_folder(tmp_path / "hf")
    convert.to_orbax(source, tmp_path / "first")
    half = (tmp_path / "first").rename(tmp_path / "out.unfinished-0123abcd")
    with pytest.raises(ValueError, match="is what an interrupted conversion left"):
        convert.load(half)
    again = source.rename(tmp_path / "hf.unfinished-0123abcd")
    with pytest.raises(ValueError, match="is what an interrupted conversion left"):
        convert.load_hf(again)
    convert.to_orbax(again.rename(source), tmp_path / "out")
    assert not half.exists()


@pytest.mark.usefixtures("quiet")
def test_termination_leaves_nothing(tmp_path: Path):
    source = hf_folder(tmp_path / "hf")
    script = f"""
import os, signal
from pathlib import Path
from convert import command, converted
def to_orbax(source, out, dtype, progress, *rest):
    def end(done, total):
        os.kill(os.getpid(), signal.SIGTERM)
    return convert(source, out, dtype, end, *rest)
convert, converted.to_orbax = converted.to_orbax, to_orbax
command.run(Path({str(source)!r}), Path({str(tmp_path / "out")!r}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (128 + signal.SIGTERM, "")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("step", ["to_orbax", "to_hf"])
def test_what_a_killed_run_leaves_does_not_load(tmp_path: Path, step: str):
    source = hf_folder(tmp_path / "hf")
    if step == "to_hf":
        convert.to_orbax(source, tmp_path / "converted")
        source = tmp_path / "converted"
    kill(step, source, tmp_path / "out", "==")
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob("out.unfinished-*")
    with pytest.raises(ValueError, match="is what an interrupted conversion left"):
        convert.load(left)
    for step_on in (convert.to_hf, convert.to_orbax):
        with pytest.raises(ValueError, match="is what an interrupted conversion left"):
            step_on(left, tmp_path / "next")
