"""A batch's images are split over the devices, from the host straight to each, filled up with
blanks where their number does not divide.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Room, keep_all
from catp_jax.models.frozen import freeze
from catp_jax.readers import blip2_packing, mllama_packing
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import fetch, kv_heads, place_inputs
from catp_jax.sharding.rules import shares
from tests import random_blip2 as blip2
from tests import random_mllama as mllama
from tests.sharding.models import CONFIGS, MLLAMA, model, on_mesh

KINDS = ("mllama", "opt", "vicuna")
MESH = "data=8"


def mesh_of(kind: str, text: str = MESH):
    return make_mesh(text, kv_heads(model(kind)))


def pack(kind: str, images: int, split: int):
    """So many images, for as many prompts; with Llama two for each."""
    if kind == "mllama":
        own = [mllama.picture(1 + seed % 4, seed) for seed in range(images)]
        pairs = [own[at : at + 2] for at in range(0, images, 2)]
        mark = MLLAMA.image_token_index
        prompts = [[mark, mark, 3 + row] for row in range(len(pairs))]
        return mllama_packing.pack(prompts, pairs, MLLAMA, shares=split).inputs
    photos = [blip2.photo(seed) for seed in range(images)]
    prompts = [[3, 4 + row] for row in range(images)]
    if kind == "vicuna":
        return blip2_packing.pack_instructions(
            prompts, prompts, photos, CONFIGS[kind], split
        ).inputs
    return blip2_packing.pack(prompts, photos, CONFIGS[kind], split).inputs


def pixels_of(inputs):
    return inputs.images.pixels if hasattr(inputs, "images") else inputs.pixels


@functools.partial(jax.jit, static_argnames="kind")
def seen(network, inputs, kind: str):
    """What the vision tower makes of the images."""
    vision = network.thaw().vision_model
    if kind != "mllama":
        return vision(jnp.asarray(inputs.pixels))[0]
    images = inputs.images
    return vision(images.pixels, images.aspect_ratio_ids, images.aspect_ratio_mask)


@jax.jit
def logits(network, inputs):
    return network.back(network.front(inputs), keep_all, Room(new=0))[0]


@pytest.mark.parametrize("text", ["data=8", "data=2,fsdp=4"])
@pytest.mark.parametrize("kind", KINDS)
def test_twelve_images_are_two_for_each_of_eight_devices(kind, text):
    mesh = mesh_of(kind, text)
    inputs = pack(kind, 12, shares(mesh))
    pixels = pixels_of(place_inputs(inputs, mesh))
    assert pixels.shape[0] == 16
    shards = [shard.data.shape[0] for shard in pixels.addressable_shards]
    assert shards == [2] * 8
    np.testing.assert_array_equal(np.asarray(pixels), pixels_of(inputs))
    assert not np.asarray(pixels[12:]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_each_device_encodes_its_own_images_alone(kind):
    mesh = mesh_of(kind)

    def flops(network, inputs):
        return seen.lower(network, inputs, kind).compile().cost_analysis()["flops"]

    split = flops(on_mesh(kind, mesh), place_inputs(pack(kind, 12, 8), mesh))
    whole = flops(on_mesh(kind, mesh), place_inputs(pack(kind, 12, 1), mesh))
    two = flops(freeze(model(kind)), pack(kind, 2, 1))
    assert split == pytest.approx(two, rel=0.02)
    assert whole > 5.9 * split


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_one_device(kind):
    mesh = mesh_of(kind)
    alone = fetch(logits(freeze(model(kind)), pack(kind, 12, 1)))
    ours = fetch(logits(on_mesh(kind, mesh), place_inputs(pack(kind, 12, 8), mesh)))
    np.testing.assert_allclose(ours, alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize("kind", KINDS)
def test_packing_stays_on_the_host_and_no_device_gets_more_than_its_part(kind):
    mesh = mesh_of(kind)
    with jax.transfer_guard("disallow_explicit"):
        inputs = pack(kind, 12, 8)
        with pytest.raises(RuntimeError, match="Disallowed"):
            jnp.asarray(np.zeros(3, np.float32))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(inputs))
    before = {id(array) for array in jax.live_arrays()}
    placed = place_inputs(inputs, mesh)
    new = [array for array in jax.live_arrays() if id(array) not in before]
    whole = [array for array in new if array.is_fully_replicated and array.ndim > 3]
    assert len(new) == len(jax.tree.leaves(placed))
    assert not whole
