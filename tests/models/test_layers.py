"""catp_jax.models.layers against transformers' and torch's own functions."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaRotaryEmbedding,
    MllamaTextRMSNorm,
    apply_rotary_pos_emb,
)

from catp_jax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Llama3Scaling,
    RmsNorm,
    RopeConfig,
    rope_angles,
    rotate,
)

LLAMA_3_2 = RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def hf_text_config(rope: RopeConfig, head_dim: int) -> MllamaTextConfig:
    parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_max_position_embeddings,
        }
    return MllamaTextConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=parameters
    )


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA_3_2,
        RopeConfig(10000.0, Llama3Scaling(32.0, 1.0, 4.0, 32)),
        RopeConfig(10000.0, Llama3Scaling(4.0, 0.5, 9.0, 512)),
    ],
)
@pytest.mark.parametrize("head_dim", [4, 64, 128])
def test_llama3_frequencies_are_transformers_own(rope: RopeConfig, head_dim: int):
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](hf_text_config(rope, head_dim))
    assert factor == 1.0
    np.testing.assert_allclose(rope.frequencies(head_dim), theirs.numpy(), rtol=1e-6)


def test_scaling_stretches_the_long_waves_alone():
    plain = RopeConfig(LLAMA_3_2.theta, None).frequencies(128)
    ratio = plain / LLAMA_3_2.frequencies(128)
    np.testing.assert_allclose(ratio[:20], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[-20:], 8, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-5).all()


@pytest.mark.parametrize("rope", [LLAMA_3_2, RopeConfig(500.0, None)])
def test_rotation_is_transformers_own(rope: RopeConfig):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)  # batch, rows, heads, channels
    positions = rng.integers(0, 3000, (2, 5))
    cos, sin = MllamaRotaryEmbedding(hf_text_config(rope, 16))(
        torch.from_numpy(x), torch.from_numpy(positions)
    )
    theirs, _ = apply_rotary_pos_emb(torch.from_numpy(x), torch.from_numpy(x), cos, sin, 2)
    ours = rotate(jnp.asarray(x), *rope_angles(jnp.asarray(positions, jnp.int32), rope, 16))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-4)  # angles up to 3000 in float32


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_a_name_is_the_one_of_transformers(name: str):
    x = np.linspace(-6, 6, 201, dtype=np.float32)
    theirs = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), theirs, atol=1e-6)


def test_exact_gelu_is_not_its_approximation():
    x = jnp.linspace(-3, 3, 50)
    assert jnp.abs(ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_new"](x)).max() > 1e-4


def test_rms_norm_is_transformers_own():
    rng = np.random.default_rng(0)
    x, scale = (rng.normal(size=shape).astype(np.float32) for shape in [(3, 7, 12), (12,)])
    theirs = MllamaTextRMSNorm(12, eps=1e-3)
    theirs.weight.data = torch.from_numpy(scale)
    ours = RmsNorm(12, 1e-3)
    ours.scale.set_value(jnp.asarray(scale))
    np.testing.assert_allclose(
        ours(jnp.asarray(x)), theirs(torch.from_numpy(x)).detach(), atol=1e-6
    )


def test_layer_norm_is_torchs_own_far_from_zero():
    """At a mean of 1000, E[x²] - E[x]² in float32 would be wrong."""
    x = 1000 + np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    ours = LayerNorm(12, 1e-5)
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(x), (12,), eps=1e-5)
    np.testing.assert_allclose(ours(jnp.asarray(x)), theirs.numpy(), atol=1e-3)
