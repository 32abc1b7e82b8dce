"""The training loop: deterministic, and resumed exactly."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.training.loop import Stage, adamw_stage, train, warmup_cosine_adamw


def batches(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng((5, step))
    return {
        "x": jnp.asarray(rng.normal(size=(16, 3)).astype(np.float32)),
        "y": jnp.asarray(rng.normal(size=(16, 1)).astype(np.float32)),
    }


def loss(params, frozen, batch, key):
    """Regression with noise on the inputs, so that the key matters."""
    noisy = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    error = jnp.tanh(noisy @ params["w"]) @ params["deep"]["v"] + frozen - batch["y"]
    return (error**2).mean(), {"loss": (error**2).mean()}


def stage(seed: int = 0, steps: int = 9) -> Stage:
    return Stage(
        name="toy",
        steps=steps,
        loss=loss,
        batches=batches,
        optimizer=warmup_cosine_adamw(0.05, steps, weight_decay=0.01),
        seed=seed,
        every=2,
        save_every=3,
    )


@pytest.fixture
def params():
    return {
        "w": jax.random.normal(jax.random.key(0), (3, 4)),
        "deep": {"v": jax.random.normal(jax.random.key(1), (4, 1))},
    }


def run(params, folder, seed=0, **options):
    return train(
        stage(seed), params, folder / "state", folder / "log.jsonl", frozen=jnp.zeros((1, 1)),
        **options,
    )  # fmt: skip


def equal(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), one, other)))


def lines(folder):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in found]


def test_same_seed_same_bits_other_seed_other_ones(params, tmp_path):
    first, again, other = (
        run(params, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_resumed_is_uninterrupted_to_the_bit(params, tmp_path, cut):
    whole = run(params, tmp_path / "whole")
    part = run(params, tmp_path / "cut", stop_at=cut)
    assert not equal(part, whole)
    assert equal(run(params, tmp_path / "cut"), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_killed_between_two_checkpoints_it_goes_back_to_the_last_one(params, tmp_path):
    """Step 6 was saved, steps 7 and 8 were not: they run again, and are logged once."""
    whole = run(params, tmp_path / "whole")

    def until_killed(step):
        if step == 8:
            raise KeyboardInterrupt
        return batches(step)

    killed = Stage(**{**stage().__dict__, "batches": until_killed})
    with pytest.raises(KeyboardInterrupt):
        train(killed, params, tmp_path / "cut" / "state", tmp_path / "cut" / "log.jsonl",
              frozen=jnp.zeros((1, 1)))  # fmt: skip
    assert lines(tmp_path / "cut")[-1]["step"] == 8
    assert equal(run(params, tmp_path / "cut"), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_finished_stage_is_not_run_again(params, tmp_path):
    whole = run(params, tmp_path)
    before = lines(tmp_path)
    assert equal(run(params, tmp_path), whole)
    assert lines(tmp_path) == before


def test_it_learns_and_leaves_the_callers_arrays_alone(params, tmp_path):
    kept = jax.tree.map(jnp.array, params)
    trained = run(params, tmp_path)
    assert equal(params, kept)
    assert not equal(trained, kept)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8, 9]


def test_each_part_of_the_parameters_has_a_rate_of_its_own(params, tmp_path):
    """At the rate 0 nothing moves."""
    for still, other in (("w", "deep"), ("deep", "w")):
        rates = {still: 0.0, other: 0.05}
        stage = adamw_stage("toy", 3, loss, batches, peak=rates, seed=0)
        log = tmp_path / "log.jsonl"
        found = train(stage, params, tmp_path / still, log, frozen=jnp.zeros((1, 1)))
        assert equal(found[still], params[still])
        assert not equal(found[other], params[other])
