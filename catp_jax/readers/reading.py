"""What a reader is, and what all readers share: special tokens, and images that are read once."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from catp_jax.generation.images import ImageLike
from catp_jax.generation.inputs import Packed
from catp_jax.sharding.place import fetch

Prompt = str | Sequence[dict[str, Any]]
"""Plain text, or chat messages for the checkpoint's own chat template."""

Image = TypeVar("Image")

Done = dict[str | int, tuple[ImageLike, Any]]
"""Images read already, by path or identity, with their source."""


@dataclasses.dataclass(frozen=True)
class Question(Generic[Image]):
    """One prompt, read: its tokens, and its images as the model sees them."""

    tokens: list[int]
    images: list[Image]


@runtime_checkable
class Kept(Protocol):
    """The visual tokens of one prompt that pruning kept: `number` counts them before any pruning;
    further fields say where they come from.
    """

    @property
    def number(self) -> np.ndarray: ...
    def as_rows(self) -> list[dict[str, int]]: ...


@runtime_checkable
class Reader(Protocol):
    """A checkpoint's processor, and how its model wants images and prompts."""

    tokens: ClassVar[dict[str, int]]
    """Special tokens of checkpoints that name none."""

    @property
    def config(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def positions(self) -> int | None:
        """Tokens that a prompt and its answer may have in all; None: any number."""
        ...

    def read(self, images: list[ImageLike], prompt: Prompt, done: Done) -> Question[Any]:
        """One prompt as tokens, and its images as the model sees them.

        `done` remembers images: one that comes again is processed and encoded once. Raises
        ValueError if something cannot be used.
        """
        ...

    def length(self, question: Question[Any]) -> int:
        """How many tokens of the language model a question is."""
        ...

    def visual_tokens(self, question: Question[Any]) -> int:
        """How many visual tokens a question has, before any pruning."""
        ...

    def pack(self, questions: Sequence[Question[Any]], shares: int = 1) -> Packed[Any]:
        """A batch of questions as arrays on the host, for a mesh that splits them into `shares`."""
        ...

    def before_answers(self, packed: Any) -> list[list[int]]:
        """The tokens in front of each answer, as transformers' `generate` has them: a prompt's with
        its image placeholders, for an encoder-decoder what its decoder begins with.
        """
        ...

    def locate(self, packed: Any, row: int, numbers: np.ndarray) -> Kept:
        """Where the visual tokens `numbers` of a prompt come from."""
        ...

    def picture(self, source: ImageLike) -> np.ndarray:
        """The image as the model sees it, [height, width, 3] from 0 to 1."""
        ...

    def attention_map(self, network: Any, packed: Any, row: int, kept: Any) -> np.ndarray:
        """How much of each part of a prompt's image is in the kept tokens, [rows, columns] from 0
        to 1.
        """
        ...


def remember(done: Done, source: ImageLike, process: Callable[[ImageLike], Any]) -> Any:
    """The processed image, from `done` if it is there."""
    key = str(source) if isinstance(source, str | Path) else id(source)
    if key not in done:
        # the source is kept: once it is gone, another object may get its id
        done[key] = (source, process(source))
    return done[key][1]


def prompts_of(packed: Packed[Any]) -> list[list[int]]:
    """The tokens of each prompt, without padding."""
    tokens, valid = fetch((packed.inputs.tokens, packed.inputs.token_valid))
    return [row[own].tolist() for row, own in zip(tokens, valid, strict=True)]


def stretched(image: np.ndarray) -> np.ndarray:
    """An array of any range, stretched to 0 … 1, to be looked at."""
    return (image - image.min()) / max(float(np.ptp(image)), 1e-6)


def load_processor(folder: Path) -> Any:
    """A folder's processor. Raises ValueError if it cannot be read."""
    from transformers import AutoProcessor  # here, since it imports torch where there is one

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has weights but no processor that can be read (tokenizer.json, "
            f"tokenizer_config.json, preprocessor_config.json): {error}"
        ) from None


def check_processor(folder: Path, pairs: dict[str, tuple[Any, Any]]) -> None:
    """Raises ValueError unless in each pair what the processor has is what the model wants."""
    wrong = [
        f"{name}: {has}, not {wanted}" for name, (has, wanted) in pairs.items() if has != wanted
    ]
    if wrong:
        raise ValueError(f"{folder}: the processor does not fit config.json ({'; '.join(wrong)})")


def check_tokens(tokens: Sequence[int], embeddings: int, who: str) -> None:
    """Raises ValueError for a token that `who`, with so many embeddings, does not know; a gather
    would read the last embedding in its place.
    """
    if (highest := max(tokens, default=0)) >= embeddings:
        raise ValueError(
            f"{who}'s tokenizer makes token {highest} of the prompt, but {who} has embeddings for "
            f"{embeddings}; take the same checkpoint's"
        )


def special_tokens(folder: Path, defaults: dict[str, int]) -> tuple[tuple[int, ...], int | None]:
    """End and padding tokens: generation_config.json's word counts before config.json's, and that
    before the model's own defaults.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    found = [defaults, config, config.get("text_config") or {}]
    own = folder / "generation_config.json"
    if own.is_file():
        try:
            found.append(dict(json.loads(own.read_text())))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{own} cannot be read: {error}") from None
    settings = {key: value for part in found for key, value in part.items() if value is not None}
    ends = settings.get("eos_token_id")
    if ends is None:
        raise ValueError(f"{folder} names no eos_token_id in its config or generation config")
    return tuple(ends) if isinstance(ends, list) else (ends,), settings.get("pad_token_id")
