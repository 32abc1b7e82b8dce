"""What a reader is, and what all readers share: special tokens, and images that are read once."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from catp_jax import strict_json
from catp_jax.files import is_there
from catp_jax.models.cross_decoder import EXTRA_EMBEDDINGS
from catp_jax.readers.chat import check_text, take_images
from catp_jax.readers.images import Fetch, ImageLike, fetch_image, is_web_address
from catp_jax.readers.packing import Packed
from catp_jax.readers.seen import Seen
from catp_jax.sharding import place

Prompt = str | Sequence[dict[str, Any]]
"""Plain text, or chat messages for the checkpoint's own chat template."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, from 0 to 1."""

Boxes = Sequence[Box]

Image = TypeVar("Image")

ImageCache = dict[str | int, tuple[ImageLike, Any]]
"""Images read already, by path or identity, with their source."""


@dataclasses.dataclass(frozen=True)
class Question(Generic[Image]):
    """One prompt, read: its tokens, and its images as the model sees them; `begun` is the text that
    its answer begins with.
    """

    tokens: list[int]
    images: list[Image]
    begun: str = dataclasses.field(default="", kw_only=True)


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

    has_generation_config: ClassVar[bool]
    """Whether transformers reads generation_config.json for this model."""

    @classmethod
    def load(cls, folder: Path, config: Any) -> Any:
        """Raises ValueError if the folder's processor does not fit the model."""
        ...

    @staticmethod
    def abstract_inputs(config: Any, batch: int, length: int, tiles: int | None) -> tuple[Any, int]:
        """The shapes of `batch` prompts of `length` tokens with an image each, of `tiles` (None: as
        many as there may be), and the visual tokens of one. Raises ValueError for other tiles.
        """
        ...

    @property
    def config(self) -> Any: ...
    @property
    def seen(self) -> Seen:
        """How images are made smaller before they are processed."""
        ...

    @property
    def processor(self) -> Any:
        """That of transformers."""
        ...

    @property
    def tokens(self) -> dict[str, int]:
        """Special tokens of checkpoints that name none."""
        ...

    @property
    def tokenizer(self) -> Any: ...
    @property
    def cross_layers(self) -> int | None:
        """Layers in which the visual tokens look at the image before the language model gets them;
        None: they are the image's own.
        """
        ...

    @property
    def positions(self) -> int | None:
        """Tokens that a prompt and its answer may have in all; None: any number."""
        ...

    def read(
        self, images: list[ImageLike], prompt: Prompt, cache: ImageCache, begun: str = ""
    ) -> Question[Any]:
        """One prompt as tokens, what its answer has `begun` with, and its images as the model sees
        them.

        `cache` remembers images: one that comes again is processed and encoded once. Raises
        ValueError if something cannot be used.
        """
        ...

    def length(self, question: Question[Any]) -> int:
        """How many tokens of the language model a question is."""
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

    def grid(self, packed: Any, row: int) -> tuple[int, int, int, int] | None:
        """How the visual tokens of a prompt lie in its only image: rows and columns of tiles, and
        of patches in each, tile by tile; what else a tile has comes before its patches. None: they
        have no place.
        """
        ...

    def picture(self, source: ImageLike) -> np.ndarray:
        """The image as the model sees it, [height, width, 3] from 0 to 1."""
        ...

    def framed(self, source: ImageLike, boxes: Boxes) -> list[Box]:
        """Parts of an image as parts of its `picture`."""
        ...

    def needed(
        self, network: Any, packed: Any, images: Sequence[ImageLike], boxes: Sequence[Boxes]
    ) -> list[np.ndarray]:
        """How much of each visual token, from 0 to 1, is about parts of a prompt's only image: of a
        patch the share that lies in them, of a query the share of its look. For each prompt whose
        image and boxes are given, the first of the batch.
        """
        ...

    def kept_map(self, network: Any, packed: Any, row: int, kept: Any) -> np.ndarray:
        """How much of each part of a prompt's image the kept visual tokens stand for, [rows,
        columns] from 0 to 1: the kept patches, or where the kept queries look.
        """
        ...


def covered(boxes: Sequence[Box], rows: int, columns: int) -> np.ndarray:
    """The share of each patch of a grid, [rows, columns], that lies in any of the boxes."""
    fine = 8  # parts of a patch's side
    down, across = (
        (np.arange(fine * count) + 0.5)[:, None] / (fine * count) for count in (rows, columns)
    )
    inside = np.zeros((fine * rows, fine * columns), bool)
    for left, top, right, bottom in boxes:
        inside |= ((top <= down) & (down < bottom)) & ((left <= across) & (across < right)).T
    return inside.reshape(rows, fine, columns, fine).mean(axis=(1, 3))


