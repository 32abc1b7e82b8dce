"""Attention in blocks of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.models import layers


@pytest.mark.parametrize("rows_at_once", [1, 3, 5])
def test_blocks_of_rows_give_the_same_attention_with_less_memory(monkeypatch, rows_at_once):
    batch, rows, columns, heads, kv_heads = 2, 7, 5, 6, 3
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (batch, rows, heads, 4))
    k = jax.random.normal(keys[1], (batch, columns, kv_heads, 4))
    v = jax.random.normal(keys[2], (batch, columns, kv_heads, 4))
    mask = jax.random.bernoulli(keys[3], 0.7, (batch, rows, columns)).at[:, :, 0].set(True)
    whole = layers.attend(q, k, v, mask)

    monkeypatch.setattr(layers, "LOGITS_AT_ONCE", rows_at_once * batch * heads * columns)
    np.testing.assert_allclose(layers.attend(q, k, v, mask), whole, atol=1e-6)
    program = jax.jit(lambda q, k, v, m: layers.attend(q, k, v, m)).lower(q, k, v, mask).as_text()
    assert f"tensor<{batch}x{heads}x{rows}x{columns}xf32>" not in program
    assert f"x{rows}x{columns}xf32>" not in program


def test_the_towers_logits_at_real_size_are_bounded():
    image = jax.ShapeDtypeStruct((4, 6432, 16, 80), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((4, 6432, 6432), jnp.bool_)
    text = jax.jit(lambda q, m: layers.attend(q, q, q, m)).lower(image, mask).as_text()
    assert "6432x6432xf32" not in text
