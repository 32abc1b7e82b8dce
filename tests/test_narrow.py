"""Weights of 8 bits: what they hold, what they cost the answers, where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import catp_jax
import convert
from catp_jax.leaves import named
from catp_jax.models.layers import Linear, linear
from catp_jax.models.narrow import _program, check, narrow
from catp_jax.study.tasks import easy_vqa
from tests.shallow import ASSETS, shallow

MINIS = ("mini-llama-vision", "mini-blip2-opt", "mini-blip2-t5")
STEPS = {"int8": 0.5 / 127, "float8": 2.0**-4}  # half a step, of the largest or of itself


@pytest.mark.parametrize("weights", STEPS)
def test_a_narrow_kernel_is_the_kernel_up_to_half_a_step_of_its_channel(weights: str):
    kernel = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    kernel *= np.logspace(-4, 3, 6, dtype=np.float32)
    kernel[:, 2] = 0
    narrowed, scale = narrow(jnp.asarray(kernel), weights)
    assert narrowed.dtype.itemsize == 1
    assert scale.shape == (6,)
    back = np.asarray(narrowed.astype(jnp.float32), np.float64) * np.asarray(scale, np.float64)
    largest = np.abs(kernel).max(axis=0)
    size = largest if weights == "int8" else np.maximum(np.abs(kernel), largest * 2.0**-14)
    assert (np.abs(back - kernel) <= STEPS[weights] * size * (1 + 1e-5)).all()
    np.testing.assert_allclose(np.abs(back).max(axis=0), largest, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_narrow_layer_multiplies_what_its_kernel_stands_for(rows: int, has_bias: bool):
    layer = linear(8, 6, ("embed", "mlp"), bias=has_bias, rngs=nnx.Rngs(0))
    if has_bias:
        layer.bias = nnx.Param(jnp.linspace(-1.0, 1.0, 6))
    kernel, scale = narrow(layer.kernel[...], "int8")
    x = np.random.default_rng(1).normal(size=(1, rows, 8)).astype(np.float32)
    expected = x @ (np.asarray(kernel, np.float32) * np.asarray(scale))
    expected += np.asarray(layer.bias[...]) if has_bias else 0
    layer.kernel, layer.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
    half = layer(jnp.asarray(x, jnp.bfloat16)) if not has_bias else None
    assert half is None or half.dtype == jnp.bfloat16


@pytest.mark.parametrize("weights", STEPS)
def test_a_narrow_layer_does_not_overflow_in_float16(weights: str):
    layer = linear(4096, 3, ("embed", "mlp"), rngs=nnx.Rngs(0))
    x = 30 * np.random.default_rng(1).normal(size=(2, 4096)).astype(np.float16)
    kernel, scale = narrow(layer.kernel[...], weights)
    wide = x.astype(np.float32) @ (np.asarray(kernel, np.float32) * np.asarray(scale))
    layer.kernel, layer.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
    out = layer(jnp.asarray(x))
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, rtol=2e-3, atol=0.05)


def test_kernels_of_one_shape_are_narrowed_by_one_program():
    narrow(jnp.ones((7, 3)), "int8")
    compiled = _program("int8", None)._cache_size()
    for seed in range(3):
        narrow(jnp.asarray(np.random.default_rng(seed).normal(size=(7, 3)), jnp.float32), "int8")
    assert _program("int8", None)._cache_size() == compiled


@pytest.mark.parametrize("mini", MINIS)
def test_the_language_models_layers_are_narrow_and_nothing_else(mini: str):
    wide, _ = convert.load(shallow(mini))
    model, _ = convert.load(shallow(mini), weights="int8")
    linears = {
        ".".join(map(str, path))
        for path, module in nnx.iter_modules(wide)
        if isinstance(module, Linear)
    }
    layers = {
        name
        for name in linears
        if name.startswith("language_model.") and not name.endswith("lm_head")
    }
    before, after = named(wide), named(model)
    assert after.keys() - before.keys() == {f"{name}.kernel_scale" for name in layers}
    for name, array in before.items():
        if name.removesuffix(".kernel") in layers and name.endswith(".kernel"):
            assert after[name].dtype == jnp.int8
            assert np.abs(np.asarray(after[name])).max(axis=0).tolist() == [127] * array.shape[1]
        else:
            np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize(
    ("mini", "weights"), [*((mini, "int8") for mini in MINIS), ("mini-llama-vision", "float8")]
)
def test_narrow_minis_answer_as_wide_ones(mini: str, weights: str):
    every = list(easy_vqa("test"))
    questions = every[:: len(every) // 48][:48]
    images, prompts = [q.image for q in questions], [q.question for q in questions]
    wide, model = (catp_jax.load(shallow(mini), weights=kind) for kind in (None, weights))
    assert str(jnp.dtype({"int8": jnp.int8, "float8": jnp.float8_e4m3fn}[weights])) in repr(model)
    ours, theirs = (m.generate(images, prompts, max_new_tokens=3) for m in (model, wide))
    assert np.mean([a == b for a, b in zip(ours.text, theirs.text, strict=True)]) >= 0.97
    error = np.abs(ours.logits - theirs.logits).max() / np.abs(theirs.logits).max()
    assert 0 < error < {"int8": 0.01, "float8": 0.05}[weights]


def test_narrow_weights_from_a_converted_folder_and_on_a_mesh_are_the_same(tmp_path):
    folder, mesh = shallow("mini-blip2-t5"), "data=2,fsdp=2,tensor=2"
    convert.to_orbax(folder, tmp_path / "converted")
    alone = catp_jax.load(folder, weights="int8")
    for other in (
        catp_jax.load(tmp_path / "converted", weights="int8"),
        catp_jax.load(folder, mesh=mesh, weights="int8"),
        catp_jax.load(tmp_path / "converted", mesh=mesh, weights="int8"),
    ):
        for one, two in zip(alone.network.arrays, other.network.arrays, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    name = "language_model.decoder.block.0.layer.2.DenseReluDense.wi_0.kernel"
    kernel = named(other.network.thaw())[name]
    assert kernel.dtype == jnp.int8
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    images, prompts = [ASSETS / "blue-circle.png"] * 2, ["what color is the shape?"] * 2
    ours, theirs = (m.generate(images, prompts, max_new_tokens=2) for m in (other, alone))
    assert ours.tokens == theirs.tokens
    assert {array.dtype for array in jax.tree.leaves(theirs.logits)} == {np.dtype(np.float32)}


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match=r"weights is 'int8' or 'float8', or None .* got 'int4'"):
        check("int4")
    check(None)
