"""Attention of many rows against the textbook's, and what cuDNN's calls come to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.models import attention


@pytest.mark.parametrize("at_once", [2**27, 100, 1])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_the_textbooks(kv_heads: int, at_once: int, monkeypatch):
    """Whole and in blocks of rows."""
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    batch, rows, columns, heads, channels = 2, 5, 7, 6, 4
    queries = rng.normal(size=(batch, rows, heads, channels))
    keys, values = rng.normal(size=(2, batch, columns, kv_heads, channels))
    mask = rng.random((batch, rows, columns)) < 0.6
    mask[:, :, 0] = True
    wanted = np.zeros_like(queries)
    for b in range(batch):
        for s in range(rows):
            for h in range(heads):
                group = h // (heads // kv_heads)
                logits = keys[b, :, group] @ queries[b, s, h] / np.sqrt(channels)
                weights = np.where(mask[b, s], np.exp(logits), 0)
                wanted[b, s, h] = weights @ values[b, :, group] / weights.sum()
    floats = (jnp.asarray(a, jnp.float32) for a in (queries, keys, values))
    np.testing.assert_allclose(attention.attend(*floats, jnp.asarray(mask)), wanted, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_a_bias_a_scale_and_gradients_are_those_of_jax(kv_heads: int):
    rng = np.random.default_rng(3)
    queries = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
    keys, values = jnp.asarray(rng.normal(size=(2, 2, 7, kv_heads, 4)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(1, 6, 5, 7)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 5, 7)) < 0.6).at[:, :, 0].set(True)

    def ours(*floats):
        return attention.attend(*floats[:3], mask, floats[3], 0.7)

    def wanted(queries, keys, values, bias):
        return jax.nn.dot_product_attention(
            queries, keys, values, bias=bias, mask=mask[:, None], scale=0.7
        )

    for function in (lambda f: f, lambda f: jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2, 3))):
        one, other = (function(f)(queries, keys, values, bias) for f in (ours, wanted))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)


REAL = [7, 1, 4]


def padded_wanted(queries, keys, values):
    """One row and head after the other: real rows see all, padding sees what is real."""
    wanted = np.zeros_like(queries)
    for image, real in enumerate(REAL):
        for row in range(queries.shape[1]):
            seen = slice(None) if row < real else slice(real)
            for head in range(queries.shape[2]):
                logits = keys[image, seen, head] @ queries[image, row, head]
                weights = np.exp(logits / np.sqrt(queries.shape[3]))
                wanted[image, row, head] = weights @ values[image, seen, head] / weights.sum()
    return wanted


@pytest.fixture
def padded() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, len(REAL), 7, 2, 4))


def test_padding_sees_what_is_real_and_the_real_see_everything(padded):
    floats = (jnp.asarray(a, jnp.float32) for a in padded)
    out = attention.attend_padded(*floats, jnp.asarray(REAL, jnp.int32))
    np.testing.assert_allclose(out, padded_wanted(*padded), atol=1e-5)


def test_two_calls_with_lengths_are_that_mask(padded, monkeypatch):
    """cuDNN's two calls, computed by XLA; rows whose result is not to be read are NaN."""

    def xla_with_lengths(queries, keys, values, rows, columns):
        out = jax.nn.dot_product_attention(
            queries, keys, values, key_value_seq_lengths=columns, implementation="xla"
        )
        numbers = jnp.arange(queries.shape[1], dtype=jnp.int32)
        return jnp.where(numbers[None, :, None, None] < rows[:, None, None, None], out, jnp.nan)

    monkeypatch.setattr(attention, "cudnn", xla_with_lengths)
    floats = (jnp.asarray(a, jnp.float32) for a in padded)
    out = attention._cudnn_padded(*floats, jnp.asarray(REAL, jnp.int32))
    np.testing.assert_allclose(out, padded_wanted(*padded), atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_the_call_of_cudnn_says_the_same_as_xlas(kv_heads: int, monkeypatch):
    """The call's own meaning, by JAX's implementation that runs anywhere."""
    by_jax = jax.nn.dot_product_attention

    def anywhere(*arrays, **options):
        assert options["implementation"] == "cudnn"
        return by_jax(*arrays, **(options | {"implementation": "xla"}))

    monkeypatch.setattr(jax.nn, "dot_product_attention", anywhere)
    rng = np.random.default_rng(4)
    queries = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
    keys, values = jnp.asarray(rng.normal(size=(2, 2, 7, kv_heads, 4)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 5, 7)) < 0.6).at[:, :, 0].set(True)
    mask = mask.at[1, 2].set(False)  # a row that sees nothing, which nobody reads
    for own in (None, mask):
        out = attention.cudnn(queries, keys, values, own, scale=0.7)
        wanted = attention.xla(queries, keys, values, own, scale=0.7)
        assert jnp.isfinite(out).all()
        sees = np.ones((2, 5), bool) if own is None else own.any(axis=2)
        np.testing.assert_allclose(out[sees], wanted[sees], atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "split", "dtype", "reason"),
    [
        (2, 1, "float32", "16 bits"),
        (4, 2, "bfloat16", "splits the queries of a key-value head"),
        (2, 2, "bfloat16", "not found"),
        (4, 1, "bfloat16", "not found"),
    ],
)
def test_what_cudnn_refuses_it_says_why(heads, split, dtype, reason, monkeypatch):
    monkeypatch.setattr(attention, "_cudnn_lacks", lambda channels: "cuDNN not found")
    queries, keys = (jnp.zeros((1, 8, n, 4), dtype) for n in (heads, 2))
    mesh = jax.sharding.AbstractMesh((2, split), ("kv", "group"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert reason in attention.cudnn_refuses(queries, keys)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(6, 8), (5, 8), (6, 7), (5, 7)])
