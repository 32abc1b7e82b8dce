"""BLIP-2's and InstructBLIP's readers: one square image a prompt, in front of the text.

Checkpoints older than the `<image>` placeholder and newer ones are read alike: the placeholders are
not made here, since the model puts its queries in front of the text by itself.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from catp_jax.contract import Evidence
from catp_jax.generation.buckets import TOKEN_COUNTS, round_up
from catp_jax.models.blip2 import Blip2Config, Blip2Inputs
from catp_jax.models.instructblip import InstructBlipConfig, InstructBlipInputs
from catp_jax.models.llama import LlamaConfig
from catp_jax.models.opt import OptConfig
from catp_jax.models.querying import QueryingConfig, QueryingInputs
from catp_jax.models.retrieval import RetrievalConfig
from catp_jax.models.t5 import T5Config
from catp_jax.pruning.scores import attention
from catp_jax.readers.blip2_packing import (
    KeptQueries,
    abstract_inputs,
    pack,
    pack_instructions,
)
from catp_jax.readers.chat import check_text
from catp_jax.readers.images import ImageLike, read_image
from catp_jax.readers.packing import Packed
from catp_jax.readers.processor import check_processor, load_processor, usable
from catp_jax.readers.reading import (
    Box,
    Boxes,
    ImageCache,
    Kept,
    Prompt,
    Question,
    check_tokens,
    covered,
    prompts_of,
    remember,
    stretched,
)
from catp_jax.readers.seen import WHOLE, Seen
from catp_jax.sharding.place import fetch
from catp_jax.struct import replace

PLACEHOLDER = "<image>"

TOKENS: dict[type, dict[str, int]] = {
    OptConfig: {"eos_token_id": 2, "pad_token_id": 1},
    T5Config: {"eos_token_id": 1, "pad_token_id": 0},
    LlamaConfig: {"eos_token_id": 2},  # padding is the tokenizer's
}
"""Special tokens of checkpoints that name none, by their language model."""


@dataclasses.dataclass(frozen=True)
class QueryingReader(ABC):
    """What the readers of models share whose language model reads a Q-Former's queries."""

    config: QueryingConfig
    processor: Any
    seen: Seen = WHOLE

    name: ClassVar[str]
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    has_generation_config: ClassVar[bool] = False  # its language model generates by itself

    @classmethod
    def load(cls, folder: Path, config: Any) -> Any:
        """Raises ValueError if the folder's processor makes other images or queries than the model
        takes, or lacks one of `tokenizers`.
        """
        return cls(config, load_checked(folder, config, cls.tokenizers))

    @staticmethod
    def abstract_inputs(config: Any, batch: int, length: int, tiles: int | None) -> tuple[Any, int]:
        """The shapes of a batch, and the visual tokens of a prompt."""
        if tiles is not None:
            raise ValueError("images of this model have no tiles; leave out the number of them")
        return abstract_inputs(config, batch, length)

    @property
    def has_decoder(self) -> bool:
        """Whether answers have a decoder of their own, beside the prompts' encoder."""
        return isinstance(self.config.text, T5Config)

    @property
    def tokens(self) -> dict[str, int]:
        """Special tokens of checkpoints that name none."""
        return TOKENS[type(self.config.text)]

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.processor.tokenizer

    @property
    def cross_layers(self) -> int:
        """Layers of the Q-Former in which its queries look at the image."""
        return len(self.config.qformer.cross_layers)

    @property
    def positions(self) -> int | None:
        """Tokens that a prompt and its answer may have in all; None: any number."""
        return getattr(self.config.text, "max_position_embeddings", None)  # T5 has none

    def read(
        self, images: list[ImageLike], prompt: Prompt, cache: ImageCache, begun: str = ""
    ) -> Question[np.ndarray]:
        """One prompt and its image. An empty prompt asks for a caption. What is `begun` of the
        answer follows the prompt; with T5 the decoder begins with it.
        """
        if len(images) != 1:
            raise ValueError(f"{self.name} takes one image with each prompt, got {len(images)}")
        process = partial(process_image, self.processor, seen=self.seen)
        follows = isinstance(prompt, str) and not self.has_decoder
        tokens = tokenize(self.processor, f"{prompt}{begun}" if follows else prompt)
        check_tokens(tokens, self.config.text.vocab_size, "the language model")
        image = remember(cache, images[0], process)
        return Question(tokens=tokens, images=[image], begun=begun)

    def length(self, question: Question[np.ndarray]) -> int:
        """How many tokens of the language model a question is, queries included."""
        return self.config.num_query_tokens + len(question.tokens)

    def before_answers(self, packed: Packed[Any]) -> list[list[int]]:
        """The placeholders and tokens of each prompt; with T5 the start token alone."""
        text, mark = self.config.text, self.config.image_token_index
        if isinstance(text, T5Config):
            start, begun = text.decoder_start_token_id, fetch(packed.inputs.begun)
            if begun is None:
                return [[start] for _ in packed.available]
            return [[start, *row[row >= 0].tolist()] for row in begun]
        marks = [] if mark is None else [mark] * self.config.num_query_tokens
        return [[*marks, *tokens] for tokens in prompts_of(packed)]

    def pack(self, questions: Sequence[Any], shares: int = 1) -> Packed[Any]:
        """A batch of questions as arrays on the host, for a mesh that splits them into `shares`."""
        packed = self._pack(questions, shares)
        if not self.has_decoder:
            return packed
        # its decoder begins with what is begun of the answers
        begun = [self._begun(question.begun) for question in questions]
        longest = max(map(len, begun))
        if not longest:
            return packed
        table = np.full((len(begun), round_up(longest, TOKEN_COUNTS)), -1, np.int32)
        for row, tokens in enumerate(begun):
            table[row, : len(tokens)] = tokens
        return dataclasses.replace(packed, inputs=replace(packed.inputs, begun=table))

    @abstractmethod
    def _pack(self, questions: Sequence[Any], shares: int) -> Packed[Any]:
        """A batch of questions, before any answer is begun."""

    def _begun(self, text: str) -> list[int]:
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        check_tokens(tokens, self.config.text.vocab_size, "the language model")
        return tokens

    def locate(self, packed: Packed[Any], row: int, numbers: np.ndarray) -> KeptQueries:
        """The queries `numbers` come from no one place; see `kept_map`."""
        return KeptQueries(number=numbers)

    def grid(self, packed: Packed[Any], row: int) -> None:
        """Queries come from no one place."""
        return None

    def framed(self, source: ImageLike, boxes: Boxes) -> list[Box]:
        """Parts of an image, which are the same parts of its `picture`."""
        return list(boxes)

    def picture(self, source: ImageLike) -> np.ndarray:
        """The image as the model sees it, [height, width, 3] from 0 to 1."""
        image = process_image(self.processor, source, self.seen)
        return stretched(image.transpose(1, 2, 0))

    def needed(
        self,
        network: Any,
        packed: Packed[Any],
        images: Sequence[ImageLike],
        boxes: Sequence[Boxes],
    ) -> list[np.ndarray]:
        """The share of each query's look (see `kept_map`) that falls on these parts."""
        front = packed.encoded.front if packed.encoded is not None else None
        looks = _looks(network, packed.inputs) if front is None else _looks_of(front.view.evidence)
        grid = self.config.vision.grid
        return [
            look[:, 1:] @ covered(some, grid, grid).reshape(-1)
            for look, some in zip(fetch(looks), boxes, strict=False)
        ]

    def kept_map(self, network: Any, packed: Packed[Any], row: int, kept: Kept) -> np.ndarray:
        """Where the kept queries look: their cross-attention, averaged over layers and heads, the
        sum over them stretched to 1.
        """
        looks = fetch(_looks(network, packed.inputs.alone(row)))[0]
        grid = self.config.vision.grid
        out = looks[kept.number, 1:].sum(axis=0).reshape(grid, grid)
        return out / max(float(out.max()), 1e-12)


