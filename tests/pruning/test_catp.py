"""CATP against the paper's vote in slow loops, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import View
from catp_jax.pruning import CATP, L2Norm, Position
from catp_jax.pruning.catp import image_token_weights, votes
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import (
    CROSS_LAYERS,
    QUERIES,
    attention_of,
    entry,
    entry_view,
    kept,
    prune,
    random_view,
    run,
    sample_of,
)

# Attention of three queries to three image tokens; each query's sums to 1.
#
#         image token   0    1    2    points  by rank in the column
HAND = [
    [.50, .20, .30],  # query 0   2 + 0 + 1 = 3
    [.10, .40, .50],  # query 1   0 + 2 + 2 = 4
    [.45, .35, .20],  # query 2   1 + 1 + 0 = 2
]  # fmt: skip
OTHER = [
    [.60, .20, .20],  # 2 + 0 + 1 = 3
    [.10, .80, .10],  # 0 + 2 + 0 = 2
    [.20, .30, .50],  # 1 + 1 + 2 = 4
]  # fmt: skip
EVEN = [[1 / 3] * 3] * 3


def hand_made(
    *layers: list[list[list[float]]], vision: list[list[list[float]]] | None = None
) -> View:
    """A view of three queries; each layer as [heads, queries, image tokens]."""
    cross = [attention_of(layer) for layer in layers]
    queries = len(layers[0][0])
    among = [attention_of([[[1 / queries] * queries] * queries])]
    return entry(np.ones((1, queries, 2)), cross, among, attention_of(vision or [EVEN]))


def select(view: View, **options) -> list[int]:
    return kept(run(CATP(**options), view)[0].tokens, 0)


def test_hand_made_points_go_by_rank():
    assert votes(attention_of([HAND]), None).tolist() == [[3, 4, 2]]
    assert select(hand_made([HAND]), keep=1) == [1]
    assert select(hand_made([HAND]), keep=2) == [0, 1]


def test_hand_made_heads_vote_together():
    assert votes(attention_of([HAND, OTHER]), None).tolist() == [[6, 6, 6]]
    assert votes(attention_of([OTHER, OTHER]), None).tolist() == [[6, 4, 8]]
    # all equal: the lower numbers stay
    assert select(hand_made([HAND, OTHER]), keep=2) == [0, 1]
    assert select(hand_made([OTHER, OTHER]), keep=1) == [2]


def test_hand_made_layers_first_last_all_and_by_number():
    view = hand_made([HAND], [EVEN], [OTHER])
    assert select(view, keep=1) == [2]
    assert select(view, keep=1, layers="last") == [2]
    assert select(view, keep=1, layers="first") == [1]
    assert select(view, keep=1, layers=1) == [1]
    assert select(view, keep=1, layers=3) == [2]
    # all: 3 4 2, and 0 3 6 of the even layer, where all are equal, and 3 2 4
    assert select(view, keep=2, layers="all") == [1, 2]


def test_hand_made_layer_weights():
    view = hand_made([HAND], [OTHER])  # 3 4 2 and 3 2 4
    assert select(view, keep=1, weights=jnp.asarray([1.0, 0.9])) == [1]  # 5.7 5.8 5.6
    assert select(view, keep=1, weights=jnp.asarray([0.9, 1.0])) == [2]
    assert select(view, keep=1, weights=jnp.asarray([0.0, -1.0])) == [1]
    assert select(view, keep=2, weights=jnp.asarray([1.0, 1.0])) == [0, 1]  # all have 6


def test_hand_made_of_equal_queries_the_later_ranks_higher():
    # as in a stable sort; query 1 is least attended of all in two of the three columns
    rows = [[.4, .3, .3], [.2, .6, .2], [.4, .3, .3]]  # fmt: skip
    assert votes(attention_of([rows]), None).tolist() == [[1 + 0 + 1, 0 + 2 + 0, 2 + 1 + 2]]
    assert select(hand_made([rows]), keep=1) == [2]


def test_hand_made_image_weights_weigh_the_votes():
    # nearly all of the image looks at image token 0, where query 0 is first and query 1 last
    looks = [[[0.98, 0.01, 0.01]] * 3]
    weights = image_token_weights(attention_of(looks))
    np.testing.assert_allclose(weights, [[0.98, 0.01, 0.01]], atol=1e-6)
    view = hand_made([HAND], vision=looks)
    assert select(view, keep=1, image_weights=True) == [0]
    assert select(view, keep=2, image_weights=True) == [0, 2]
    assert select(view, keep=1) == [1]
    # an image that looks everywhere alike: as without
    assert select(hand_made([HAND], vision=[EVEN]), keep=1, image_weights=True) == [1]


def oracle_scores(view: View, sample: int, **options) -> list[float]:
    """The points of every query."""
    image = None
    if options.get("image_weights"):
        image = oracles.received(*sample_of(view.evidence.vision, sample))
        image = image / image.sum()
    by_layer = [
        oracles.catp_votes(*sample_of(layer, sample), image) for layer in view.evidence.cross
    ]
    layers = options.get("layers", "last")
    weights = {
        "last": [0, 0, 1],
        "first": [1, 0, 0],
        "all": [1, 1, 1],
        2: [0, 1, 0],
    }[layers]
    weights = options.get("weights", weights)
    return [
        sum(float(weight) * points[query] for weight, points in zip(weights, by_layer, strict=True))
        for query in range(QUERIES)
    ]


FORMS = {
    "last": {},
    "first": {"layers": "first"},
    "all": {"layers": "all"},
    "number": {"layers": 2},
    "weights": {"weights": np.asarray([0.3, 1.0, 0.45], np.float32)},
    "image": {"image_weights": True},
    "image, all": {"image_weights": True, "layers": "all"},
}


@pytest.mark.parametrize("form", FORMS)
def test_votes_are_the_oracles(form: str):
    options = {
        name: jnp.asarray(value) if name == "weights" else value
        for name, value in FORMS[form].items()
    }
    for seed in range(3):
        view = entry_view(seed)
        for keep in (1, 4):
            chosen = run(CATP(keep=keep, **options), view)[0].tokens
            for sample in range(3):
                score = oracle_scores(view, sample, **FORMS[form])
                assert kept(chosen, sample) == oracles.best(score, keep)


def test_forms_differ():
    # else one of them could stand for all
    view, chosen = entry_view(1), set()
    for options in FORMS.values():
        options = {k: jnp.asarray(v) if k == "weights" else v for k, v in options.items()}
        keep = run(CATP(keep=3, **options), view)[0].tokens
        chosen.add(tuple(tuple(kept(keep, sample)) for sample in range(3)))
    assert len(chosen) >= 6


def test_points_of_a_layer_sum_to_what_the_ranks_sum_to():
    layer = entry_view(4).evidence.cross[0]
    heads, columns = layer.keys.shape[2], layer.keys.shape[1]
    total = heads * columns * sum(range(QUERIES))
    np.testing.assert_array_equal(votes(layer, None).sum(axis=1), [total] * 3)


def test_image_weights_sum_to_one_and_are_the_oracles():
    view = entry_view(2)
    weights = image_token_weights(view.evidence.vision)
    for sample in range(3):
        expected = oracles.received(*sample_of(view.evidence.vision, sample))
        np.testing.assert_allclose(weights[sample], expected / expected.sum(), rtol=1e-5)
        np.testing.assert_allclose(weights[sample].sum(), 1, rtol=1e-6)


# --- after other pruners ----------------------------------------------------------------------


def test_after_another_pruner_all_queries_vote_and_the_best_of_those_left_stays():
    view = entry_view(3)
    keep, _ = prune((Position(keep=5), CATP(keep=2)), view)
    for sample in range(3):
        score = oracle_scores(view, sample)
        assert kept(keep, sample) == oracles.best(score, 2, among=[0, 1, 2, 3, 4])

    # entries of the view are no longer numbered as the evidence is
    keep, _ = prune((L2Norm(keep=4), CATP(keep=2, layers="first", image_weights=True)), view)
    for sample in range(3):
        left = oracles.best(oracles.l2(np.asarray(view.tokens[sample])), 4)
        assert left != [0, 1, 2, 3]
        score = oracle_scores(view, sample, layers="first", image_weights=True)
        assert kept(keep, sample) == oracles.best(score, 2, among=left)


# --- programs and bad input -------------------------------------------------------------------


def test_other_weights_reuse_the_program_and_another_budget_does_not():
    fresh = jax.jit(lambda pruner, view: pruner(view, ())[0].tokens)
    view, chosen = entry_view(0), set()
    for weights in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]):
        keep = fresh(CATP(keep=3, weights=jnp.asarray(weights)), view)
        chosen.add(tuple(kept(keep, 0)))
    assert fresh._cache_size() == 1
    assert len(chosen) > 1
    fresh(CATP(keep=4, weights=jnp.asarray([1.0, 0.0, 0.0])), view)
    assert fresh._cache_size() == 2


def test_one_layers_weight_is_that_layer():
    view = entry_view(5)
    for number in range(CROSS_LAYERS):
        weights = jnp.zeros(CROSS_LAYERS).at[number].set(1)
        by_weight, _ = run(CATP(keep=3, weights=weights), view)
        by_number, _ = run(CATP(keep=3, layers=number + 1), view)
        np.testing.assert_array_equal(by_weight.tokens.indices, by_number.tokens.indices)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, 0.0, 0.0, 0.0], []])
def test_a_weight_vector_of_another_length_is_refused(weights: list[float]):
    pruner = CATP(keep=2, weights=jnp.asarray(weights))
    with pytest.raises(ValueError, match=f"{len(weights)} layer weights.*3 cross-attention layers"):
        run(pruner, entry_view())


@pytest.mark.parametrize("number", [0, -1, 4, 100])
def test_a_layer_that_is_not_there_is_refused(number: int):
    with pytest.raises(ValueError, match=f"layers={number}.*are 1 to 3"):
        run(CATP(keep=2, layers=number), entry_view())


def test_layers_and_weights_together_are_refused():
    # one of them would be ignored
    with pytest.raises(ValueError, match="layers or weights, not both"):
        CATP(keep=2, layers="first", weights=jnp.asarray([1.0, 0.0, 0.0]))


def test_a_view_without_a_q_former_is_refused():
    with pytest.raises(ValueError, match="CATP reads a Q-Former's attention"):
        run(CATP(keep=2), random_view())
    with pytest.raises(ValueError, match="does not have at site ENTRY"):
        run(CATP(keep=2), replace(entry_view(), evidence=None))
