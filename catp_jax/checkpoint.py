"""Orbax checkpoints of any tree of arrays, restored onto whatever shape, dtype and mesh is asked.

    save(path, {"model": model, "opt": opt_state, "step": 7})
    tree = restore(path, abstract)   # the same tree of jax.ShapeDtypeStruct, or of arrays

A tree is stored flat, by the names of its leaves (`model.lm_head.kernel`), so that what reads a
checkpoint need not be built from the classes that wrote it. A folder appears under its name only
when it is whole: Orbax writes beside it and renames.
"""

import contextlib
import dataclasses
import glob
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import Sharding, SingleDeviceSharding
from orbax.checkpoint import type_handlers

from catp_jax import leaves
from catp_jax.messages import listed

Tree = TypeVar("Tree")
Shape = tuple[int, ...]

PIECE = 32 * 2**20  # bytes of an array that are stored, and read, as one
PATTERN = re.compile(r"[*?\[\]\\]")  # a path with these Orbax globs, and finds another or nothing


def save(path: str | Path, tree: Any) -> None:
    """Writes every array of `tree` to the new folder `path`, all of them or nothing.

    Leaves are arrays, NNX variables or Python numbers. Raises ValueError if `path` exists, OSError
    if the disk is full.
    """
    path = _new_folder(path)
    arrays = {name: _array(leaf) for name, leaf in leaves.named(tree).items()}
    if not arrays:
        raise ValueError(f"nothing to save to {path}: the tree has no arrays")
    with _writing(path) as place, _options():
        ocp.save(str(place), arrays)


def save_runs(
    path: str | Path,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    runs: Iterable[Mapping[str, np.ndarray]],
) -> None:
    """Writes arrays, named as `save` would name them, as they come, some at a time.

    For trees larger than the memory of the host. `abstract` says what comes; a run is on the disk
    when the next is asked for. Errors are those of `save`.
    """
    path = _new_folder(path)
    pieces = {name: orbax.SaveArgs(chunk_byte_size=PIECE) for name in abstract}
    tree = orbax.args.PyTreeSave(dict(abstract), save_args=pieces)
    with _writing(path) as place:
        handler = orbax.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=True,
            use_compression=False,
            type_handler_registry=type_handlers.create_type_handler_registry(
                (jax.ShapeDtypeStruct, _Runs(runs))
            ),
        )
        with orbax.Checkpointer(orbax.CompositeCheckpointHandler(pytree=handler)) as writer:
            writer.save(place, orbax.args.Composite(pytree=tree))


