"""convert.rules: every change of layout leads back, by views, and a copy has every byte."""

import ml_dtypes
import numpy as np
import pytest

from convert.rules import IDENTITY, THREE, THREE_BIASES, TRANSPOSE, copy, patches

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("wanted", [np.float32, BFLOAT16])
def test_copy_is_what_numpy_copies(dtype: np.dtype, wanted: np.dtype):
    matrix = np.random.default_rng(0).standard_normal((300, 5)).astype(dtype)
    large = np.resize(matrix, (1100, 24))
    views = (matrix, matrix.T, matrix[::2].T, matrix[:, 0], matrix[0, 0, None][0:1], matrix[:0].T)
    forwards = (TRANSPOSE.forward, THREE.forward, lambda x: x.T[:, 500:1030], lambda x: x.T[3:9])
    square = np.resize(matrix, (1536, 24))
    for view in (*views, *(f(large) for f in forwards[2:]), *(f(square) for f in forwards)):
        found = copy(view, np.dtype(wanted))
        assert found.dtype == wanted
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, view.astype(wanted))


@pytest.mark.parametrize("transform", [IDENTITY, TRANSPOSE, THREE, THREE_BIASES, patches(3)])
def test_every_transform_leads_back_by_a_view(transform):
    """And there by one, so that a tensor can be read straight into the parameter."""
    tensor = np.arange(12 * 3 * 2 * 2)
    shapes = {THREE: (12, 12), THREE_BIASES: (144,), TRANSPOSE: (9, 16)}
    if transform.name == patches(3).name:
        tensor = tensor.reshape(12, 3, 2, 2)
    else:
        tensor = tensor.reshape(shapes.get(transform, (144,)))
    assert np.may_share_memory(transform.forward(tensor), tensor)
    parameter = np.zeros_like(transform.forward(tensor), order="C")
    transform.inverse(parameter)[...] = tensor
    np.testing.assert_array_equal(parameter, transform.forward(tensor))
