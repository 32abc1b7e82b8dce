"""Output folders: written beside their name, renamed when whole, so no half is taken for one.

A folder that is being written holds a file named UNFINISHED; whatever a killed run leaves behind
still has it, and is refused when somebody tries to load it.
"""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = "UNFINISHED"

SIDE_FOLDERS = ("qformer_tokenizer",)  # the second tokenizer of InstructBLIP's processor
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `path` if all goes well and vanishes if not.

    Raises ValueError if `path` exists, or if it cannot be written (a full disk, say).
    """
    path = path.absolute()
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already; choose another folder or delete it first")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be made: there is no folder {path.parent}")
    half = path.parent / f"{path.name}.unfinished-{uuid.uuid4().hex[:8]}"
    try:
        half.mkdir()
        (half / UNFINISHED).write_text("what an interrupted conversion left; delete this folder\n")
        yield half
        (half / UNFINISHED).unlink()
        half.rename(path)
    except BaseException as error:
        shutil.rmtree(half, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(
                f"{path} could not be written: {error.strerror or error}; nothing of it was kept"
            ) from error
        raise


def refuse_unfinished(folder: Path) -> None:
    """Raises ValueError if the folder is what an interrupted run left."""
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"{folder} is what an interrupted conversion left; delete it and convert again"
        )


def copy_side_files(source: Path, out: Path, besides: tuple[str, ...] = ()) -> list[str]:
    """Copies config, tokenizer, processor and the like, byte by byte; not weights or other folders
    than `SIDE_FOLDERS`.

    `besides` names files to leave out. Returns the names copied.
    """
    copied = []
    for path in sorted(source.iterdir()):
        if path.name in SIDE_FOLDERS and path.is_dir():
            (out / path.name).mkdir()
            copied += [f"{path.name}/{name}" for name in copy_side_files(path, out / path.name)]
            continue
        is_side = path.is_file() and path.suffix not in WEIGHTS and path.name not in besides
        if is_side and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
            copied.append(path.name)
    return copied