class _Runs(type_handlers.NumpyHandler):
    """Takes for the leaves of a tree the arrays of its runs, one run after the other.

    Orbax's own way to save by parts opens the checkpoint for each, and merges them in a time that
    grows with parts × arrays².
    """

    def __init__(self, runs: Iterable[Mapping[str, np.ndarray]]):
        super().__init__(deepcopy_host_arrays=False)
        self._runs = runs

    async def serialize(
        self, values: Any, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        places = {info.name: (info, arg) for info, arg in zip(infos, args or (), strict=True)}
        for run in self._runs:
            wanted, how = zip(*(places.pop(name) for name in run), strict=True)
            for future in await super().serialize(list(run.values()), wanted, how):
                future.result()
        if places:
            raise RuntimeError(f"these arrays never came: {', '.join(places)}")
        return ()


def restore(path: str | Path, abstract: Tree) -> Tree:
    """Reads a checkpoint into a tree like `abstract`, whose leaves say shape, dtype and sharding.

    A leaf without a sharding goes to the first device of this process; each process reads only the
    pieces (of `PIECE` bytes) that its own shards lie in. A dtype other than the saved one converts.
    Raises ValueError if `path` is no whole checkpoint, or if its names or shapes are not those of
    `abstract`, listing all.
    """
    wanted = {name: _struct(leaf) for name, leaf in leaves.named(abstract).items()}
    compare(contents(path), wanted, path)
    arrays: dict[str, Any] = {}
    for run in read_runs(path, wanted):
        arrays |= run
    return leaves.fill(abstract, arrays)


def read_runs(
    path: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[dict[str, Any]]:
    """`read`, some arrays at a time, as `leaves.runs` puts them together; a run is emptied when the
    next is asked for.
    """
    for names in leaves.runs({name: leaves.nbytes(struct) for name, struct in wanted.items()}):
        run = read(path, {name: wanted[name] for name in names})
        yield run
        run.clear()


def read(path: str | Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Arrays of a checkpoint, by name: on the devices that their sharding says, or in host memory
    if they have none. Raises ValueError if it is damaged.
    """
    path = Path(path).absolute()
    asked = {
        name: struct if isinstance(struct.sharding, Sharding) else _Host(struct.shape, struct.dtype)
        for name, struct in wanted.items()
    }
    try:
        with _quiet(), _plain(path) as plain, _options():
            return jax.block_until_ready(ocp.load(str(plain), asked))
    except (MemoryError, RuntimeError):  # the machine's, not the file's
        raise
    except Exception as error:  # Orbax raises bare Exceptions
        raise ValueError(
            f"{path} is damaged: Orbax cannot read it ({_first_line(error)}); "
            "restore another copy of it"
        ) from error


def contents(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array in a checkpoint, by name and abstract: without reading them."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"{path} is not a checkpoint: there is no such folder")
    for file in path.rglob("*"):
        if not (file.is_file() or file.is_dir()):  # Orbax would wait for a pipe
            raise ValueError(
                f"{path} is not a whole checkpoint: {file} is no file that can be read"
            )
    try:
        with _quiet(), _plain(path) as plain:
            tree: Any = ocp.metadata(str(plain)).metadata
        return {
            name: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
            for name, leaf in tree.items()
        }
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a whole Orbax checkpoint written by catp_jax ({_first_line(error)})"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Host:
    """Asks Orbax for an array in host memory."""

    shape: Shape
    dtype: np.dtype


def _array(leaf: Any) -> np.ndarray | jax.Array:
    return leaf if isinstance(leaf, np.ndarray | jax.Array) else jnp.asarray(leaf)


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        leaf = jnp.asarray(leaf)
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, Sharding):
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def compare(
    stored: Mapping[str, jax.ShapeDtypeStruct],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    path: str | Path,
) -> None:
    """Raises ValueError with every name and shape in which a checkpoint differs from a tree."""
    both = sorted(stored.keys() & wanted.keys())
    kinds = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "not asked for": sorted(stored.keys() - wanted.keys()),
        "of another shape": [
            f"{name} (saved {stored[name].shape}, wanted {wanted[name].shape})"
            for name in both
            if stored[name].shape != wanted[name].shape
        ],
    }
    lines = [f"  {len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise ValueError(
            f"the checkpoint {path} does not fit the tree it is restored into; "
            "was it written with another configuration?\n" + "\n".join(lines)
        )


def _new_folder(path: str | Path) -> Path:
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists already; choose another folder or delete it first")
    return path


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """Another path to the same folder, where Orbax would take this one for a pattern."""
    if not PATTERN.search(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="catp-jax-") as folder:
        (link := Path(folder) / "link").symlink_to(path, target_is_directory=True)
        yield link


def _options() -> ocp.Context:
    """Pieces small enough that a process reads little beside its shards.

    Uncompressed: weights shrink by a fifth, and take three times as long.
    """
    options = ocp.Context()
    options.pytree.loading.partial_load = True
    options.array.saving.storage_options.chunk_byte_size = PIECE
    options.array.saving.use_compression = False
    options.memory.deepcopy_host_arrays = False  # every save here ends before it returns
    return options


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Where Orbax is to write `path`. What fails leaves nothing; the disk's errors are OSErrors."""
    with _quiet(), _plain(path.parent) as parent:
        place = parent / PATTERN.sub("_", path.name)
        try:
            yield place
            if place.name != path.name:
                place.rename(parent / path.name)
        except BaseException as error:
            _remove_parts(place)
            if code := re.search(r"os_error_code='(\d+)'", str(error)):
                number = int(code[1])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the user what Orbax says besides raising an error.

    It logs the error's traceback, too. And it gives up at the first array that fails: others still
    end, and complain to an event loop that is closed by then, or that nobody heard them. Since
    nobody can wait for those, they are not listened to from then on.
    """
    logs, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    if not isinstance(hook, _Deaf):
        sys.unraisablehook = _Deaf(hook)
    try:
        yield
    except BaseException:
        logging.getLogger("asyncio").addFilter(_is_heard)
        raise
    else:
        sys.unraisablehook = hook
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@dataclasses.dataclass(frozen=True)
class _Deaf:
    """Passes on to another hook what is not about an array that nobody waits for any more."""

    hook: Callable[[Any], Any]

    def __call__(self, event: Any) -> None:
        said = str(event.exc_value)
        if said != "Event loop is closed" and "error while reading array index" not in said:
            self.hook(event)


def _is_heard(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _remove_parts(path: Path) -> None:
    """Removes the unfinished folders beside `path`, until no write under way brings them back."""
    quiet = 0
    for _ in range(100):
        left = [
            folder
            for folder in path.parent.glob(f"{glob.escape(path.name)}.*")
            if ".orbax-checkpoint-tmp" in folder.name
        ]
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        quiet = 0 if left else quiet + 1
        if quiet == 5:
            return
        time.sleep(0.02)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
