"""The rule table against transformers' own models, in every layout, up to the 90B."""

import re

import pytest
import torch
from transformers import MllamaConfig as HfConfig
from transformers import MllamaForConditionalGeneration

from catp_jax.leaves import named
from catp_jax.models.mllama import MllamaConfig
from convert import abstract
from convert.families import config_json, parse_config
from convert.mllama import MLLAMA, detect_layout

PRESETS = {
    "11b": (MllamaConfig.llama_3_2_11b(), 906, 10_670_220_835),
    "90b": (MllamaConfig.llama_3_2_90b(), 1494, None),
}


def to_hub(name: str) -> str:
    """What transformers renames when it saves; written down from what it wrote."""
    for pattern, new in [
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
    ]:
        name = re.sub(pattern, new, name)
    return name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_of_the_real_models_has_its_place(preset: str):
    config, count, parameters = PRESETS[preset]
    raw = config_json(config)
    assert parse_config(raw) == config
    with torch.device("meta"):
        state = MllamaForConditionalGeneration(HfConfig.from_dict(raw)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert len(shapes) == count
    if parameters is not None:
        assert sum(tensor.numel() for tensor in state.values()) == parameters
    ours = {name: leaf.shape for name, leaf in named(abstract(config)).items()}
    assert len(ours) == count

    layout = MLLAMA.layout_of(shapes, preset)
    found = MLLAMA.names(ours, config, layout).match(shapes, ours, preset)
    assert (layout.name, found.twins, found.ignored) == ("transformers 5", [], {})
    assert {one.source for one in found.filled.values()} == shapes.keys()
    assert {one.target for one in found.filled.values()} == ours.keys()

    hub = {to_hub(name): shape for name, shape in shapes.items()}
    layout = MLLAMA.layout_of(hub, preset)
    on_hub = MLLAMA.names(ours, config, layout).match(hub, ours, preset)
    assert layout.name == "hub"
    assert {one.target: one.source for one in on_hub.filled.values()} == {
        one.target: to_hub(one.source) for one in found.filled.values()
    }


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("language_model.model.norm.weight", "hub"),
        ("language_model.lm_head.weight", "hub"),
        ("model.vision_model.class_embedding", "transformers 5"),
        ("language_model.norm.weight", "base class"),
    ],
)
def test_layout_is_told_by_the_names(name: str, layout: str):
    found = detect_layout(["multi_modal_projector.bias", name], "folder")
    assert found.name == layout
    assert found.from_hub(found.to_hub(name)) == name


def test_mixed_layouts_are_refused():
    names = ["language_model.model.norm.weight", "model.language_model.norm.weight"]
    with pytest.raises(ValueError, match="folder mixes tensors named in different ways"):
        detect_layout(names, "folder")
