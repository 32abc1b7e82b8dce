"""AirCache against slow loops, and by hand."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Attention, Site, View
from catp_jax.pruning.aircache import AirCache, skewness_of
from catp_jax.struct import replace
from tests.pruning.oracles import attention_row
from tests.pruning.views import cache_view, kept, random_view, run, shown, with_attention


def of_sample(view: View, sample: int) -> tuple[list[int], list[int]]:
    """A sample's visual tokens, and its text."""
    numbers, valid = np.asarray(view.numbers[sample]), np.asarray(view.valid[sample])
    visual, text = valid & (numbers >= 0), valid & (numbers < 0)
    return np.flatnonzero(visual).tolist(), np.flatnonzero(text).tolist()


def oracle(
    queries: np.ndarray,
    keys: np.ndarray,
    sees: np.ndarray,
    *,
    visual: list[int],
    text: list[int],
    alpha: float = 0.9,
) -> tuple[list[int], dict[int, float]]:
    """arXiv 2503.23956: the rows that observe, and the scores of visual tokens. Rows of text, if
    there is any, have the numbers of its columns.
    """
    heads = range(queries.shape[1])

    def row(number: int, columns: list[int]) -> np.ndarray:
        seen = np.zeros_like(sees)
        seen[number, columns] = sees[number, columns]
        return np.mean([attention_row(queries, keys, seen, number, head) for head in heads], axis=0)

    observers = [number for number in range(len(sees)) if any(sees[number, visual])]
    if text:
        last = row(text[-1], text)
        observers = [word for word in text if last[word] >= alpha * max(last[w] for w in text)]
    columns = [*visual, *(observers if text else [])]
    total = sum((row(number, columns) for number in observers), np.zeros(sees.shape[1]))
    return observers, {n: float(total[n]) / len(observers) for n in visual}


def skewness(numbers: list[float]) -> float:
    n = len(numbers)
    if n < 3:
        return 0.0
    mean = sum(numbers) / n
    deviation = (sum((x - mean) ** 2 for x in numbers) / (n - 1)) ** 0.5
    return n / (n - 1) / (n - 2) * sum(((x - mean) / deviation) ** 3 for x in numbers)


def views(seed: int) -> list[View]:
    """A decoder's, one of visual tokens alone, and one where new tokens cannot read an image that
    some of the prompt's could.
    """
    cross = replace(random_view(seed), site=Site.CACHE)
    return [cache_view(seed), cross, replace(cross, valid=cross.valid.at[3, :4].set(False))]


