"""convert.rules: exactly one tensor for each parameter, or an error that lists all that is not."""

import numpy as np
import pytest

from convert.rules import (
    IDENTITY,
    TRANSPOSE,
    Match,
    Names,
    Rule,
    patches,
    tensor_of,
)

RULES = [Rule("b.*.odd", "b.*.even", TRANSPOSE), Rule("b.*.scale", "b.*.norm")]
IGNORES = {"b.*.inv_freq": "computed"}
PARAMETERS = {"b.0.q.kernel": (4, 6), "b.0.k.kernel": (4, 2), "b.0.scale": (4,)}
TENSORS = {"b.0.q.weight": (6, 4), "b.0.k.weight": (2, 4), "b.0.norm": (4,)}
TWINS = {second: ["b.0.norm"] for second in ("other", "third", "b.0.k.weight")}


def names_of(parameters=PARAMETERS, hints=None):
    wanted = {one.source: one for one in (tensor_of(name, RULES) for name in parameters)}
    return Names(wanted, TWINS, IGNORES, hints or {})


def run(tensors, hints=None):
    return names_of(hints=hints).match(tensors, PARAMETERS, "folder")


@pytest.mark.parametrize(
    ("parameter", "tensor", "transform"),
    [
        ("b.0.q.kernel", "b.0.q.weight", TRANSPOSE),
        ("a.norm.scale", "a.norm.weight", IDENTITY),
        ("words.embedding", "words.weight", IDENTITY),
        ("a.norm.bias", "a.norm.bias", IDENTITY),
        ("gate", "gate", IDENTITY),
        ("b.12.odd", "b.12.even", TRANSPOSE),
        ("b.x.odd", "b.x.odd", IDENTITY),  # a star is a number
        ("b.1.scale", "b.1.norm", IDENTITY),  # a family's own rule goes before
    ],
)
def test_the_first_rule_that_fits_names_the_tensor(parameter: str, tensor: str, transform):
    assert tensor_of(parameter, RULES) == Match(tensor, parameter, transform)


def test_each_parameter_gets_its_tensor():
    found = run(TENSORS | {"b.0.inv_freq": (2,)})
    assert {one.target: (one.source, one.transform.name) for one in found.filled.values()} == {
        "b.0.q.kernel": ("b.0.q.weight", "transposed"),
        "b.0.k.kernel": ("b.0.k.weight", "transposed"),
        "b.0.scale": ("b.0.norm", "as it is"),
    }
    assert found.twins == []
    assert found.ignored == {"b.0.inv_freq": "computed"}


def test_second_names_of_a_tensor_are_its_twins():
    found = run(TENSORS | {"other": (4,)})
    assert found.twins == [Match("other", "b.0.scale", IDENTITY)]
    assert Match("b.0.norm", "b.0.scale", IDENTITY) in found.filled.values()


def test_twin_stands_for_a_tensor_that_is_missing():
    tensors = {name: shape for name, shape in TENSORS.items() if name != "b.0.norm"}
    found = run(tensors | {"third": (4,), "other": (4,)})
    assert Match("third", "b.0.scale", IDENTITY) in found.filled.values()
    assert found.twins == [Match("other", "b.0.scale", IDENTITY)]


def test_twin_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"other \(has \(5,\), wanted \(4,\)\)"):
        run(TENSORS | {"other": (5,)})


def test_twin_with_a_parameter_of_its_own_is_none():
    """As a head that is not tied."""
    found = run(TENSORS)
    assert Match("b.0.k.weight", "b.0.k.kernel", TRANSPOSE) in found.filled.values()
    tied = {name: shape for name, shape in PARAMETERS.items() if name != "b.0.k.kernel"}
    assert names_of(tied).places(["b.0.k.weight", "nowhere"]) == {
        "b.0.k.weight": Match("b.0.k.weight", "b.0.scale", IDENTITY)
    }


def test_everything_wrong_is_said_at_once():
    tensors = {"b.0.q.weight": (4, 6), "b.0.norm": (4,), "a.1.norm": (4,), "extra": ()}
    with pytest.raises(ValueError, match="folder: the tensors do not fit") as error:
        run(tensors, hints={"b.0.k.weight": "no k, no keys"})
    said = str(error.value)
    assert "1 missing: b.0.k.weight" in said
    assert "2 unknown (no such place with this config.json): a.1.norm, extra" in said
    assert "b.0.q.weight (has (4, 6), wanted (6, 4))" in said
    assert said.endswith("no k, no keys")


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match="30 unknown") as error:
        run(TENSORS | {f"extra{n}": () for n in range(30)})
    assert "… and 10 more" in str(error.value)


@pytest.mark.parametrize("transform", [IDENTITY, TRANSPOSE, patches(3)])
def test_transforms_lead_back(transform):
    source = np.arange(5 * 3 * 2 * 2).reshape(5, 3, 2, 2)
    if transform is TRANSPOSE:
        source = source.reshape(5, 12)
    target = transform.forward(source)
    np.testing.assert_array_equal(transform.inverse(target), source)
    assert transform.source_shape(target.shape) == source.shape


def test_patches_are_the_matrix_of_a_convolution():
    """Channel first, then row, then column, as the pixels of a patch are flattened."""
    kernel = np.random.default_rng(0).normal(size=(5, 3, 2, 2))
    patch = np.random.default_rng(1).normal(size=(3, 2, 2))
    by_hand = np.einsum("ochw,chw->o", kernel, patch)
    np.testing.assert_allclose(patch.reshape(-1) @ patches(3).forward(kernel), by_hand)
