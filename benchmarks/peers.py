"""transformers' models at the sizes of our configurations, random and made where they run."""

from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.timing import Run
from convert.families import config_json


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_model(config: Any, dtype: str) -> Any:
    """A model of a configuration of ours, weights as transformers draws them, gates half open."""
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
    return model.eval()


def inputs_of(model: Any, batch: int, text: int) -> dict[str, Any]:
    """Prompts of so many text tokens with an image each, of four tiles with Llama."""
    config, where = model.config, device()
    rng = np.random.default_rng(0)
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.from_numpy(rng.integers(3, vocabulary - 3, (batch, text))).to(where)
    kind, side = config.model_type, config.vision_config.image_size
    if kind == "mllama":
        tiles = config.vision_config.max_num_tiles
        tokens[:, 0] = config.image_token_index
        shape, extra = (
            (batch, 1, tiles, 3, side, side),
            {
                # 2 × 2 tiles are number 6 of the aspect ratios
                "aspect_ratio_ids": torch.full((batch, 1), 6, device=where),
                "aspect_ratio_mask": torch.ones((batch, 1, tiles), dtype=torch.long, device=where),
                "cross_attention_mask": torch.ones(
                    (batch, text, 1, tiles), dtype=torch.long, device=where
                ),
            },
        )
    else:
        marks = torch.full((batch, config.num_query_tokens), config.image_token_index)
        shape, extra = (batch, 3, side, side), {}
        if kind == "instructblip":
            extra = {
                "qformer_input_ids": tokens % config.qformer_config.vocab_size,
                "qformer_attention_mask": torch.ones_like(tokens),
            }
        tokens = torch.cat([marks.to(where), tokens], dim=1)
    pixels = torch.randn(shape, device=where, dtype=model.dtype)
    return {
        "pixel_values": pixels,
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        **extra,
    }


def generates(model: Any, batch: int, text: int, is_compiled: bool) -> Run:
    """Greedy generation of one batch; no answer ends early."""
    return greedy(model, inputs_of(model, batch, text), is_compiled)


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
