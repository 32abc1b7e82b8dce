"""The decode loop, on a model that reads its tokens off a script."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.struct import pytree, replace

END, OTHER_END, PAD = 7, 8, 0
calls: list[int] = []


@pytree
class Start:
    """A prompt without an image."""

    view: None = None


@pytree
class Scripted:
    """Gives `script[t]` [b] as its greedy tokens, whatever it is fed, and counts its steps.

    Its cache is the number of the next token.
    """

    script: Any

    sites = frozenset()

    def front(self, inputs: Any) -> Start:
        return Start()

    def back(self, front: Any, select: Any, room: Any) -> tuple[Any, Any]:
        return self._logits(0), jnp.asarray(1, jnp.int32)

    def step(self, tokens: Any, cache: Any, select: Any) -> tuple[Any, Any]:
        io_callback(lambda n, fed: calls.append((int(n), fed.tolist())), None, cache, tokens)
        return self._logits(cache), cache + 1

    def _logits(self, number: Any) -> Any:
        return jax.nn.one_hot(self.script[number], 10)


def scripted(script: list[list[int]], room: int = 0) -> Scripted:
    rows = np.full((max(room, len(script)), len(script[0])), 5)
    rows[: len(script)] = script
    return Scripted(script=jnp.asarray(rows, jnp.int32))


def stopped(new: int, ends: tuple[int, ...] = (END, OTHER_END)) -> Stop:
    return Stop(
        ends=jnp.asarray(ends, jnp.int32), pad=jnp.asarray(PAD, jnp.int32), max_new_tokens=new
    )


def run(script: list[list[int]], new: int, ends: tuple[int, ...] = (END, OTHER_END)) -> Any:
    calls.clear()
    out = programs.generate(
        scripted(script, new), (), None, sampling(len(script[0])), stopped(new, ends)
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    return out


def test_padding_follows_the_end_and_lengths_count_it():
    out = run([[1, 2, END], [3, 8, 4], [END, 5, 6], [9, 9, 9]], new=6)
    assert out.tokens.tolist() == [
        [1, 3, END, PAD, PAD, PAD],
        [2, OTHER_END, PAD, PAD, PAD, PAD],
        [END, PAD, PAD, PAD, PAD, PAD],
    ]
    assert out.lengths.tolist() == [3, 2, 1]


def test_the_loop_stops_when_every_sample_has_ended():
    run([[1, 2], [3, END], [END, 4], [5, 5]], new=30)
    assert [number for number, _ in calls] == [1, 2]


def test_a_batch_that_ends_at_once_takes_no_step():
    out = run([[END, OTHER_END]], new=30)
    assert calls == []
    assert out.lengths.tolist() == [1, 1]


def test_a_sample_that_has_ended_is_fed_padding():
    run([[1, END], [2, 6], [3, 6], [END, 6]], new=30)
    assert calls == [(1, [1, END]), (2, [2, PAD]), (3, [3, PAD])]


def test_without_an_end_the_number_of_new_tokens_is_exact():
    out = run([[1, 2], [3, 4], [5, 6], [1, END]], new=3)
    assert out.tokens.tolist() == [[1, 3, 5], [2, 4, 6]]
    assert out.lengths.tolist() == [3, 3]
    assert len(calls) == 2  # the last token is not fed back


def test_one_new_token_needs_the_prefill_alone():
    out = run([[4, END]], new=1)
    assert out.tokens.tolist() == [[4], [END]]
    assert out.lengths.tolist() == [1, 1]
    assert calls == []


def test_the_end_may_be_the_last_token():
    out = run([[1, 2], [END, 3], [4, END]], new=3)
    assert out.lengths.tolist() == [2, 3]
    assert out.tokens.tolist() == [[1, END, PAD], [2, 3, END]]


def test_a_model_without_end_tokens_runs_to_the_number_asked_for():
    out = run([[END, 1]], new=4, ends=())
    assert out.tokens.tolist() == [[END, 5, 5, 5], [1, 5, 5, 5]]
    assert out.lengths.tolist() == [4, 4]


def test_padding_may_be_an_end_token():
    # many checkpoints pad with their end token
    out = run([[1, PAD], [PAD, 3], [4, 4]], new=4, ends=(PAD,))
    assert out.tokens.tolist() == [[1, PAD, PAD, PAD], [PAD, PAD, PAD, PAD]]
    assert out.lengths.tolist() == [2, 1]


def test_logits_are_those_of_the_first_new_token():
    out = run([[1, 2], [3, 4]], new=2)
    assert out.logits.argmax(axis=1).tolist() == [1, 2]


def test_a_batch_without_images_reports_no_selection():
    out = run([[1]], new=1)
    assert out.selection.kept is None
    assert out.selection.states == ()


@pytest.mark.parametrize("new", [1, 5])
def test_prefill_and_steps_follow_the_same_script(new: int):
    script = Scripted(script=jnp.asarray([[1, 2], [3, 4], [5, 6], [7, 8], [9, 9]], jnp.int32))
    start = programs.prefill(script, (), None, new_slots=new)
    tokens, logits, cache = [], start.logits, start.cache
    for _ in range(new):
        tokens.append(logits.argmax(axis=1).astype(jnp.int32))
        logits, cache, _ = programs.step(
            replace(script, script=jnp.concatenate([script.script, script.script[:1]])),
            (),
            tokens[-1],
            cache,
        )
    assert jnp.stack(tokens).tolist() == script.script[:new].tolist()


def test_a_cache_with_too_little_room_is_refused():
    model, how = scripted([[1, 2]], 9), sampling(2)
    start = programs.prefill(model, (), None, new_slots=3)
    programs.begin(start, how, stopped(4))  # the last token takes no slot
    with pytest.raises(ValueError, match=r"room for 3 new tokens .* give prefill new_slots=5"):
        programs.begin(start, how, stopped(5))


def test_single_steps_are_the_loop_one_token_at_a_time():
    rows = [[1, 2, END], [3, 8, 4], [END, 5, 6], [9, 9, 9]]
    model, how, stop = scripted(rows), sampling(3), stopped(6)
    carry = programs.begin(programs.prefill(model, (), None, new_slots=6), how, stop)
    seen = [carry.state.written.tokens[:, 0]]
    while carry.state.is_open.any():
        carry = programs.advance(model, (), carry, how, stop)
        seen.append(carry.last)
    np.testing.assert_array_equal(jnp.stack(seen, axis=1), run(rows, 6).tokens[:, : len(seen)])
    np.testing.assert_array_equal(how.answers(carry.state).tokens, run(rows, 6).tokens)
