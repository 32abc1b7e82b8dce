"""AttentionPredictor against slow loops, and by hand."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site, View
from catp_jax.pruning import attention_predictor
from catp_jax.pruning.attention_predictor import (
    AttentionPredictor,
    Network,
    hit_rate,
    pooled,
)
from catp_jax.struct import replace
from tests.pruning.oracles import attention_row
from tests.pruning.views import cache_view, kept, random_view, shown, view_of_weights

HEADS = 3  # of keys, in every view
start = jax.jit(lambda method, view: method.start(view))
step = jax.jit(lambda method, view, state: method(view, state))


def network(seed: int = 0) -> Network:
    """One with much larger numbers than at its start, so that blocks differ clearly."""
    return jax.tree.map(lambda array: array * 3, Network.start(jax.random.key(seed)))


def method_of(keep: int = 4, **options: Any) -> AttentionPredictor:
    return AttentionPredictor(
        **{"keep": keep, "network": network(), "block": 2, "rows": 5, "refresh": 3, **options}
    )


VIEWS = {
    "text too": replace(cache_view(1), site=Site.READ),
    "visual": replace(random_view(2), site=Site.READ, tokens=None),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def new_rows(view: View, seed: int, rows: int = 1) -> View:
    """What a step shows that reads the same tokens."""
    batch, _, heads, channels = view.attention.queries.shape
    queries = np.random.default_rng(seed).normal(size=(batch, rows, heads, channels)) * 1.5
    return replace(
        view,
        attention=replace(view.attention, queries=jnp.asarray(queries, jnp.float32)),
        sees=jnp.repeat(view.valid[:, None], rows, axis=1),
    )


def alone(tree: Any, sample: int) -> Any:
    return jax.tree.map(lambda array: array[sample : sample + 1], tree)


def visual_of(view: View, sample: int) -> list[int]:
    is_visual = np.asarray(view.valid[sample] & (view.numbers[sample] >= 0))
    return np.flatnonzero(is_visual[: view.num_visual]).tolist()


def text_of(view: View, sample: int) -> list[int]:
    return np.flatnonzero(view.valid[sample] & (np.arange(view.valid.shape[1]) >= view.num_visual))


def loop_network(net: Network, history: np.ndarray, real: Sequence[int]) -> np.ndarray:
    """The prediction for one history [rows, blocks] with these real blocks."""
    rows, blocks = history.shape
    maps = np.zeros((1, rows, blocks))
    maps[0][:, real] = history[:, real]
    for layer in (net.conv1, net.conv2):
        weight, bias = np.asarray(layer.weight, np.float64), np.asarray(layer.bias, np.float64)
        found = np.zeros((len(bias), rows, blocks))
        for out in range(len(bias)):
            for row in range(rows):
                for column in real:
                    total = bias[out]
                    for down in (-1, 0, 1):
                        for right in (-1, 0, 1):
                            if 0 <= row + down < rows and 0 <= column + right < blocks:
                                there = maps[:, row + down, column + right]
                                total += there @ weight[out, :, down + 1, right + 1]
                    found[out, row, column] = max(total, 0)
        maps = found
    predicted = np.zeros(blocks)
    for column in real:
        predicted[column] = float(net.conv3.bias[0])
        for channel in range(maps.shape[0]):
            mean = sum(maps[channel, :, column]) / rows
            predicted[column] += mean * float(net.conv3.weight[0, channel, 0])
    return predicted


def loop_row(
    sample: tuple[np.ndarray, np.ndarray, np.ndarray],
    rows: Sequence[int],
    head: int,
    block: int,
    visual: int,
    among: Sequence[int] | None = None,
) -> list[float]:
    """One pooled row of a key-value head, the highest of these rows, reading only `among`."""
    queries, keys, sees = sample
    if among is not None:
        sees = sees & np.isin(np.arange(len(keys)), among)
    group = queries.shape[1] // keys.shape[1]
    found = [0.0] * -(-visual // block)
    for row in rows:
        for query_head in range(head * group, (head + 1) * group):
            weights = attention_row(queries, keys, sees, row, query_head)
            for column in range(visual):
                found[column // block] = max(found[column // block], weights[column])
    return found


def loop_start(view: View, sample: int, head: int, rows: int, block: int) -> np.ndarray:
    arrays = shown(view, sample)
    history = np.zeros((rows, -(-view.num_visual // block)))
    seeing = [row for row in range(len(arrays[2])) if any(arrays[2][row])][-rows:]
    for place, row in enumerate(seeing, start=rows - len(seeing)):
        history[place] = loop_row(arrays, [row], head, block, view.num_visual)
    return history


def test_the_network_is_what_loops_give_and_has_4833_parameters():
    net = network(1)
    assert sum(leaf.size for leaf in jax.tree.leaves(net)) == 4833
    history = np.random.default_rng(0).uniform(size=(2, 3, 5, 7)).astype(np.float32)
    real = np.ones((2, 3, 7), bool)
    real[0, 1, [0, 3]] = real[1, 2, 5:] = False
    found = net(jnp.asarray(history), jnp.asarray(real))
    for place in np.ndindex(2, 3):
        expected = loop_network(net, history[place].astype(np.float64), np.flatnonzero(real[place]))
        np.testing.assert_allclose(found[place], expected, rtol=1e-5, atol=1e-5)


def test_what_stands_in_blocks_that_are_not_real_and_how_many_they_are_changes_nothing():
    net = network(2)
    rng = np.random.default_rng(1)
    history = jnp.asarray(rng.uniform(size=(4, 6)), jnp.float32)
    real = jnp.ones(6, bool)
    garbage = jnp.full((4, 3), 100, jnp.float32)
    wide = net(jnp.concatenate([history, garbage], axis=1), jnp.arange(9) < 6)
    np.testing.assert_allclose(wide[:6], net(history, real), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(wide[6:], 0)
    without = real.at[2].set(False)
    np.testing.assert_array_equal(
        net(history, without), net(history.at[:, 2].set(jnp.nan), without)
    )


def test_hand_made_the_highest_of_a_group_and_of_a_block():
    weights = jnp.asarray([[0.1, 0.2, 0.0, 0.4, 0.3], [0.3, 0.0, 0.1, 0.1, 0.5]] * 2)
    weights = weights.at[3, 4].set(0.9)[None, :, None]  # four heads, one row
    np.testing.assert_allclose(
        pooled(weights, 2, 2), np.asarray([[[[0.3, 0.4, 0.5]], [[0.3, 0.4, 0.9]]]], np.float32)
    )


@every_view
@pytest.mark.parametrize(("rows", "block"), [(3, 2), (5, 4), (30, 3)])
def test_a_history_begins_with_the_prompts_last_rows(view: View, rows: int, block: int):
    """Zeros stand before them where there are fewer."""
    state = start(method_of(block, block=block, rows=rows), view)
    assert state.steps.tolist() == [0] * len(view.valid)
    for sample in range(len(view.valid)):
        for head in range(HEADS):
            expected = loop_start(view, sample, head, rows, block)
            np.testing.assert_allclose(state.history[sample, head], expected, rtol=1e-5, atol=1e-6)


def test_a_history_that_is_made_in_parts_is_the_same(monkeypatch):
    view = VIEWS["text too"]
    whole = method_of().start(view).history
    monkeypatch.setattr(attention_predictor, "LOGITS_AT_ONCE", 2 * 3 * 6 * 21)
    np.testing.assert_allclose(method_of().start(view).history, whole, rtol=1e-6, atol=1e-7)


@every_view
@pytest.mark.parametrize(("rows", "keep", "block"), [(1, 4, 2), (3, 4, 4), (3, 2, 1)])
def test_steps_read_and_remember_what_the_loops_do(view: View, rows: int, keep: int, block: int):
    """Four steps; the third remembers a row of all tokens."""
    method = method_of(keep, block=block)
    state = start(method, view)
    number, visual = keep // block, view.num_visual
    for now in range(4):
        shows = new_rows(view, now, rows)
        reduction, after = step(method, shows, state)
        for sample in range(len(view.valid)):
            own, text = visual_of(view, sample), text_of(view, sample)
            real = sorted({token // block for token in own})
            for head in range(HEADS):
                history = np.asarray(state.history[sample, head], np.float64)
                scores = loop_network(method.network, history, real)
                best = sorted(real, key=lambda some: (-scores[some], some))[:number]
                read = [token for token in own if token // block in best]
                assert kept(reduction.tokens, sample, head) == [*read, *text]
                among = None if now % 3 == 2 else [*read, *text]
                row = loop_row(shown(shows, sample), range(rows), head, block, visual, among)
                np.testing.assert_allclose(
                    after.history[sample, head], [*history[1:], row], rtol=1e-5, atol=1e-6
                )
        state = after
    assert state.steps.tolist() == [4] * len(view.valid)


def the_mean(rows: int) -> Network:
    """A network that expects the mean of the history."""
    nothing = jax.tree.map(jnp.zeros_like, network())
    conv1 = replace(nothing.conv1, weight=nothing.conv1.weight.at[0, 0, 1, 1].set(1))
    conv2 = replace(nothing.conv2, weight=nothing.conv2.weight.at[0, 0, 1, 1].set(1))
    return Network(
        conv1=conv1,
        conv2=conv2,
        conv3=replace(nothing.conv3, weight=nothing.conv3.weight.at[0, 0, 0].set(rows)),
    )


def test_hand_made_a_network_that_expects_the_mean_reads_what_was_attended_to():
    #          blocks   ┌─────────┐┌─────────┐┌─────────┐┌──┐
    row = [[0.02, 0.28, 0.1, 0.1, 0.06, 0.2, 0.24]]
    view = replace(view_of_weights([row]), site=Site.READ)
    method = method_of(4, network=the_mean(5))
    state = start(method, view)
    np.testing.assert_allclose(state.history[0, 0, -1], [0.28, 0.1, 0.2, 0.24], rtol=1e-5)
    reduction, after = step(method, view, state)
    assert kept(reduction.tokens, 0, 0) == [0, 1, 6]
    read = 0.02 + 0.28 + 0.24
    np.testing.assert_allclose(after.history[0, 0, -1], [0.28 / read, 0, 0, 0.24 / read], rtol=1e-5)
    assert kept(step(replace(method, keep=6), view, state)[0].tokens, 0, 0) == [0, 1, 4, 5, 6]


def test_of_equal_blocks_the_earlier_are_read_and_none_in_part():
    """A block of which only one token may be read doesn't make room for another's."""
    view = VIEWS["visual"]
    method = method_of(4, network=jax.tree.map(jnp.zeros_like, network()))
    tokens = step(method, new_rows(view, 0), start(method, view))[0].tokens
    assert tokens.indices.shape == (5, HEADS, 4)
    for head in range(HEADS):
        assert kept(tokens, 0, head) == [0, 1, 2, 3]
        assert kept(tokens, 2, head) == []  # it has no image
        assert kept(tokens, 4, head) == [0, 1, 2]  # no row sees the fourth
    assert visual_of(view, 4) == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0}, "got keep=0"),
        ({"keep": 5}, "whole blocks of 2 visual tokens, got keep=5; give it 4 or 6"),
        ({"keep": 3, "block": 16}, "blocks of 16 visual tokens, got keep=3; give it 16$"),
        ({"block": 0}, "wants block at least 1, got 0"),
        ({"rows": 0}, "wants rows at least 1, got 0"),
        ({"refresh": -1}, "wants refresh at least 1, got -1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, int], says: str):
    with pytest.raises(ValueError, match=says):
        method_of(**options)


@every_view
@pytest.mark.parametrize("keep", [14, 100])
def test_a_full_budget_reads_everything(view: View, keep: int):
    method = method_of(keep)
    for limit in (None, view.valid.sum(axis=1, dtype=jnp.int32)):
        limited = replace(method, limit=limit)
        tokens = step(limited, new_rows(view, 0), start(method, view))[0].tokens
        for sample, head in np.ndindex(len(view.valid), HEADS):
            assert kept(tokens, sample, head) == np.flatnonzero(view.valid[sample]).tolist()


def test_a_sample_may_be_limited_to_fewer_blocks_and_to_one_at_least():
    view = VIEWS["visual"]
    method = method_of(6)
    state, shows = start(method, view), new_rows(view, 0)
    limited = replace(method, limit=jnp.asarray([5, 3, 4, 1, 6], jnp.int32))
    found = step(limited, shows, state)[0].tokens
    for sample, keep in enumerate((4, 2, 4, 2, 6)):
        expected = step(replace(method, keep=keep), shows, state)[0].tokens
        for head in range(HEADS):
            assert kept(found, sample, head) == kept(expected, sample, head)
    assert 0 < len(kept(found, 3, 0)) <= 2


@every_view
def test_a_sample_is_the_same_alone_as_in_the_batch(view: View):
    method = method_of(4, limit=jnp.asarray([4, 2, 3, 4, 1][: len(view.valid)], jnp.int32))
    state = start(method, view)
    own = [start(alone(method, n), alone(view, n)) for n in range(len(view.valid))]
    for now in range(4):
        shows = new_rows(view, now)
        reduction, state = step(method, shows, state)
        for sample in range(len(own)):
            mine = replace(method, limit=alone(method.limit, sample))
            reduced, own[sample] = step(mine, alone(shows, sample), own[sample])
            for head in range(HEADS):
                found = kept(reduction.tokens, sample, head)
                assert found == kept(reduced.tokens, 0, head)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        state,
        jax.tree.map(lambda *parts: jnp.concatenate(parts), *own),
    )


@every_view
def test_padding_of_the_visual_tokens_changes_nothing(view: View):
    """More room for them, in more blocks: what stands there is not read."""
    pad = 5

    def wider(array: Any, axis: int, fill: float) -> Any:
        first, rest = jnp.split(array, [view.num_visual], axis=axis)
        shape = (*first.shape[:axis], pad, *first.shape[axis + 1 :])
        return jnp.concatenate([first, jnp.full(shape, fill, array.dtype), rest], axis=axis)

    def wide(some: View) -> View:
        return replace(
            some,
            num_visual=view.num_visual + pad,
            attention=replace(some.attention, keys=wider(some.attention.keys, 1, 30)),
            values=wider(some.values, 1, 30),
            numbers=wider(some.numbers, 1, -1),
            valid=wider(some.valid, 1, False),
            sees=wider(some.sees, 2, False),
        )

    method = method_of(4)
    state, roomy = start(method, view), start(method, wide(view))
    for now in range(4):
        shows = new_rows(view, now)
        reduction, state = step(method, shows, state)
        reduced, roomy = step(method, wide(shows), roomy)
        for sample, head in np.ndindex(len(view.valid), HEADS):
            found = np.asarray(kept(reduced.tokens, sample, head), int)
            found = np.where(found >= view.num_visual, found - pad, found)
            assert found.tolist() == kept(reduction.tokens, sample, head)
    blocks = state.history.shape[3]
    np.testing.assert_allclose(roomy.history[..., :blocks], state.history, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(roomy.history[..., blocks:], 0)


def test_only_every_fifth_row_tells_of_tokens_that_were_not_read():
    """Other rows are the same, whatever the other keys are."""
    view = VIEWS["text too"]
    method = method_of(2, refresh=5)
    state, shows = start(method, view), new_rows(view, 0)
    tokens = step(method, shows, state)[0].tokens
    is_read = jax.nn.one_hot(tokens.indices, 21, dtype=bool) & tokens.valid[..., None]
    is_read = jnp.swapaxes(is_read.any(axis=2), 1, 2)[..., None]
    keys = jnp.where(is_read, shows.attention.keys, 0.3)
    other = replace(shows, attention=replace(shows.attention, keys=keys))
    for steps_before in range(10):
        now = replace(state, steps=jnp.full(3, steps_before, jnp.int32))
        rows = [step(method, some, now)[1].history[:, :, -1] for some in (shows, other)]
        is_same = steps_before % 5 != 4
        assert bool((rows[0] == rows[1]).all()) == is_same
        assert int((rows[0][0] > 0).sum()) == (HEADS if is_same else HEADS * 5)


def test_a_prompt_that_has_ended_asks_for_no_row_of_all_tokens():
    """It keeps its number of steps, which may be one at which a row was due."""
    view = VIEWS["text too"]
    method = method_of(2, refresh=5)
    state = replace(start(method, view), steps=jnp.asarray([4, 7, 7], jnp.int32))
    row = step(method, new_rows(view, 0), state)[1].history[:, :, -1]
    assert int((row > 0).sum()) == 3 * HEADS
    state = replace(state, steps=jnp.asarray([7, 9, 9], jnp.int32))
    row = step(method, new_rows(view, 0), state)[1].history[:, :, -1]
    assert [int((of > 0).sum()) for of in row] == [HEADS, HEADS * 3, HEADS * 5]


def test_a_layer_that_reads_text_alone_is_left():
    view = replace(VIEWS["text too"], num_visual=0)
    method = method_of()
    state = method.start(view)
    reduction, after = method(new_rows(view, 0), state)
    assert reduction.tokens is None
    assert after is state
    assert state.history.shape == (3, HEADS, 5, 0)


def products(jaxpr: Any, inside: bool = False) -> Iterator[tuple[bool, set[int]]]:
    """Each matrix product, and whether it is in a branch: the sizes of all it has to do with."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            arrays = [*equation.invars, *equation.outvars]
            yield inside, {size for array in arrays for size in array.aval.shape}
        branch = inside or equation.primitive.name == "cond"
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda some: hasattr(some, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner, branch)


