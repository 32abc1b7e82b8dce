"""A study's figures, on answers made up for the purpose."""

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site
from catp_jax.generation.inputs import KeptTokens
from catp_jax.models.mllama import MllamaConfig
from catp_jax.pruning import KNorm
from catp_jax.study.cost import cross_bytes_per_token
from catp_jax.study.sweep import Setting, kl_divergence, sweep
from catp_jax.study.tasks import Example


def example(number, answer):
    return Example(Path("x.png"), f"question {number}", answer, str(number), number)


class Parrot:
    """Answers "yes" to everything; pruned, "no" to what has an odd number."""

    dtype, sites = jnp.float32, frozenset({Site.CROSS})
    config = MllamaConfig.llama_3_2_11b()

    def __init__(self):
        self.batches = []

    def prepare(self, images, prompts):
        rows = jnp.zeros(len(prompts))
        return SimpleNamespace(prompts=prompts, available=(100,) * len(prompts), inputs=rows)

    def generate_packed(self, packed, pruners, *, max_new_tokens):
        self.batches.append(len(packed.prompts))
        odd = [int(prompt.split()[1]) % 2 for prompt in packed.prompts]
        kept, slots, bias = None, 128, 0.0
        if pruners:
            assert list(pruners) == [KNorm(keep=7)]
            here = np.arange(7)
            kept = [KeptTokens(here, here, here, here, here) for _ in odd]
            slots, bias = 7, 1.0
        return SimpleNamespace(
            text=["no" if pruners and o else "yes" for o in odd],
            logits=np.array([[bias * o, 0.0] for o in odd]),
            available=packed.available,
            kept=kept,
            slots=slots,
        )


def test_accuracy_agreement_divergence_and_bytes_are_of_the_questions_asked():
    examples = [example(n, "yes" if n < 4 else "no") for n in range(5)]
    parrot = Parrot()
    full, pruned = sweep(parrot, examples, [Setting("k_norm", 7)], batch=3)
    assert set(parrot.batches) == {3}  # the short last batch is filled up

    assert (full.accuracy, full.agreement, full.kl) == (0.8, 1.0, 0.0)
    assert (full.visual_tokens, full.cross_kv_bytes) == (100, 128 * 64 * 1024)
    assert pruned.answers == ("yes", "no", "yes", "no", "yes")
    assert pruned.accuracy == pytest.approx(2 / 5)
    assert pruned.agreement == pytest.approx(3 / 5)
    assert (pruned.visual_tokens, pruned.cross_kv_bytes) == (7, 7 * 64 * 1024)
    half, odd = np.array([0.5, 0.5]), np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    expected = (half * np.log(half / odd)).sum() * 2 / 5
    assert pruned.kl == pytest.approx(expected)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="at least one example"):
        list(sweep(Parrot(), [], []))


def test_divergence_of_far_apart_logits_is_finite():
    far = kl_divergence(np.array([[1000.0, 0.0]]), np.array([[0.0, 1000.0]]))
    assert far == pytest.approx([1000.0])


def test_cross_attention_bytes_of_the_real_sizes():
    assert cross_bytes_per_token(MllamaConfig.llama_3_2_11b(), jnp.bfloat16) == 32 * 1024
    assert cross_bytes_per_token(MllamaConfig.llama_3_2_90b(), jnp.bfloat16) == 80 * 1024


def test_every_shape_is_compiled_before_anything_is_timed():
    calls = []

    class Recorder(Parrot):
        def prepare(self, images, prompts):
            packed = super().prepare(images, prompts)
            packed.inputs = jnp.zeros(1 if "question 0" in prompts else 2)
            return packed

        def generate_packed(self, packed, pruners, *, max_new_tokens):
            calls.append((packed.inputs.shape, bool(pruners)))
            return super().generate_packed(packed, pruners, max_new_tokens=max_new_tokens)

    list(sweep(Recorder(), [example(n, "yes") for n in range(9)], [Setting("k_norm", 7)], batch=3))
    every = {((1,), False), ((1,), True), ((2,), False), ((2,), True)}
    assert len(calls) == 4 + 6
    assert set(calls[:4]) == every
