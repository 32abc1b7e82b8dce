"""catp_jax.checkpoint: what goes in comes out, onto the shape, dtype and mesh that is asked."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from catp_jax import checkpoint, leaves
from catp_jax.leaves import named
from catp_jax.struct import pytree


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs) for _ in range(3)])
        self.gate = nnx.Param(jnp.full((1,), 0.5), axes=("gate",))


@pytree
class State:
    model: Small
    moments: optax.OptState
    step: jax.Array


def state() -> State:
    model = Small(nnx.Rngs(0))
    moments = optax.adamw(1e-3).init(nnx.state(model))
    return State(model=model, moments=moments, step=jnp.asarray(7))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_any_tree_comes_back(tmp_path: Path):
    before = state()
    checkpoint.save(tmp_path / "a", before)
    abstract = jax.eval_shape(state)
    assert_equal(checkpoint.restore(tmp_path / "a", abstract), before)


def test_module_comes_back_onto_its_abstract_self(tmp_path: Path):
    before = Small(nnx.Rngs(0))
    checkpoint.save(tmp_path / "a", before)
    after = checkpoint.restore(tmp_path / "a", nnx.eval_shape(lambda: Small(nnx.Rngs(0))))
    assert isinstance(after, Small)
    assert after.gate.get_metadata("axes") == ("gate",)
    assert_equal(after, before)


def test_leaves_say_dtype_and_sharding(tmp_path: Path):
    before = {"x": jnp.arange(16.0).reshape(8, 2), "n": 3}
    checkpoint.save(tmp_path / "a", before)
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    abstract = {"x": jax.ShapeDtypeStruct((8, 2), jnp.bfloat16, sharding=sharding), "n": 0}
    after = checkpoint.restore(tmp_path / "a", abstract)
    assert after["x"].sharding == sharding
    assert after["x"].dtype == jnp.bfloat16
    assert int(after["n"]) == 3
    np.testing.assert_array_equal(after["x"].astype(jnp.float32), before["x"])


@pytest.mark.parametrize("limit", [1, 40])
def test_an_array_of_more_than_is_read_at_once_is_restored(tmp_path: Path, monkeypatch, limit: int):
    monkeypatch.setattr(leaves, "RUN", limit)
    before = {"x": np.arange(40.0, dtype=np.float32), "y": np.ones(3, np.float32), "z": np.zeros(5)}
    save_runs(tmp_path / "a", before)
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    for sharding in (None, split):
        abstract = {
            name: jax.ShapeDtypeStruct(
                x.shape, jnp.float32, sharding=sharding if name == "x" else None
            )
            for name, x in before.items()
        }
        after = checkpoint.restore(tmp_path / "a", abstract)
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array)


def save_runs(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    checkpoint.save_runs(path, abstract, ({name: x} for name, x in arrays.items()))


def test_runs_make_one_checkpoint_and_nothing_stands_before_the_end(tmp_path: Path, capfd):
    path = tmp_path / "a"
    model = Small(nnx.Rngs(0))
    arrays = {name: np.asarray(array) for name, array in named(model).items()}
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}

    def runs() -> Iterator[dict[str, np.ndarray]]:
        for name in reversed(arrays):
            yield {name: arrays[name]}
            assert not path.exists()

    checkpoint.save_runs(path, abstract, runs())
    assert_equal(checkpoint.restore(path, model), model)
    assert checkpoint.contents(path)["layers.2.kernel"] == jax.ShapeDtypeStruct((4, 8), np.float32)
    assert capfd.readouterr() == ("", "")  # Orbax has much to say


@pytest.mark.parametrize("write", [checkpoint.save, save_runs])
def test_orbax_reads_what_is_written(tmp_path: Path, write):
    arrays = {"x": np.arange(6.0).reshape(2, 3), "y": np.ones(3, jnp.bfloat16), "z": np.zeros(())}
    write(tmp_path / "a", arrays)
    found = ocp.load(str(tmp_path / "a"))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        there = checkpoint.read(tmp_path / "a", name, jax.ShapeDtypeStruct(array.shape, "float32"))
        np.testing.assert_array_equal(there, array.astype(np.float32))


@pytest.mark.parametrize("error", [ValueError("damaged"), KeyboardInterrupt(), RuntimeError("x")])
def test_an_error_between_runs_is_raised_and_leaves_nothing(tmp_path: Path, error: BaseException):
    def runs() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": np.zeros(3)}
        raise error

    abstract = {name: jax.ShapeDtypeStruct((3,), np.float64) for name in "xy"}
    with pytest.raises(type(error)) as caught:
        checkpoint.save_runs(tmp_path / "a", abstract, runs())
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_runs_that_end_early_are_an_error(tmp_path: Path):
    abstract = {name: jax.ShapeDtypeStruct((3,), np.float64) for name in "xy"}
    with pytest.raises(RuntimeError, match="never came: y"):
        checkpoint.save_runs(tmp_path / "a", abstract, [{"x": np.zeros(3)}])
    assert list(tmp_path.iterdir()) == []


def test_every_difference_is_listed(tmp_path: Path):
    checkpoint.save(tmp_path / "a", {"x": jnp.zeros(2), "y": jnp.zeros(3), "z": jnp.zeros(4)})
    with pytest.raises(ValueError, match="does not fit") as error:
        checkpoint.restore(tmp_path / "a", {"x": jnp.zeros(2), "y": jnp.zeros(5), "w": 0.0})
    assert "1 missing: w" in str(error.value)
    assert "1 not asked for: z" in str(error.value)
    assert "y (saved (3,), wanted (5,))" in str(error.value)


def test_existing_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save(tmp_path, {"x": jnp.zeros(2)})


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_is_no_checkpoint_says_so(tmp_path: Path, make):
    make(tmp_path / "a")
    with pytest.raises(ValueError, match="not a"):
        checkpoint.restore(tmp_path / "a", {"x": jnp.zeros(2)})


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("gone")])
def test_what_is_no_file_in_a_checkpoint_is_not_waited_for(tmp_path: Path, make):
    path = tmp_path / "a"
    checkpoint.save(path, {"x": np.arange(3.0)})
    for file in [one for one in path.rglob("*") if one.is_file()]:
        before = file.read_bytes()
        file.unlink()
        make(file)
        with pytest.raises(ValueError, match=f"{file.name} is no file that can be read"):
            checkpoint.restore(path, {"x": np.zeros(3)})
        file.unlink()
        file.write_bytes(before)


def test_a_device_without_room_is_not_called_damage(tmp_path: Path, monkeypatch):
    checkpoint.save(tmp_path / "a", state())

    def full(struct, part):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(leaves, "placed", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoint.restore(tmp_path / "a", jax.eval_shape(state))


def test_damaged_checkpoint_says_so(tmp_path: Path):
    path = tmp_path / "a"
    checkpoint.save(path, {"x": np.random.default_rng(0).standard_normal(10_000)})
    data = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"damaged|not a whole"):
        checkpoint.restore(path, {"x": jax.ShapeDtypeStruct((10_000,), jnp.float32)})


@pytest.mark.parametrize("write", [checkpoint.save, save_runs])
def test_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, monkeypatch, write):
    async def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left [os_error_code='28']")

    monkeypatch.setattr("tensorstore.TensorStore.write", fail, raising=True)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "a", {"x": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []
