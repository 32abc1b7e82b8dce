"""16-bit weights: every model computes nearly what it does in float32, and T5's states, which
outgrow float16, stay as finite as transformers keeps them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.generation import generate as programs
from convert import load_hf
from tests.parity import tiny, tiny_blip2, tiny_instructblip

# of the logits' scale: 8 and 11 bits of fraction, through a few layers
TOLERANCES = {"bfloat16": 4e-2, "float16": 5e-3}
OVERFLOWS = 3e4  # what float16 holds is twice as large


def inputs_of(module, config):
    if module is tiny:
        return tiny.our_inputs(tiny.batch("everything"), config, "meta")
    return module.Prompts(config, 3).ours("right")


@jax.jit
def two_tokens(model, inputs):
    """Logits after the prompt and after one token more."""
    begun = programs.prefill(model, (), inputs, new_slots=2)
    token = jnp.full(begun.logits.shape[0], 5, jnp.int32)
    again, *_ = programs.step(model, (), token, begun.cache)
    return jnp.stack([begun.logits, again], axis=1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (tiny, next(iter(tiny.CONFIGS))),
        (tiny_blip2, "opt"),
        (tiny_blip2, "t5 untied"),
        (tiny_instructblip, "vicuna grouped"),
    ],
)
def test_a_model_of_16_bits_computes_nearly_what_it_does_in_float32(module, name, dtype, tmp_path):
    hf, wide, config = module.tiny(name)
    hf.save_pretrained(tmp_path)
    narrow, _ = load_hf(tmp_path, dtype)
    inputs = inputs_of(module, config)
    reference, logits = (np.asarray(two_tokens(m, inputs), np.float32) for m in (wide, narrow))
    assert narrow.dtype == jnp.dtype(dtype)
    assert np.abs(logits - reference).max() < TOLERANCES[dtype] * np.abs(reference).max()
    assert np.abs(logits - reference).max() > 0  # it did compute in fewer bits


def test_t5_in_float16_outgrows_it_as_little_as_transformers_does(tmp_path):
    hf, _, config = tiny_blip2.tiny("t5 untied")
    hf = type(hf)(hf.config).eval()
    hf.load_state_dict(tiny_blip2.tiny_hf("t5 untied").state_dict())
    for name, parameter in hf.named_parameters():
        if name.endswith("DenseReluDense.wo.weight"):
            parameter.data *= OVERFLOWS
    hf.save_pretrained(tmp_path)
    prompts = tiny_blip2.Prompts(config, 3)
    start = torch.zeros((3, 1), dtype=torch.int64)
    with torch.no_grad():
        seen = []
        feed_forward = hf.language_model.encoder.block[0].layer[-1]
        feed_forward.register_forward_hook(lambda module, args, out: seen.append(out.abs().max()))
        reference = hf(**prompts.hf("right"), decoder_input_ids=start).logits[:, -1].numpy()
    assert max(seen) > 65504  # float16's largest number
    ours, _ = load_hf(tmp_path, "float16")
    logits = np.asarray(two_tokens(ours, prompts.ours("right")), np.float32)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, 0], reference, atol=5e-3 * np.abs(reference).max())