@dataclasses.dataclass(frozen=True)
class Blip2Reader(QueryingReader):
    """Reads for `Blip2ForConditionalGeneration`."""

    config: Blip2Config

    name: ClassVar[str] = "BLIP-2"

    def _pack(self, questions: Sequence[Any], shares: int) -> Packed[Blip2Inputs]:
        tokens = [question.tokens for question in questions]
        images = [question.images[0] for question in questions]
        return pack(tokens, images, self.config, shares)


@jax.jit
def _looks(network: Any, inputs: QueryingInputs) -> Float[Array, "b q n"]:
    return _looks_of(network.thaw().read_images(inputs)[1])


@jax.jit
def _looks_of(evidence: Evidence) -> Float[Array, "b q n"]:
    """Cross-attention of every query over the image tokens, mean of all layers and heads."""
    maps = []
    for layer in evidence.cross:
        (batch, queries), columns = layer.queries.shape[:2], layer.keys.shape[1]
        seen = jnp.ones((batch, queries, columns), bool)
        maps.append(attention(layer.queries, layer.keys, seen).mean(axis=1))
    return jnp.stack(maps).mean(axis=0)


@dataclasses.dataclass(frozen=True)
class Instruction(Question[np.ndarray]):
    """One prompt, read; `instruction` are its tokens for the Q-Former."""

    instruction: list[int]


@dataclasses.dataclass(frozen=True)
class InstructBlipReader(QueryingReader):
    """Reads for `InstructBlipForConditionalGeneration`; its Q-Former has its own tokenizer."""

    config: InstructBlipConfig

    name: ClassVar[str] = "InstructBLIP"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "qformer_tokenizer")

    def read(
        self, images: list[ImageLike], prompt: Prompt, cache: ImageCache, begun: str = ""
    ) -> Instruction:
        """One prompt and its image, the prompt in the tokens of both readers of it."""
        question = super().read(images, prompt, cache, begun)
        tokens = list(self.processor.qformer_tokenizer(prompt)["input_ids"])
        qformer = self.config.qformer
        if len(tokens) > qformer.max_position_embeddings:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens for the Q-Former; it takes "
                f"{qformer.max_position_embeddings} at most"
            )
        check_tokens(tokens, qformer.vocab_size, "the Q-Former")
        return Instruction(question.tokens, question.images, tokens, begun=begun)

    def _pack(self, questions: Sequence[Any], shares: int) -> Packed[InstructBlipInputs]:
        return pack_instructions(
            [question.tokens for question in questions],
            [question.instruction for question in questions],
            [question.images[0] for question in questions],
            self.config,
            shares,
        )


@dataclasses.dataclass(frozen=True)
class RetrievalReader:
    """Reads for `Blip2ForImageTextRetrieval`."""

    config: RetrievalConfig
    processor: Any

    @classmethod
    def load(cls, folder: Path, config: RetrievalConfig) -> "RetrievalReader":
        """Raises ValueError if the folder's processor makes other images than the model takes."""
        return cls(config, load_checked(folder, config))

    def read_image(self, source: ImageLike) -> np.ndarray:
        """The image as the model sees it, [3, height, width]."""
        return process_image(self.processor, source)

    def read_text(self, text: str) -> list[int]:
        """The text's tokens. Raises ValueError if the model has no positions for so many."""
        tokens = tokenize(self.processor, check_text(text, "a text"))
        if not tokens:
            raise ValueError("a text is empty; give at least one word")
        places = self.config.qformer.max_position_embeddings
        if len(tokens) > places:
            raise ValueError(f"a text of {len(tokens)} tokens; the model takes {places} at most")
        check_tokens(tokens, self.config.qformer.vocab_size, "the Q-Former")
        return tokens


def load_checked(
    folder: Path,
    config: QueryingConfig | RetrievalConfig,
    tokenizers: tuple[str, ...] = ("tokenizer",),
) -> Any:
    """A folder's processor. Raises ValueError unless it makes the images and queries that the model
    takes.
    """
    processor = load_processor(folder, tokenizers)
    with usable(folder):
        size, wanted = processor.image_processor.size, config.vision.image_size
        pairs = {"image height": (size["height"], wanted), "image width": (size["width"], wanted)}
        queries = getattr(processor, "num_query_tokens", None)
        if queries is not None and isinstance(config, QueryingConfig):
            pairs["num_query_tokens"] = (queries, config.num_query_tokens)
        for name in tokenizers:
            getattr(processor, name)("a")
    check_processor(folder, pairs, partial(process_image, processor), (3, wanted, wanted))
    return processor


def process_image(processor: Any, source: ImageLike, seen: Seen = WHOLE) -> np.ndarray:
    """The image resized and normalised, [3, height, width]."""
    image = seen.smaller(read_image(source), processor.image_processor)
    out = processor.image_processor([image], return_tensors="np")
    return np.asarray(out["pixel_values"][0], np.float32)


def tokenize(processor: Any, prompt: Prompt) -> list[int]:
    """A prompt's tokens, those that the tokenizer adds included.

    Raises ValueError for a prompt that is no text.
    """
    if not isinstance(prompt, str):
        raise ValueError("this model has no chat template; give the prompt as plain text")
    if PLACEHOLDER in prompt:
        raise ValueError(
            f"the prompt has {PLACEHOLDER} in it; leave it out, the image stands in front anyway"
        )
    return list(processor.tokenizer(prompt)["input_ids"])