def test_where_cudnn_wants_even_numbers_one_more_is_not_seen(
    rows: int, columns: int, is_masked: bool, monkeypatch
):
    by_jax, sizes = jax.nn.dot_product_attention, []

    def anywhere(queries, keys, values, **options):
        sizes.append((queries.shape[1], keys.shape[1]))
        return by_jax(queries, keys, values, **(options | {"implementation": "xla"}))

    monkeypatch.setattr(jax.nn, "dot_product_attention", anywhere)
    rng = np.random.default_rng(5)
    queries = jnp.asarray(rng.normal(size=(2, rows, 6, 4)), jnp.float32)
    keys, values = jnp.asarray(rng.normal(size=(2, 2, columns, 3, 4)), jnp.float32)
    mask = jnp.asarray(rng.random((2, rows, columns)) < 0.6).at[:, :, 0].set(True)
    mask = mask if is_masked else None

    def total(function, *floats):
        return (function(*floats, mask) ** 2).sum()

    out = attention.cudnn(queries, keys, values, mask)
    np.testing.assert_allclose(out, attention.xla(queries, keys, values, mask), atol=2e-6)
    even = (rows + rows % 2, columns + columns % 2)
    assert sizes == [even if is_masked else (rows, columns)]
    of_ours, wanted = (
        jax.grad(functools.partial(total, function), (0, 1, 2))(queries, keys, values)
        for function in (attention.cudnn, attention.xla)
    )
    assert sizes[1:] == [even]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), of_ours, wanted)


def test_where_cudnn_is_found_a_cpus_program_is_still_xlas(padded, monkeypatch):
    def no_kernel(*arrays, **options):
        return functools.reduce(jnp.add, arrays[:3]) * jnp.nan

    monkeypatch.setattr(attention, "cudnn_refuses", lambda *arrays: None)
    monkeypatch.setattr(attention, "cudnn", no_kernel)
    floats = [jnp.asarray(a, jnp.float32) for a in padded]
    real = jnp.asarray(REAL, jnp.int32)
    mask = jnp.asarray(np.random.default_rng(2).random((3, 7, 7)) < 0.6).at[:, :, 0].set(True)
    for own in (None, mask):
        np.testing.assert_array_equal(
            jax.jit(attention.attend)(*floats, own), attention.xla(*floats, own)
        )
    np.testing.assert_allclose(
        jax.jit(attention.attend_padded)(*floats, real), padded_wanted(*padded), atol=1e-5
    )
