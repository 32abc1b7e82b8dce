"""BLIP-2's readers: one square image a prompt, which stands in front of the text.

Checkpoints older than the `<image>` placeholder and newer ones are read alike: the placeholders are
not made here, since the model puts its queries in front of the text by itself.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from catp_jax.contract import Site
from catp_jax.generation.blip2_inputs import KeptQueries, pack
from catp_jax.generation.images import ImageLike, read_image
from catp_jax.generation.inputs import Packed
from catp_jax.models.blip2 import Blip2Config, Blip2Inputs
from catp_jax.models.opt import Opt, OptConfig
from catp_jax.models.retrieval import RetrievalConfig
from catp_jax.models.t5 import T5
from catp_jax.models.vit import VitConfig
from catp_jax.pruning.scores import attention
from catp_jax.readers.reading import (
    Done,
    Kept,
    Prompt,
    Question,
    check_processor,
    load_processor,
    remember,
    stretched,
)

PLACEHOLDER = "<image>"


@dataclasses.dataclass(frozen=True)
class Blip2Reader:
    """Reads for `Blip2ForConditionalGeneration`."""

    config: Blip2Config
    processor: Any

    tokens: ClassVar[dict[str, int]] = {"eos_token_id": 2, "pad_token_id": 1}

    @classmethod
    def load(cls, folder: Path, config: Blip2Config) -> "Blip2Reader":
        """Raises ValueError if the folder's processor makes other images or queries than the model
        takes.
        """
        processor = load_processor(folder)
        pairs = image_pairs(processor, config.vision)
        if (queries := getattr(processor, "num_query_tokens", None)) is not None:
            pairs["num_query_tokens"] = (queries, config.num_query_tokens)
        check_processor(folder, pairs)
        return (Blip2Reader if isinstance(config.text, OptConfig) else Blip2T5Reader)(
            config, processor
        )

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.processor.tokenizer

    @property
    def positions(self) -> int | None:
        """Tokens that a prompt and its answer may have in all; None: any number."""
        text = self.config.text
        return text.max_position_embeddings if isinstance(text, OptConfig) else None

    @property
    def sites(self) -> frozenset[Site]:
        """Where the model can be pruned."""
        language_model = Opt if isinstance(self.config.text, OptConfig) else T5
        return language_model.sites | {Site.ENTRY}

    def read(self, images: list[ImageLike], prompt: Prompt, done: Done) -> Question[np.ndarray]:
        """One prompt and its image. An empty prompt asks for a caption."""
        if len(images) != 1:
            raise ValueError(f"BLIP-2 takes one image with each prompt, got {len(images)}")
        process = partial(process_image, self.processor)
        tokens = tokenize(self.processor, prompt)
        return Question(tokens=tokens, images=[remember(done, images[0], process)])

    def length(self, question: Question[np.ndarray]) -> int:
        """How many tokens of the language model a question is, queries included."""
        return self.config.num_query_tokens + len(question.tokens)

    def visual_tokens(self, question: Question[np.ndarray]) -> int:
        """How many visual tokens a question has, before any pruning."""
        return self.config.num_query_tokens

    def pack(self, questions: Sequence[Question[np.ndarray]]) -> Packed[Blip2Inputs]:
        """A batch of questions as arrays."""
        tokens = [question.tokens for question in questions]
        return pack(tokens, [question.images[0] for question in questions], self.config)

    def locate(self, packed: Packed[Blip2Inputs], row: int, numbers: np.ndarray) -> KeptQueries:
        """The queries `numbers` come from no one place; see `attention_map`."""
        return KeptQueries(number=numbers)

    def picture(self, source: ImageLike) -> np.ndarray:
        """The image as the model sees it, [height, width, 3] from 0 to 1."""
        return stretched(process_image(self.processor, source).transpose(1, 2, 0))

    def attention_map(
        self, network: Any, packed: Packed[Blip2Inputs], row: int, kept: Kept
    ) -> np.ndarray:
        """Where the kept queries look: their cross-attention, averaged over layers and heads, the
        sum over them stretched to 1.
        """
        inputs = packed.inputs
        looks = np.asarray(_looks(network, inputs.pixels[inputs.image_index[row]][None]))
        grid = self.config.vision.grid
        out = looks[kept.number, 1:].sum(axis=0).reshape(grid, grid)
        return out / max(float(out.max()), 1e-12)


@dataclasses.dataclass(frozen=True)
class Blip2T5Reader(Blip2Reader):
    """Reads for a BLIP-2 with T5, whose special tokens have other numbers."""

    tokens: ClassVar[dict[str, int]] = {"eos_token_id": 1, "pad_token_id": 0}


@jax.jit
def _looks(network: Any, pixels: Float[Array, "one c height width"]) -> Float[Array, "q n"]:
    """Cross-attention of every query over the image tokens, mean of all layers and heads."""
    _, evidence = network.thaw().encode(pixels)
    queries, columns = evidence.cross[0].queries.shape[1], evidence.cross[0].keys.shape[1]
    seen = jnp.ones((1, queries, columns), bool)
    maps = [attention(layer.queries, layer.keys, seen).mean(axis=1)[0] for layer in evidence.cross]
    return jnp.stack(maps).mean(axis=0)


@dataclasses.dataclass(frozen=True)
class RetrievalReader:
    """Reads for `Blip2ForImageTextRetrieval`."""

    config: RetrievalConfig
    processor: Any

    @classmethod
    def load(cls, folder: Path, config: RetrievalConfig) -> "RetrievalReader":
        """Raises ValueError if the folder's processor makes other images than the model takes."""
        processor = load_processor(folder)
        check_processor(folder, image_pairs(processor, config.vision))
        return cls(config, processor)

    def read_image(self, source: ImageLike) -> np.ndarray:
        """The image as the model sees it, [3, height, width]."""
        return process_image(self.processor, source)

    def read_text(self, text: str) -> list[int]:
        """The text's tokens. Raises ValueError if the model has no positions for so many."""
        tokens = tokenize(self.processor, text)
        places = self.config.qformer.max_position_embeddings
        if len(tokens) > places:
            raise ValueError(f"a text of {len(tokens)} tokens; the model takes {places} at most")
        return tokens


def image_pairs(processor: Any, vision: VitConfig) -> dict[str, tuple[Any, Any]]:
    """What image size the processor makes, and what the model wants."""
    size = processor.image_processor.size
    return {
        "image height": (size["height"], vision.image_size),
        "image width": (size["width"], vision.image_size),
    }


def process_image(processor: Any, source: ImageLike) -> np.ndarray:
    """The image resized and normalised, [3, height, width]."""
    out = processor.image_processor([read_image(source)], return_tensors="np")
    return np.asarray(out["pixel_values"][0], np.float32)


def tokenize(processor: Any, prompt: Prompt) -> list[int]:
    """A prompt's tokens, those that the tokenizer adds included."""
    if not isinstance(prompt, str):
        raise ValueError("BLIP-2 has no chat template; give the prompt as plain text")
    if PLACEHOLDER in prompt:
        raise ValueError(
            f"the prompt has {PLACEHOLDER} in it; leave it out, the image stands in front anyway"
        )
    return list(processor.tokenizer(prompt)["input_ids"])
