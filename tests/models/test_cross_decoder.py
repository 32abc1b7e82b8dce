"""The text decoder's masks: which rows attend to what."""

import jax.numpy as jnp
import numpy as np

from catp_jax.models.cache import Slots
from catp_jax.models.cross_decoder import causal_mask, cross_mask


def test_rows_see_what_comes_before_them_and_holds_a_token():
    rows = Slots(positions=jnp.asarray([[0, 1, 2]]), valid=jnp.ones((1, 3), bool))
    columns = Slots(
        positions=jnp.asarray([[0, 1, 2, 1]]), valid=jnp.asarray([[True, True, True, False]])
    )
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(causal_mask(rows, columns)[0], np.asarray(wanted, bool))


def test_modes_of_rows_without_an_image():
    """Row 0 sees nothing, row 1 the first token; the third column is padding."""
    sees = jnp.asarray([[[False, False, False], [True, False, True]]])
    valid = jnp.asarray([[True, True, False]])
    meta, hf = (cross_mask(sees, valid, mode) for mode in ("meta", "hf"))
    (meta_mask, meta_takes), (hf_mask, hf_takes) = meta, hf
    np.testing.assert_array_equal(meta_mask[0, 1], [True, False, False])
    np.testing.assert_array_equal(hf_mask[0], [[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(meta_takes.attends[0], [False, True])
    np.testing.assert_array_equal(hf_takes.attends[0], [True, True])
    for takes in (meta_takes, hf_takes):
        np.testing.assert_array_equal(takes.feeds[0], [False, True])
