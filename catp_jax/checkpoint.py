"""Orbax checkpoints of any tree of arrays, restored onto whatever shape, dtype and mesh is asked.

    save(path, {"model": model, "opt": opt_state, "step": 7})
    tree = restore(path, abstract)   # the same tree of jax.ShapeDtypeStruct, or of arrays

A tree is stored flat, by the names of its leaves (`model.lm_head.kernel`), so that what reads a
checkpoint need not be built from the classes that wrote it. A folder appears under its name only
when it is whole: Orbax writes beside it and renames.
"""

import contextlib
import glob
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import Sharding, SingleDeviceSharding

from catp_jax import leaves
from catp_jax.messages import listed

Tree = TypeVar("Tree")

PIECE = 32 * 2**20  # bytes of an array that are stored, and read, as one
PATTERN = re.compile(r"[*?\[\]\\]")  # a path with these is a pattern to Orbax
ARRAY = "/zarr.json"  # how the key of an array's description ends
DICT = 2  # Orbax's word for a key of a dictionary


def save(path: str | Path, tree: Any) -> None:
    """Writes every array of `tree` to the new folder `path`, all of them or nothing.

    Leaves are arrays, NNX variables or Python numbers. Raises ValueError if `path` exists, OSError
    if the disk is full.
    """
    path = _new_folder(path)
    arrays = {name: _array(leaf) for name, leaf in leaves.named(tree).items()}
    if not arrays:
        raise ValueError(f"nothing to save to {path}: the tree has no arrays")
    import orbax.checkpoint.experimental.v1 as ocp

    options = ocp.Context()
    options.array.saving.storage_options.chunk_byte_size = PIECE
    # which saves a fifth, and takes three times as long
    options.array.saving.use_compression = False
    options.memory.deepcopy_host_arrays = False  # nothing changes them before this returns
    with _writing(path) as place, options:
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
    import orbax.checkpoint as orbax

    path = _new_folder(path)
    pieces = {name: orbax.SaveArgs(chunk_byte_size=PIECE) for name in abstract}
    tree = orbax.args.PyTreeSave(dict(abstract), save_args=pieces)
    with _writing(path) as place:
        handler = orbax.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=True,
            use_compression=False,
            type_handler_registry=_registry(runs),
        )
        with orbax.Checkpointer(orbax.CompositeCheckpointHandler(pytree=handler)) as writer:
            writer.save(place, orbax.args.Composite(pytree=tree))


def _registry(runs: Iterable[Mapping[str, np.ndarray]]) -> Any:
    """How Orbax is to write the leaves of a tree: as the arrays of the runs, one after the other.

    Its own way to save by parts (`experimental.v1.partial`) opens the checkpoint for each, and
    merges them in the end. 560 arrays in 4 parts, 1 GB, take 3.4 s of CPU (4.2 here); 900 arrays in
    60 parts, as an 11B has them, but of 0.3 GB, take 21 s (3 here), most of them in the end.
    """
    from orbax.checkpoint import type_handlers

    class Runs(type_handlers.NumpyHandler):
        async def serialize(
            self, values: Any, infos: Sequence[Any], args: Sequence[Any] | None = None
        ) -> Sequence[Any]:
            places = {info.name: (info, arg) for info, arg in zip(infos, args or (), strict=True)}
            for run in runs:
                wanted, how = zip(*(places.pop(name) for name in run), strict=True)
                for future in await super().serialize(list(run.values()), wanted, how):
                    future.result()
            if places:
                raise RuntimeError(f"these arrays never came: {', '.join(places)}")
            return ()

    handler = Runs(deepcopy_host_arrays=False)
    return type_handlers.create_type_handler_registry((jax.ShapeDtypeStruct, handler))


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
    sizes = {name: leaves.nbytes(struct) for name, struct in wanted.items()}
    for run in leaves.ahead(lambda name: read(path, name, wanted[name]), sizes):
        arrays |= run
    return leaves.fill(abstract, arrays)


def read(path: str | Path, name: str, struct: jax.ShapeDtypeStruct) -> np.ndarray | jax.Array:
    """An array of a checkpoint: on the devices that its sharding says, or in host memory if it has
    none. Raises ValueError if it is damaged.

    By tensorstore, in which Orbax writes: what Orbax itself reads takes as long, and of damage it
    complains from threads that it no longer waits for.
    """
    with _database(path) as database:
        store = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {**database, "path": f"{name}/"},
                "fill_missing_data_reads": False,
            },
            open=True,
        ).result()
        return leaves.placed(
            struct, lambda index: store[index].read().result().astype(struct.dtype, copy=False)
        )


def contents(path: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array in a checkpoint, by name and abstract: without reading them."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(f"{path} is not a checkpoint: there is no such folder")
    for file in path.rglob("*"):
        if not (file.is_file() or file.is_dir()):  # tensorstore would wait for a pipe
            raise ValueError(
                f"{path} is not a whole checkpoint: {file} is no file that can be read"
            )
    with _database(path) as database:
        store = ts.KvStore.open(database).result()
        keys = [key.decode() for key in store.list().result()]
        arrays = {
            key.removesuffix(ARRAY): json.loads(store.read(key).result().value)
            for key in sorted(keys)
            if key.endswith(ARRAY)
        }
        metadata = json.loads((Path(database["base"]["path"]) / "_METADATA").read_bytes())
        keys = [key for one in metadata["tree_metadata"].values() for key in one["key_metadata"]]
        if {(key["key"], key["key_type"]) for key in keys} != {(name, DICT) for name in arrays}:
            raise ValueError("its metadata are of other arrays than it has")
        return {
            name: jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["data_type"]))
            for name, array in arrays.items()
        }


@contextlib.contextmanager
def _database(path: str | Path) -> Iterator[dict[str, Any]]:
    """Where tensorstore finds a checkpoint's arrays. What goes wrong there is a ValueError."""
    try:
        with _plain(Path(path).absolute()) as plain:
            folders = [manifest.parent for manifest in plain.glob("*/manifest.ocdbt")]
            if not folders:
                raise ValueError("it has no arrays")
            yield {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folders[0]}/"}}
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the machine's, not the file's
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or not a whole checkpoint: it cannot be read "
            f"({_first_line(error)}); restore another copy of it"
        ) from error


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
    """Another path to the same folder, where Orbax or tensorstore would not take this one as it is
    written.
    """
    if not PATTERN.search(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="catp-jax-") as folder:
        (link := Path(folder) / "link").symlink_to(path, target_is_directory=True)
        yield link


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

    It logs the error's traceback, too. And it gives up at the first array that cannot be written:
    the others of its run end later and complain, each with a traceback, to an event loop that is
    closed by then or, as nobody asked for them, to asyncio's log. Nobody can wait for them, so from
    then on they are not listened to.
    """
    logs, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)

    def heard(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            hook(event)

    sys.unraisablehook = heard
    try:
        yield
        sys.unraisablehook = hook
        logs[1].setLevel(levels[1])
    finally:
        logs[0].setLevel(levels[0])


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