def test_a_step_multiplies_with_all_keys_in_a_branch_alone():
    view = replace(cache_view(visual=42, text=11), site=Site.READ)
    method = method_of(4)
    shows, state = new_rows(view, 0), method.start(view)
    traced = jax.jit(lambda *given: method(*given)).trace(shows, state).jaxpr
    found = [*products(traced.jaxpr)]
    assert [is_branch for is_branch, sizes in found if 42 + 11 in sizes] == [True]
    assert [is_branch for is_branch, sizes in found if 4 + 11 in sizes] == [False]
    assert len(found) == 2


def test_hit_rate_is_the_share_of_the_best_that_is_among_the_predicted():
    true = jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    predicted = jnp.asarray([[9.0, 1.0, 5.0, 2.0], [-4.0, -3.0, -2.0, -1.0]])
    assert hit_rate(predicted, true, 2).tolist() == [0.5, 1.0]
    assert hit_rate(predicted, true, 1).tolist() == [1.0, 1.0]
    assert hit_rate(predicted, true, 9).tolist() == [1.0, 1.0]
    real = jnp.asarray([[False, True, True, True], [False] * 4])
    assert hit_rate(predicted, true, 1, real).tolist() == [0.0, 0.0]
    assert hit_rate(predicted, true, 2, real).tolist() == [0.5, 0.0]
