"""The model `CatpJax` of VLMEvalKit (https://github.com/open-compass/VLMEvalKit). It has no
plug-ins, so this starts its `run.py` with our class among its models. Install its wheel, ms-vlmeval
(0.0.20 is what this was run with), or clone the repository and `pip install -e .` there.

    python -m catp_jax.evaluation.vlmevalkit --config config.json

config.json names the model, with the settings of `answering.Evaluated`, and the data:

    {"model": {"llama-fastv": {"class": "CatpJax", "pretrained": "DIR", "prune": "fastv",
                               "keep": "50%"}},
     "data": {"MMBench_DEV_EN": {"class": "ImageMCQDataset", "dataset": "MMBench_DEV_EN"}}}
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmeval.vlm.base import BaseModel  # pyright: ignore

from catp_jax.evaluation.answering import Asked, Evaluated
from catp_jax.readers.reading import Prompt

NEW_TOKENS = 512


class CatpJax(BaseModel):
    """Answers VLMEvalKit's messages, one at a time as they come.

    `options` are those of transformers' `generate`; answers are greedy if they do not say
    otherwise. With a chat template images and texts stay in the order of the message, otherwise
    images come first.
    """

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        pretrained: str,
        chat: bool | None = None,
        options: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if "batch_size" in settings:  # a batch is filled up with copies
            raise ValueError("VLMEvalKit asks one question at a time; leave out batch_size")
        self.evaluated = Evaluated(pretrained, is_chat=chat, **settings)
        self.options = {"max_new_tokens": NEW_TOKENS, **(options or {})}

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a message of texts and images; if there is none, why."""
        images = [part["value"] for part in message if part["type"] == "image"]
        (text,) = self.evaluated.answers(
            [Asked(self._prompt(message), lambda: images, self.options)]
        )
        return text

    def _prompt(self, message: Sequence[dict[str, str]]) -> Prompt:
        if not self.evaluated.is_chat:
            return "\n".join(part["value"] for part in message if part["type"] == "text")
        content = [
            {"type": "image"}
            if part["type"] == "image"
            else {"type": "text", "text": part["value"]}
            for part in message
        ]
        return [{"role": "user", "content": content}]


def main() -> None:
    """VLMEvalKit's command, which finds the class by its name."""
    import vlmeval.vlm  # pyright: ignore

    vlmeval.vlm.CatpJax = CatpJax
    package = Path(str(vlmeval.__file__)).parent
    places = [package / "run.py", package.parent / "run.py"]  # in the wheel, in the repository
    if not (script := next((place for place in places if place.is_file()), None)):
        sys.exit(
            f"VLMEvalKit's run.py is neither in {package} nor beside it; `pip install ms-vlmeval`, "
            "or clone https://github.com/open-compass/VLMEvalKit and `pip install -e .` there"
        )
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