def remember(cache: ImageCache, source: ImageLike, process: Callable[[ImageLike], Any]) -> Any:
    """The processed image, from `cache` if it is there."""
    key = str(source) if isinstance(source, str | Path) else id(source)
    if key not in cache:
        # the source is kept: once it is gone, another object may get its id
        cache[key] = (source, process(source))
    return cache[key][1]


def prompts_of(packed: Packed[Any]) -> list[list[int]]:
    """The tokens of each prompt, without padding, and with one that is read late."""
    tokens, valid = place.fetch((packed.inputs.tokens, packed.inputs.token_valid))
    found = [row[is_valid].tolist() for row, is_valid in zip(tokens, valid, strict=True)]
    if packed.last is None:
        return found
    return [[*row, int(last)] for row, last in zip(found, place.fetch(packed.last), strict=True)]


def arrange(
    images: list[ImageLike], prompt: Prompt, cache: ImageCache, fetch: Fetch | None
) -> tuple[list[ImageLike], Prompt]:
    """A prompt and its images as readers take them: those of chat messages in their order, those at
    web addresses fetched, each once.

    Raises ValueError for a prompt that is none, and for an image that is missing.
    """
    if isinstance(prompt, list | tuple):
        prompt, images = take_images(prompt, images)
    else:
        check_text(prompt, "a prompt")
    return fetch_images(images, cache, fetch), prompt


def fetch_images(images: Sequence[Any], cache: ImageCache, fetch: Fetch | None) -> list[Any]:
    """The images, with those at web addresses fetched, each once."""
    return [
        remember(cache, image, lambda address: fetch_image(str(address), fetch))
        if is_web_address(image)
        else image
        for image in images
    ]


def stretched(image: np.ndarray) -> np.ndarray:
    """An array of any range, stretched to 0 … 1, to be looked at."""
    return (image - image.min()) / max(float(np.ptp(image)), 1e-6)


def check_tokens(tokens: Sequence[int], embeddings: int, who: str) -> None:
    """Raises ValueError for a token that `who`, with so many embeddings, does not know; a gather
    would read the last embedding in its place.
    """
    if (highest := max(tokens, default=0)) >= embeddings:
        raise ValueError(
            f"{who}'s tokenizer makes token {highest} of the prompt, but {who} has embeddings for "
            f"{embeddings}; take the same checkpoint's"
        )


def special_tokens(
    folder: Path, defaults: dict[str, int], has_generation_config: bool, size: int
) -> tuple[tuple[int, ...], int | None]:
    """End and padding tokens, as transformers finds them.

    generation_config.json's word counts before config.json's, and that before the model's own
    `defaults`. Without `has_generation_config` a language model generates by itself, and only its
    `text_config` counts.

    Raises ValueError for a file that cannot be read and for what is none of the `size` tokens of
    the model; padding may be among the rows that some embeddings have beyond them.
    """
    config = strict_json.read(folder / "config.json")
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise ValueError(f"{folder}: text_config must be an object, not {text!r}")
    found = [defaults, config, text] if has_generation_config else [defaults, text]
    path = folder / "generation_config.json"
    if has_generation_config and is_there(path):
        found.append(strict_json.read(path))
    settings = {key: value for part in found for key, value in part.items() if value is not None}
    named, pad = settings.get("eos_token_id"), settings.get("pad_token_id")
    ends: list[Any] = named if isinstance(named, list) else [named]
    if not ends or not all(type(end) is int and end >= 0 for end in ends):
        raise ValueError(
            f"{folder}: eos_token_id must be a token's number or a list of them, got {named!r} in "
            "config.json or generation_config.json"
        )
    if (highest := max(ends)) >= size:
        raise ValueError(
            f"{folder}: eos_token_id has token {highest}; this model has {size} tokens"
        )
    if type(pad) is int and pad >= size + EXTRA_EMBEDDINGS:
        raise ValueError(f"{folder}: pad_token_id is token {pad}; this model has {size} tokens")
    if pad is not None and type(pad) is not int:
        raise ValueError(f"{folder}: pad_token_id must be a token's number, got {pad!r}")
    return tuple(ends), pad if pad is not None and pad >= 0 else None  # Vicuna's -1 says: none
