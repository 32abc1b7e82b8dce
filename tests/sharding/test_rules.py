"""The one table from axes to the mesh: exact splits, whole heads, errors that name the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from catp_jax.models.blocks import Block
from catp_jax.models.cache import Prompt, Tail
from catp_jax.models.cross_decoder import Branches, CrossCache
from catp_jax.sharding.mesh import make_mesh, parse_mesh
from catp_jax.sharding.rules import axes_of, named_leaves, split

DEVICES = jax.devices()


def test_a_mesh_is_sizes_by_name():
    assert parse_mesh("data=2, tensor=4") == {"data": 2, "fsdp": 1, "tensor": 4}
    assert parse_mesh({"fsdp": 8}) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model=2", "got model=2"),
        ("data=0", "got data=0"),
        ("data=two", "got data=two"),
        ("data", "got data="),
        ("data=2,data=4", "names each axis once"),
        ("", "a mesh is sizes of data, fsdp, tensor"),
    ],
)
def test_other_meshes_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_mesh(text)


def test_a_mesh_of_another_size_than_the_devices_is_refused():
    with pytest.raises(ValueError, match="has 6 places, and JAX sees 8 devices"):
        make_mesh("data=2,tensor=3", 4, DEVICES)


def test_fewer_kv_heads_than_tensor_devices_are_copied_in_groups():
    mesh = make_mesh("tensor=8", 2, DEVICES)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "kv": 2, "group": 4}
    assert split(("embed", "kv_heads"), (8, 16), mesh, "k", heads=2) == PartitionSpec(None, ("kv",))
    queries = split(("embed", "heads"), (8, 64), mesh, "q", heads=8)
    assert queries == PartitionSpec(None, ("kv", "group"))


def test_every_axis_goes_where_the_table_says():
    mesh = make_mesh("data=2,fsdp=2,tensor=2", 2, DEVICES)
    tensor, fsdp = ("kv",), ("fsdp",)
    assert split(("embed", "mlp"), (8, 8), mesh, "x") == PartitionSpec(fsdp, tensor)
    assert split(("b", "s", "d"), (4, 3, 5), mesh, "x") == PartitionSpec(("data", "fsdp"))
    assert split(("b", "slots", "kv", "d"), (4, 3, 2, 5), mesh, "x") == PartitionSpec(
        ("data", "fsdp"), None, tensor
    )
    assert split(("norm",), (7,), mesh, "x") == PartitionSpec()


def test_heads_are_not_cut():
    mesh = make_mesh("tensor=8", 4, DEVICES)
    with pytest.raises(
        ValueError, match=r"q: axis heads has 4 heads, which tensor=8 does not .* 4"
    ):
        split(("embed", "heads"), (8, 64), mesh, "q", heads=4)


def test_sizes_that_do_not_divide_are_named_with_the_way_out():
    mesh = make_mesh("fsdp=8", 4, DEVICES)
    with pytest.raises(
        ValueError, match=r"axis embed has 12 entries, which fsdp=8 .* 1, 2, 3, 4, 6, 12"
    ):
        split(("embed", "mlp"), (12, 16), mesh, "up")


def test_a_vocabulary_of_any_size_is_split_as_far_as_it_divides():
    mesh = make_mesh("fsdp=2,tensor=4", 2, DEVICES)  # kv 2, group 2
    whole, two, four, eight = (split(("rows", "channels"), (n, 3), mesh, "x") for n in (7, 6, 4, 8))
    assert whole == PartitionSpec()
    assert two == PartitionSpec(("kv",))
    assert four == PartitionSpec(("kv", "group"))
    assert eight == PartitionSpec(("kv", "group", "fsdp"))


def test_two_axes_of_one_array_cannot_share_a_part_of_the_mesh():
    mesh = make_mesh("tensor=8", 8, DEVICES)
    with pytest.raises(ValueError, match="its axes heads and mlp both go to 'kv'"):
        split(("heads", "mlp"), (8, 8), mesh, "x")


def test_axes_are_read_from_the_annotations():
    x = jnp.zeros
    block = Block(keys=x((2, 1, 3, 1)), values=x((2, 1, 3, 1)))
    tail = Tail(
        held=2,
        point=0,
        blocks=(Block(keys=x((2, 1, 12, 1)), values=x((2, 1, 12, 1))),),
        positions=x((2, 12), int),
        seen=x((6, 12), bool),
        next_slot=x((2,), int),
        next_position=x((6,), int),
    )
    options = {"layers": (0,), "num_visual": 0, "blocks": (block,)}
    whole = Prompt(numbers=x((2, 3), int), valid=x((2, 3), bool), **options)
    by_head = Prompt(numbers=x((2, 1, 3), int), valid=x((2, 1, 3), bool), **options)
    branches = Branches(attends=x((2, 1), bool), feeds=x((2, 1), bool))
    cache = CrossCache(text=(whole,), cross=(by_head,), branches=branches, tail=tail)
    found = list(named_leaves(cache))
    keys, values = ("b", "kv", "slots", "c"), ("b", "kv", "slots", "d")
    slots, heads = ("b", "slots"), ("b", "kv", "slots")
    tails = [keys, values, slots, ("r", "slots"), ("b",), ("r",)]
    prompts = [keys, values, slots, slots, keys, values, heads, heads]
    assert [axes for _, axes in found] == [*tails, *prompts, ("r", "s"), ("r", "s")]
    assert [leaf.shape for leaf, _ in found] == [leaf.shape for leaf in jax.tree.leaves(cache)]


def test_other_annotations_name_no_axes():
    assert axes_of(Float[Array, "*rows d"]) == []
    assert axes_of(int) == []
    assert axes_of(Bool[Array, "b n"] | None) == [("b", "n")]


def test_a_dictionarys_leaves_come_in_the_order_of_its_keys():
    """As states by layer are; without axes, since none are annotated."""
    tree = ({3: np.zeros(3), 1: (np.ones(2), np.ones(1))}, np.zeros(4))
    found = list(named_leaves(tree))
    assert [leaf.shape for leaf, _ in found] == [leaf.shape for leaf in jax.tree.leaves(tree)]
    assert {axes for _, axes in found} == {None}
