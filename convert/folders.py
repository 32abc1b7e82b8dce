"""Output folders: written beside their name, renamed when whole, so no half is taken for one.

A folder that is being written has a name by which it is refused when somebody tries to load it, and
what makes it a model comes last. The run has it locked, which ends with its process: the next run
towards the same name removes what is no longer locked.
"""

import contextlib
import fcntl
import glob
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from catp_jax.files import is_there

HALF = re.compile(r"\.unfinished-[0-9a-f]{8}$")  # the name of a folder that is being written

SIDE_FOLDERS = (
    "qformer_tokenizer",  # the second tokenizer of InstructBLIP's processor
    "additional_chat_templates",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `path` if all goes well and vanishes if not.

    What killed runs left of theirs is removed first. Raises ValueError if `path` exists, or if it
    cannot be written (a full disk, say).
    """
    path = path.absolute()
    check_new(path)
    remove_leftovers(path)
    half = path.parent / f"{path.name}.unfinished-{uuid.uuid4().hex[:8]}"
    try:
        half.mkdir()
        with _locked(half):
            yield half
            sync(half)
            half.rename(path)
            _sync_file(path.parent)
    except BaseException as error:
        for _ in range(2):  # what a write still under way brings back, too
            shutil.rmtree(half, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(
                f"{path} could not be written: {error.strerror or error}; nothing of it was kept"
            ) from error
        raise


def check_new(path: Path) -> None:
    """Raises ValueError if a folder `path` cannot be made: said before anything is read for it."""
    path = path.absolute()
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already; choose another folder or delete it first")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be made: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be made: {error.strerror or error}") from error


def remove_leftovers(path: Path) -> list[Path]:
    """Removes the folders that killed runs left when they were to write `path`; which they were."""
    path = path.absolute()
    removed = []
    for half in sorted(path.parent.glob(f"{glob.escape(path.name)}.unfinished-*")):
        if not HALF.search(half.name):
            continue
        try:
            with _locked(half) as is_ours:
                if not is_ours:
                    continue  # a living run's
                shutil.rmtree(half)
        except OSError:
            continue  # somebody else's, or gone by now
        removed.append(half)
    return removed


def sync(folder: Path) -> None:
    """Returns when all that is in a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_file(path)


def _sync_file(path: Path) -> None:
    """The same for a file, or the names in a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def forget(folder: Path) -> None:
    """Takes what is in a folder out of the system's memory, so that it is read from the disk."""
    sync(folder)  # what is not yet on the disk stays
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder; False if another process has it, or the file system knows no locks."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(file)


def refuse_unfinished(folder: Path) -> None:
    """Raises ValueError if the folder is what an interrupted run left."""
    if HALF.search(folder.name):
        raise ValueError(
            f"{folder} is what an interrupted conversion left; delete it and convert again"
        )


def copy_side_files(source: Path, out: Path, besides: Sequence[str] = ()) -> None:
    """Copies config, tokenizer, processor and the like, byte by byte, see `side_files`."""
    for path in side_files(source, besides):
        copy = out / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def side_files(source: Path, besides: Sequence[str] = ()) -> list[Path]:
    """The files of a model that are no weights; not what is hidden, other folders than
    `SIDE_FOLDERS`, or the names `besides`.

    Raises ValueError for what is there and cannot be read, such as a link to nothing.
    """
    found = []
    for path in sorted(source.iterdir()):
        if path.name in SIDE_FOLDERS and path.is_dir():
            found += side_files(path)
        elif (
            not path.is_dir()
            and path.suffix not in WEIGHTS
            and not path.name.startswith(".")
            and path.name not in (*besides, "adapter_config.json")  # merged by now
            and is_there(path)
        ):
            found.append(path)
    return found
