"""One model in transformers and in ours, and three prompts about one image for both.

    both = Both(shallow("mini-blip2-opt"))
    assert both.answers(num_beams=2).tokens == both.tokens(num_beams=2)

transformers is asked one prompt at a time: its padding is part of what an InstructBLIP sees.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    MllamaForConditionalGeneration,
)

import catp_jax
from tests.random_instructblip import save_random
from tests.shallow import ASSETS, shallow

CLASSES: dict[str, Any] = {
    "blip-2": Blip2ForConditionalGeneration,
    "instructblip": InstructBlipForConditionalGeneration,
    "mllama": MllamaForConditionalGeneration,
}
SHALLOW = ("mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision")
NAMES = (*SHALLOW, "vicuna", "t5")
CIRCLE = ASSETS / "blue-circle.png"
PROMPTS = ["what color is the circle?", "is the square?", "what is the circle?"]
BEGUN = [" the color is", "", " the"]


def folder_of(name: str, parent: Path) -> Path:
    """A folder with the model; the random InstructBLIPs are made in `parent`."""
    return shallow(name) if name in SHALLOW else save_random(name, parent / name)


class Both:
    def __init__(self, folder: Path):
        config = AutoConfig.from_pretrained(folder)
        self.kind, self.is_t5 = config.model_type, config.text_config.model_type == "t5"
        self.theirs: Any = CLASSES[self.kind].from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        # there, text that sees no image is as in transformers
        mask_mode = "hf" if self.kind == "mllama" else None
        self.ours = catp_jax.load(folder, mask_mode=mask_mode)

    def answers(self, **options: Any) -> Any:
        """Ours, in one batch."""
        return self.ours.generate([CIRCLE] * len(PROMPTS), PROMPTS, **options)

    def expected(self, begun: list[str] | None = None, **options: Any) -> list[Any]:
        """transformers' answers, one by one, with `new`: their tokens without the prompt."""
        begun = begun or [""] * len(PROMPTS)
        return [self._expected(*each, options) for each in zip(PROMPTS, begun, strict=True)]

    def tokens(self, begun: list[str] | None = None, **options: Any) -> list[list[int]]:
        """transformers' new tokens."""
        return [out.new for out in self.expected(begun, **options)]

    def _expected(self, prompt: str, begun: str, options: dict[str, Any]) -> Any:
        inputs = self._read(prompt if self.is_t5 else prompt + begun)
        if self.kind == "instructblip":  # the Q-Former reads the prompt alone
            alone = self._read(prompt)
            inputs |= {name: alone[name] for name in alone if name.startswith("qformer")}
        length = inputs["input_ids"].shape[1]
        if self.is_t5:
            tokens = self.processor.tokenizer(begun, add_special_tokens=False)["input_ids"]
            # transformers' cache has as many layers as the encoder
            own = {"decoder_input_ids": torch.tensor([[0, *tokens]]), "use_cache": False}
            options = options | own
            length = 1 + len(tokens)
        with torch.no_grad():
            out = self.theirs.generate(
                **inputs, **options, do_sample=False, return_dict_in_generate=True
            )
        out.new = out.sequences[0, length:].tolist()
        return out

    def _read(self, text: str) -> dict[str, Any]:
        picture = Image.open(CIRCLE).convert("RGB")
        text = f"<|image|>{text}" if self.kind == "mllama" else text
        return dict(self.processor(images=picture, text=text, return_tensors="pt"))
