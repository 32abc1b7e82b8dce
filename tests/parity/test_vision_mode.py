"""Two readings of `intermediate_layers_indices`: outputs (transformers) and inputs (Meta)."""

import jax
import jax.numpy as jnp
import torch

from tests.parity.tiny import batch, hf_inputs, relative_difference, tiny


def tower(ours, inputs, mode=None):
    flat = [
        jnp.asarray(inputs[key].flatten(0, 1).numpy())
        for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    ]
    return jax.jit(lambda pixels, ids, mask: ours.vision_model(pixels, ids, mask, mode))(
        flat[0], flat[1].astype(jnp.int32), flat[2].astype(bool)
    )


def test_meta_takes_the_inputs_of_the_intermediate_layers():
    hf, ours, config = tiny("gqa")
    inputs = hf_inputs(batch("everything"), config)

    def shift(module, args, kwargs, output):
        first = args[0] if args else kwargs["hidden_states"]
        output.hidden_states = (first, *output.hidden_states[:-1])
        return output

    arguments = {
        key: inputs[key] for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    }
    hook = hf.model.vision_model.transformer.register_forward_hook(shift, with_kwargs=True)
    try:
        with torch.no_grad():
            theirs = hf.model.vision_model(**arguments).last_hidden_state.flatten(0, 1)
    finally:
        hook.remove()
    as_hf, as_meta = tower(ours, inputs), tower(ours, inputs, "meta")
    assert relative_difference(as_meta, theirs) < 1e-5
    assert relative_difference(as_hf, theirs) > 1e-2
