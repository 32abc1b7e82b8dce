"""Tiny random Llama 3.2 Vision models, in transformers and converted to ours, and inputs for both.

    hf, ours, config = tiny("gqa")
    samples = batch("everything", config)
    logits = hf(**hf_inputs(samples, config)).logits
    logits = ours(our_inputs(samples, config, mode="hf"))

Sizes differ from one another, so that a mixed-up axis cannot pass, and every parameter is drawn
anew, gates and norms too: as transformers initialises them, cross-attention would be switched off.
Inputs for transformers come from the functions of its own processor.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import MllamaConfig as HfConfig
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import (
    build_aspect_ratio_mask_np,
    convert_aspect_ratios_to_ids_np,
    pack_images,
)
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from catp_jax.models.cross_decoder import MaskMode
from catp_jax.models.mllama import Inputs, Mllama, MllamaConfig
from catp_jax.readers.mllama_packing import ProcessedImage, pack
from convert import load_hf

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "cross_attention_layers": [1, 3],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "intermediate_size": 28,
    "vision_output_dim": 48,
    "image_size": 12,
    "patch_size": 4,
    "intermediate_layers_indices": [0, 2],
    "vision_mode": "hf",  # ours; transformers keeps it and does not read it
}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gqa": (TEXT, VISION),
    # One KV head, cross-attention first and last, plain RoPE, intermediate layers out of order.
    "mqa": (
        TEXT
        | {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "cross_attention_layers": [0, 4],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "rms_norm_eps": 1e-3,
        },
        VISION | {"intermediate_layers_indices": [2, 0], "hidden_act": "quick_gelu"},
    ),
    # As many KV heads as heads, neighbouring cross-attention layers, 17 tokens in a tile.
    "mha": (
        TEXT
        | {
            "hidden_size": 36,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "cross_attention_layers": [2, 3],
            "hidden_act": "gelu",
        },
        VISION
        | {
            "hidden_size": 20,
            "attention_heads": 5,
            "num_global_layers": 1,
            "vision_output_dim": 80,
            "image_size": 16,
            "intermediate_layers_indices": [0, 1, 2],
            "norm_eps": 1e-3,
        },
    ),
}


def tiny_hf_config(name: str) -> HfConfig:
    """transformers' configuration of one of the tiny models."""
    text, vision = CONFIGS[name]
    return HfConfig(
        text_config=dict(text), vision_config=dict(vision), image_token_index=text["vocab_size"]
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew, none of them at rest; the same on every machine."""
    rng = np.random.default_rng(seed)
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        if shape == (1,):  # a gate
            drawn = rng.choice([-1, 1]) * rng.uniform(0.4, 0.9, shape)
        elif "norm" in name.lower() and name.endswith("weight"):
            drawn = rng.uniform(0.5, 1.5, shape)
        elif "embed" in name and "patch" not in name:
            drawn = rng.normal(size=shape) * 0.6
        elif len(shape) == 1:
            drawn = rng.normal(size=shape) * 0.3
        else:
            drawn = rng.normal(size=shape) * 1.2 / np.sqrt(np.prod(shape[1:]))
        parameter.data = torch.from_numpy(drawn.astype(np.float32)).to(parameter.dtype)


@functools.cache
def tiny(name: str) -> tuple[MllamaForConditionalGeneration, Mllama, MllamaConfig]:
    """A random model in transformers, and the same one saved by it and read by our converter."""
    hf = MllamaForConditionalGeneration(tiny_hf_config(name)).eval()
    randomize(hf, seed=sorted(CONFIGS).index(name))
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        ours, _ = load_hf(Path(folder))
    return hf, ours, ours.config


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt (`IMAGE` marks an image) and the tile grids (width, height) of its images."""

    tokens: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]


IMAGE = TEXT["vocab_size"]

BATCHES: dict[str, tuple[Sample, ...]] = {
    "one tile": (Sample((IMAGE, 3, 4, 5), ((1, 1),)),),
    # Right padding, 1, 2 and 4 tiles, each image at the front: no row is without an image.
    "tiles": (
        Sample((IMAGE, 3, 7), ((1, 1),)),
        Sample((IMAGE, 3, 4, 5, 6, 7, 8), ((1, 2),)),
        Sample((IMAGE, 5, 4, 3, 9), ((2, 2),)),
    ),
    # Text before the image, no image, spans, several images; rows that see no image.
    "everything": (
        Sample((1, 2, IMAGE, 3, 4, 5), ((1, 1),)),
        Sample((IMAGE, 3, 7), ((2, 2),)),
        Sample((1, 2, 3, 8), ()),
        Sample((IMAGE, IMAGE, 4, IMAGE, 9, 8, 7), ((2, 1), (1, 1), (4, 1))),
        Sample((11, IMAGE, 6, 5, 4, IMAGE, 3, 2, 9, 8), ((1, 2), (3, 1))),
    ),
    "no image": (Sample((1, 2, 3, 8, 9), ()), Sample((7, 5), ())),
}


