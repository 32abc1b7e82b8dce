"""FLOPs of matrix products, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from catp_jax.models import attention
from catp_jax.models.layers import product
from catp_jax.targets.products import matrix_flops

EACH = 2 * 2 * 5 * 5
X, Y = jax.ShapeDtypeStruct((2, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)


def test_loops_count_as_often_as_they_run():
    def program(x, y):
        def twice(carry, _):
            return carry @ y, None

        return jax.lax.scan(twice, x @ y, None, length=3)[0]

    assert matrix_flops(jax.jit(program).trace(X, Y)) == 4 * EACH
    repeated = jax.jit(
        lambda x, y, times: jax.lax.fori_loop(0, times, lambda _, x: x @ y, x),
        static_argnames="times",
    )
    assert matrix_flops(repeated.trace(X, Y, times=7)) == 7 * EACH
    ended = jax.jit(lambda x, y: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ y, x))
    assert matrix_flops(ended.trace(X, Y)) == EACH


def test_of_branches_the_one_with_most_products_counts():
    def program(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ y @ y, lambda: x @ y)

    assert matrix_flops(jax.jit(program).trace(X, Y)) == 2 * EACH


def test_what_one_platform_does_twice_counts_once():
    one = jnp.ones((1, 5))
    traced = jax.jit(lambda x, y: product(lambda x: x @ y, x)).trace(one, Y)
    assert matrix_flops(traced) == EACH // 2


@pytest.mark.parametrize("rows_at_once", [3, 12, 200])
def test_attention_in_blocks_of_rows_counts_all_rows(monkeypatch, rows_at_once: int):
    batch, rows, heads, columns, channels = 2, 12, 4, 5, 8
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", rows_at_once * batch * heads * columns)
    queries = jnp.ones((batch, rows, heads, channels))
    keys = jnp.ones((batch, columns, heads, channels))
    traced = jax.jit(lambda q, k: attention.attend(q, k, k, None)).trace(queries, keys)
    assert matrix_flops(traced) == 2 * 2 * batch * heads * rows * columns * channels
