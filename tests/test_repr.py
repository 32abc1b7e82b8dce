"""What `print` shows of a model: a line, not its weights."""

from typing import Any

import jax
import pytest
from flax import nnx

import catp_jax
from catp_jax.models.frozen import freeze
from catp_jax.sharding import place

SIZE = "Linear, 1,010 parameters, float32"


@pytest.fixture
def frozen() -> Any:
    return freeze(nnx.Linear(100, 10, rngs=nnx.Rngs(0)))


def test_a_frozen_model_is_one_line_inside_a_program_too(frozen):
    assert repr(frozen) == f"Frozen({SIZE})"
    seen = []
    jax.eval_shape(lambda given: seen.append(repr(given)), frozen)
    assert seen == [repr(frozen)]


def test_a_model_on_a_mesh_names_its_axes(frozen):
    spread = place.Sharded(mesh=jax.make_mesh((1,), ("data",)), frozen=frozen)
    assert repr(spread) == f"Sharded({SIZE}, data=1)"


@pytest.mark.parametrize("kind", [catp_jax.Model, catp_jax.Matcher])
def test_what_load_gives_is_one_line(kind: type, frozen):
    given = object.__new__(kind)  # without its processor, which takes a checkpoint's files
    object.__setattr__(given, "network", frozen)
    assert repr(given) == f"{kind.__name__}({SIZE})"