def batch(name: str) -> tuple[Sample, ...]:
    """The prompts of a batch."""
    return BATCHES[name]


def pixels(samples: Sequence[Sample], config: MllamaConfig) -> list[list[np.ndarray]]:
    """Random tiles [tiles, 3, size, size] of every image of every sample; seeded by its place."""
    vision = config.vision
    side = (vision.num_channels, vision.image_size, vision.image_size)
    return [
        [
            np.random.default_rng([row, number])
            .normal(size=(width * height, *side))
            .astype(np.float32)
            for number, (width, height) in enumerate(sample.grids)
        ]
        for row, sample in enumerate(samples)
    ]


def hf_inputs(
    samples: Sequence[Sample], config: MllamaConfig, is_left_padded: bool = False
) -> dict[str, torch.Tensor]:
    """Keyword arguments of transformers' model, made by the functions of its processor."""
    length = max(len(sample.tokens) for sample in samples)
    ids = np.zeros((len(samples), length), np.int64)
    mask = np.zeros_like(ids)
    for row, sample in enumerate(samples):
        size = len(sample.tokens)
        place = slice(length - size, None) if is_left_padded else slice(size)
        ids[row, place], mask[row, place] = sample.tokens, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any(sample.grids for sample in samples):
        most_tiles = config.vision.max_num_tiles
        grids = [list(sample.grids) for sample in samples]
        values, num_tiles = pack_images(pixels(samples, config), most_tiles)
        spans = [get_cross_attention_token_mask(list(row), IMAGE) for row in ids]
        inputs |= {
            "pixel_values": values,
            "aspect_ratio_ids": convert_aspect_ratios_to_ids_np(grids, most_tiles),
            "aspect_ratio_mask": build_aspect_ratio_mask_np(grids, most_tiles),
            "cross_attention_mask": convert_sparse_cross_attention_mask_to_dense(
                spans, num_tiles, most_tiles, length
            ),
        }
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}


def our_images(samples: Sequence[Sample], config: MllamaConfig) -> list[list[ProcessedImage]]:
    """The same images, as `catp_jax.generation` takes them from the processor."""
    ratios = config.vision.supported_aspect_ratios
    images = []
    for sample, own in zip(samples, pixels(samples, config), strict=True):
        images.append([])
        for grid, tiles in zip(sample.grids, own, strict=True):
            padding = ((0, config.vision.max_num_tiles - len(tiles)), *[(0, 0)] * 3)
            ratio_id = ratios.index(grid) + 1
            images[-1].append(ProcessedImage(np.pad(tiles, padding), ratio_id, len(tiles)))
    return images


def our_inputs(samples: Sequence[Sample], config: MllamaConfig, mode: MaskMode) -> Inputs:
    """The same prompts and images for our model."""
    prompts = [sample.tokens for sample in samples]
    return pack(prompts, our_images(samples, config), config, mode).inputs


@contextlib.contextmanager
def meta_masks(hf: MllamaForConditionalGeneration) -> Iterator[None]:
    """Makes transformers drop the attention, too, of rows that see no image, as Meta's code does.

    transformers drops only their feed-forward branch.
    """
    sees: dict[str, torch.Tensor] = {}

    def remember(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sees["rows"] = kwargs["full_text_row_masked_out_mask"][:, 0]

    def drop(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        attended, *rest = output
        return (attended * sees["rows"], *rest)

    handles = []
    text = hf.model.language_model
    for index in text.cross_attention_layers:
        handles.append(text.layers[index].register_forward_pre_hook(remember, with_kwargs=True))
        handles.append(text.layers[index].cross_attn.register_forward_hook(drop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_difference(ours: jax.Array | np.ndarray, theirs: torch.Tensor) -> float:
    """max |Δ| over the scale of the reference, max |reference|."""
    reference = theirs.detach().numpy()
    assert reference.shape == ours.shape
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())