@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("keep", [1, 4])
def test_what_the_oracle_keeps_stays_and_all_text(keep: int, alpha: float):
    for seed in range(3):
        for view in views(seed):
            reduction, found = run(AirCache(keep=keep, alpha=alpha), view)
            for sample in range(len(view.valid)):
                visual, text = of_sample(view, sample)
                if not visual:
                    continue
                _, score = oracle(*shown(view, sample), visual=visual, text=text, alpha=alpha)
                best = sorted(visual, key=lambda n: (-score[n], n))[:keep]
                assert kept(reduction.tokens, sample) == [*sorted(best), *text]
                numbers = list(score.values())
                np.testing.assert_allclose(found.strength[sample], sum(numbers), rtol=1e-5)
                np.testing.assert_allclose(
                    found.skewness[sample], skewness(numbers), rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_a_layer_gets_as_many_as_its_strength_and_skewness_ask_for(share: float):
    means, counts = {"strength": 0.7, "skewness": 0.8}, set()
    for seed in range(3):
        for view in views(seed):
            reduction, found = run(AirCache(keep=5, share=share, **means), view)
            for sample in range(len(view.valid)):
                visual, text = of_sample(view, sample)
                if not visual:
                    continue
                _, score = oracle(*shown(view, sample), visual=visual, text=text)
                numbers, room = list(score.values()), min(5, len(visual))
                part = (sum(numbers) / 0.7 + skewness(numbers) / 0.8) / 2 * share
                wanted = min(max(round(room * part), 1), len(visual))
                best = sorted(visual, key=lambda n: (-score[n], n))[: min(wanted, room)]
                assert kept(reduction.tokens, sample) == [*sorted(best), *text]
                assert int(found.wanted[sample]) == wanted
                assert int(found.overflow[sample]) == max(wanted - room, 0)
                counts.add(len(best))
    assert len(counts) > 1


def view_of(rows: list[list[float]], visual: int) -> View:
    """One sample with one head whose attention weights are `rows`, up to a factor and as far as a
    token sees those before it; visual tokens attend to all alike.
    """
    n = len(rows[0])
    weights = np.vstack([np.ones((visual, n)), rows])
    numbers = [*range(visual), *[-1] * (n - visual)]
    return View(
        site=Site.CACHE,
        layer=0,
        num_visual=visual,
        attention=Attention(
            queries=jnp.asarray(np.log(weights), jnp.float32)[None, :, None],
            keys=jnp.eye(n)[None, :, None],
        ),
        values=jnp.zeros((1, n, 1, n)),
        numbers=jnp.asarray([numbers], jnp.int32),
        valid=jnp.ones((1, n), bool),
        sees=jnp.tril(jnp.ones((n, n), bool))[None],
    )


#     visual             text
ROWS = [
    [8.0, 1.0, 1.0, 2.0, 1.0, 1.0],  # the first word looks at the first token
    [1.0, 1.0, 3.0, 9.0, 3.0, 1.0],  # the second one at the third
    [1.0, 7.0, 1.0, 0.5, 5.0, 4.0],  # the last one at the second, and at the second word
]


@pytest.mark.parametrize(
    ("alpha", "window", "expected"),
    [
        (0.9, [4], [2]),  # the second word alone: 1/8 1/8 3/8, of itself and visual tokens
        (0.7, [4, 5], [1]),  # and the last one, 1/18 7/18 1/18
        (0.05, [3, 4, 5], [0]),  # all: 8/12 1/12 1/12, 1/17 1/17 3/17, 2/37 14/37 2/37
    ],
)
def test_hand_made_those_observe_that_the_last_word_attends_to(
    alpha: float, window: list[int], expected: list[int]
):
    view, method = view_of(ROWS, visual=3), AirCache(keep=1, alpha=alpha)
    assert np.flatnonzero(method.window(view)[0]).tolist() == window
    assert kept(run(method, view)[0].tokens, 0) == [*expected, 3, 4, 5]


def test_hand_made_skewness_is_what_few_high_ones_make_of_it():
    scores = jnp.asarray([[1.0, 1, 1, 5], [1, 3, 5, 99], [2, 2, 2, 99], [1, 5, 99, 99]])
    among = jnp.asarray([[True] * 4, *[[True] * 3 + [False]] * 2, [True] * 2 + [False] * 2])
    np.testing.assert_allclose(skewness_of(scores, among), [2, 0, 0, 0], atol=1e-5)


def test_where_there_is_no_text_every_row_that_sees_what_can_be_read_observes():
    for view in views(1)[1:]:
        any_alpha = [run(AirCache(keep=3, alpha=alpha), view) for alpha in (0.1, 0.9)]
        np.testing.assert_array_equal(*(reduction.tokens.indices for reduction, _ in any_alpha))
        for _, found in any_alpha:
            np.testing.assert_allclose(
                found.strength, np.asarray(view.valid).any(axis=1), rtol=1e-5
            )


def test_query_heads_of_a_group_read_their_own_key_head():
    view = cache_view(2)
    each = jnp.repeat(view.attention.keys, 2, axis=2)  # as many key heads as query heads
    for keep in (1, 4):
        grouped, plain = (
            run(AirCache(keep=keep), some)[0].tokens
            for some in (view, with_attention(view, keys=each))
        )
        np.testing.assert_array_equal(grouped.indices, plain.indices)


def test_padding_is_neither_kept_nor_asked():
    for view in views(3):
        rows = ~view.sees.any(axis=2)[..., None, None]
        changed = with_attention(
            view,
            queries=jnp.where(rows, -20.0, view.attention.queries),
            keys=jnp.where(view.valid[..., None, None], view.attention.keys, 30.0),
        )
        for sample in range(len(view.valid)):
            here, there = (
                kept(run(AirCache(keep=4), v)[0].tokens, sample) for v in (view, changed)
            )
            assert here == there
            assert set(here) <= set(np.flatnonzero(view.valid[sample]).tolist())


@pytest.mark.parametrize("keep", [9, 100])
def test_a_full_budget_keeps_everything(keep: int):
    for view in views(0):
        reduction, found = run(AirCache(keep=max(keep, view.num_visual)), view)
        for sample in range(len(view.valid)):
            assert kept(reduction.tokens, sample) == np.flatnonzero(view.valid[sample]).tolist()
        assert not found.overflow.any()


def test_a_limit_leaves_a_sample_less_room_and_a_layer_its_share_of_it():
    view, limit = cache_view(), jnp.asarray([2, 4, 9], jnp.int32)
    _, found = run(AirCache(keep=6, limit=limit), view)
    np.testing.assert_array_equal(found.wanted, [2, 4, 6])
    own = {"strength": found.strength, "skewness": found.skewness}
    for sample in range(3):
        means = {name: float(value[sample]) for name, value in own.items()}
        if means["skewness"] <= 0:
            continue
        _, shared = run(AirCache(keep=6, limit=limit, share=0.5, **means), view)
        assert int(shared.wanted[sample]) == [1, 2, 3][sample]


def test_a_sample_keeps_alone_what_it_keeps_in_the_batch():
    for view in views(4):
        method = AirCache(keep=5, strength=0.7, skewness=0.8)
        together, found = run(method, view)
        for sample in range(len(view.valid)):
            of_one = operator.itemgetter(slice(sample, sample + 1))
            alone, own = run(method, jax.tree.map(of_one, view))
            assert kept(alone.tokens, 0) == kept(together.tokens, sample)
            assert int(own.wanted[0]) == int(found.wanted[sample])


def test_the_room_is_the_same_however_little_is_wanted():
    view = cache_view()
    whole, less = (
        run(AirCache(keep=6, strength=mean, skewness=mean), view)[0].tokens for mean in (0.1, 1e6)
    )
    assert whole.indices.shape == less.indices.shape == (3, 6 + 12)
    assert (less.valid.sum(axis=1) - view.valid[:, 9:].sum(axis=1)).tolist() == [1, 1, 1]


def test_a_layer_of_text_alone_is_left():
    assert run(AirCache(keep=3), replace(cache_view(), num_visual=0))[0].tokens is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0}, "got keep=0"),
        ({"alpha": 1.5}, "alpha above 0 and at most 1, got 1.5"),
        ({"share": 0.0}, "share above 0 and at most 1, got 0.0"),
        ({"strength": 0.5}, "or neither"),
        ({"strength": 0.5, "skewness": -1.0}, "a mean skewness above 0, got -1.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        AirCache(**{"keep": 3, **options})
