"""Who we are compared with: transformers, on random models of the sizes of our configurations or on
a folder, and keras-hub.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.timing import Run
from convert.families import config_json

SQUARE = 6  # the number of 2 × 2 tiles among the aspect ratios


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_model(config: Any, dtype: str) -> Any:
    """A model of a configuration of ours, weights as transformers draws them, but for what starts
    at zero: gates and queries.
    """
    # no padding row: its number need not lie within a toy's vocabulary
    raw = config_json(config, pad_token_id=None)
    hf = transformers.AutoConfig.for_model(**raw)
    with torch.device(device()):
        model = transformers.AutoModelForImageTextToText.from_config(
            hf, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.5)
            if name.endswith("query_tokens"):
                parameter.normal_(std=0.02)
    return model.eval()


def inputs_of(model: Any, batch: int, text: int) -> dict[str, Any]:
    """Random prompts of so many text tokens with a random image each, of four tiles with Llama."""
    config = model.config
    rng = np.random.default_rng(0)
    side = config.vision_config.image_size
    tiles = (4,) if config.model_type == "mllama" else ()
    tokens = rng.integers(3, config.get_text_config().vocab_size - 3, (batch, text))
    return given(model, rng.normal(size=(batch, *tiles, 3, side, side)), tokens)


def given(model: Any, images: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Images [batch, 3, side, side], with Llama [batch, 4, 3, side, side], and prompts [batch, s]
    as the model's `generate` takes them. With Llama a prompt's first token becomes the image's
    mark.
    """
    config, where = model.config, device()
    tokens = torch.from_numpy(prompts.astype(np.int64)).to(where)
    pixels = torch.from_numpy(images).to(where, model.dtype)
    batch, text = prompts.shape
    extra: dict[str, Any] = {}
    if config.model_type == "mllama":
        tiles = images.shape[1]
        tokens[:, 0] = config.image_token_index
        pixels = pixels[:, None]
        whole = torch.ones((batch, text, 1, tiles), dtype=torch.long, device=where)
        extra = {
            "aspect_ratio_ids": torch.full((batch, 1), SQUARE, device=where),
            "aspect_ratio_mask": whole[:, 0],
            "cross_attention_mask": whole,
        }
    else:
        if config.model_type == "instructblip":
            extra = {
                "qformer_input_ids": tokens % config.qformer_config.vocab_size,
                "qformer_attention_mask": torch.ones_like(tokens),
            }
        marks = torch.full((batch, config.num_query_tokens), config.image_token_index)
        tokens = torch.cat([marks.to(where), tokens], dim=1)
    return {
        "pixel_values": pixels,
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        **extra,
    }


def generates(model: Any, batch: int, text: int, is_compiled: bool) -> Run:
    """Greedy generation of one batch; no answer ends early."""
    return greedy(model, inputs_of(model, batch, text), is_compiled)


def from_folder(folder: Path, dtype: str) -> Any:
    """A folder's model, where it runs."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    return model.eval().to(device())


def greedy(model: Any, given: dict[str, Any], is_compiled: bool) -> Run:
    """Greedy generation from these inputs; compiled, its parts are, and the cache is static."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if is_compiled:
        options["cache_implementation"] = "static"
    inner = getattr(model, "model", model)
    for part in ("vision_model", "qformer", "language_model"):
        if (own := getattr(inner, part, None)) is not None:
            # the model may have been compiled before
            own.eager = eager = getattr(own, "eager", own.forward)
            own.forward = torch.compile(eager) if is_compiled else eager
    for own in (model, getattr(model, "language_model", None)):
        if (generation := getattr(own, "generation_config", None)) is not None:
            generation.eos_token_id = None
            generation.pad_token_id = 0

    def run(new: int) -> np.ndarray:
        with torch.inference_mode():
            out = model.generate(**given, max_new_tokens=new, min_new_tokens=new, **options)
        return out[:, -new:].cpu().numpy()

    return run


def with_keras(folder: Path, images: np.ndarray, prompts: np.ndarray, dtype: str, kind: str) -> Run:
    import keras_hub

    backbone = keras_hub.models.BLIP2Backbone.from_preset(str(folder), dtype=dtype)
    pixels = images.transpose(0, 2, 3, 1)
    batch, length = prompts.shape
    if kind == "opt":
        model = keras_hub.models.BLIP2CausalLM(preprocessor=None, backbone=backbone)
    else:
        model = keras_hub.models.BLIP2Seq2SeqLM(preprocessor=None, backbone=backbone)

    def run(new: int) -> np.ndarray:
        first = length if kind == "opt" else 1
        room = np.zeros((batch, first + new), np.int32)
        room[:, :first] = prompts if kind == "opt" else 0
        mask = np.zeros(room.shape, bool)
        mask[:, :first] = True
        given = {"images": pixels}
        if kind == "opt":
            given |= {"token_ids": room, "padding_mask": mask}
        else:
            given |= {
                "encoder_token_ids": prompts,
                "encoder_padding_mask": np.ones(prompts.shape, bool),
                "decoder_token_ids": room,
                "decoder_padding_mask": mask,
            }
        out = model.generate(given, stop_token_ids=None)
        key = "token_ids" if kind == "opt" else "decoder_token_ids"
        return np.asarray(out[key])[:, first:]

    return run
