"""Llama 3.2 Vision's reader: tiles, image marks in the prompt, chat templates."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from catp_jax.models.cross_decoder import EXTRA_EMBEDDINGS, MaskMode
from catp_jax.models.mllama import MllamaConfig
from catp_jax.models.tiled_vit import VisionMode
from catp_jax.readers.chat import check_text
from catp_jax.readers.images import ImageLike, read_image
from catp_jax.readers.mllama_packing import (
    KeptTokens,
    MllamaPacked,
    ProcessedImage,
    abstract_inputs,
    check_marks,
    locate,
    pack,
)
from catp_jax.readers.processor import check_processor, load_processor, usable
from catp_jax.readers.reading import (
    Box,
    Boxes,
    ImageCache,
    Prompt,
    Question,
    check_tokens,
    covered,
    prompts_of,
    remember,
    stretched,
)
from catp_jax.readers.seen import WHOLE, Seen
from catp_jax.readers.templates import render

IMAGE_MARK = "<|image|>"


@dataclasses.dataclass(frozen=True)
class MllamaReader:
    """`mask_mode` says what text does that sees no image, see `cross_decoder.MaskMode`;
    `vision_mode` which of the tower's states the decoder gets (None: as the config says); `seen`
    how images are made smaller.
    """

    config: MllamaConfig
    processor: Any
    mask_mode: MaskMode = "meta"
    vision_mode: VisionMode | None = None
    seen: Seen = WHOLE

    has_generation_config: ClassVar[bool] = True

    @classmethod
    def load(
        cls,
        folder: Path,
        config: MllamaConfig,
        mask_mode: MaskMode = "meta",
        vision_mode: VisionMode | None = None,
    ) -> "MllamaReader":
        """Raises ValueError if the folder's processor makes other tiles or tokens than the model
        takes.
        """
        reader = cls(config, load_processor(folder), mask_mode, vision_mode)
        vision = config.vision
        with usable(folder):
            images = reader.processor.image_processor
            pairs = {
                "tile height": (images.size["height"], vision.image_size),
                "tile width": (images.size["width"], vision.image_size),
                "max_image_tiles": (images.max_image_tiles, vision.max_num_tiles),
                "image token": (reader.processor.image_token_id, config.image_token_index),
            }
            if reader.processor.bos_token is None:
                raise ValueError("the tokenizer has no bos_token; tokenizer_config.json names it")
            reader._tokenize("a", 0)
        size = vision.image_size
        shape = (vision.max_num_tiles, vision.num_channels, size, size)
        check_processor(folder, pairs, lambda image: reader.process_image(image).pixels, shape)
        return reader

    @staticmethod
    def abstract_inputs(
        config: MllamaConfig, batch: int, length: int, tiles: int | None
    ) -> tuple[Any, int]:
        """The shapes of a batch, and the visual tokens of a prompt."""
        return abstract_inputs(config, batch, length, tiles)

    @property
    def tokens(self) -> dict[str, int]:
        """Special tokens of checkpoints that name none: its config.json names them."""
        return {}

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self.processor.tokenizer

    @property
    def cross_layers(self) -> None:
        """Its visual tokens are the image's own."""
        return None

    @property
    def positions(self) -> int:
        """Tokens that a prompt and its answer may have in all."""
        return self.config.text.max_position_embeddings

    def read(
        self, images: list[ImageLike], prompt: Prompt, cache: ImageCache, begun: str = ""
    ) -> Question[ProcessedImage]:
        """One prompt and its images. A prompt without any `<|image|>` mark gets them in front. What
        is `begun` of the answer follows the prompt, or what the chat template puts before one.
        """
        processed = [remember(cache, image, self.process_image) for image in images]
        tokens = self._tokenize(prompt, len(processed), begun)
        check_marks(tokens, len(processed), self.config.image_token_index)
        text = [token for token in tokens if token != self.config.image_token_index]
        rows = self.config.text.vocab_size + EXTRA_EMBEDDINGS
        check_tokens(text, rows, "the language model")
        return Question(tokens=tokens, images=processed, begun=begun)

    def length(self, question: Question[ProcessedImage]) -> int:
        """How many tokens of the language model a question is; images are read from the side."""
        return len(question.tokens)

    def pack(self, questions: Sequence[Question[ProcessedImage]], shares: int = 1) -> MllamaPacked:
        """A batch of questions as arrays on the host, for a mesh that splits them into `shares`."""
        tokens = [question.tokens for question in questions]
        images = [question.images for question in questions]
        return pack(tokens, images, self.config, self.mask_mode, self.vision_mode, shares)

    def before_answers(self, packed: MllamaPacked) -> list[list[int]]:
        """The tokens of each prompt, image marks among them."""
        return prompts_of(packed)

    def locate(self, packed: MllamaPacked, row: int, numbers: np.ndarray) -> KeptTokens:
        """Where the visual tokens `numbers` of a prompt come from."""
        return locate(numbers, packed.tiles[row], self.config)

    def process_image(self, source: ImageLike) -> ProcessedImage:
        """The image as the model sees it: resized, cut into tiles, normalised."""
        vision = self.config.vision
        most = vision.max_num_tiles if self.seen.tiles is None else self.seen.tiles
        fewer = {} if most == vision.max_num_tiles else {"max_image_tiles": most}
        out = self.processor.image_processor(
            [[self._read_image(source)]], return_tensors="np", **fewer
        )
        pixels = np.asarray(out["pixel_values"][0, 0], np.float32)
        ratio = int(out["aspect_ratio_ids"][0, 0])
        if fewer:  # which counts fewer ratios, and makes less padding
            ratio = 1 + vision.supported_aspect_ratios.index(_ratios(most)[ratio - 1])
            missing = vision.max_num_tiles - most
            pixels = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return ProcessedImage(
            pixels=pixels, aspect_ratio_id=ratio, num_tiles=int(out["num_tiles"][0][0])
        )

    def _read_image(self, source: ImageLike) -> Image.Image:
        """The image as the processor gets it."""
        return self.seen.smaller(read_image(source), self.processor.image_processor)

    def grid(self, packed: MllamaPacked, row: int) -> tuple[int, int, int, int] | None:
        """Rows and columns of tiles of a prompt's only image, and of patches in each."""
        if len({image for image, _ in packed.tiles[row]}) != 1:
            return None
        return (*self._layout(packed, row), self.config.vision.grid, self.config.vision.grid)

    def framed(self, source: ImageLike, boxes: Boxes) -> list[Box]:
        """Parts of an image as parts of its `picture`."""
        image = self.process_image(source)
        rows, columns = self.config.vision.supported_aspect_ratios[image.aspect_ratio_id - 1]
        return self._on_canvas(boxes, self._read_image(source), rows, columns)

    def picture(self, source: ImageLike) -> np.ndarray:
        """The image's tiles put together again, [height, width, 3] from 0 to 1."""
        image, vision = self.process_image(source), self.config.vision
        rows, columns = vision.supported_aspect_ratios[image.aspect_ratio_id - 1]
        size = vision.image_size
        tiles = image.pixels[: rows * columns].reshape(rows, columns, -1, size, size)
        return stretched(tiles.transpose(0, 3, 1, 4, 2).reshape(rows * size, columns * size, -1))

    def needed(
        self,
        network: Any,
        packed: MllamaPacked,
        images: Sequence[ImageLike],
        boxes: Sequence[Boxes],
    ) -> list[np.ndarray]:
        """The share of each token's patch that lies in these parts; class tokens have none."""
        out = []
        for row, (source, some) in enumerate(zip(images, boxes, strict=True)):
            rows, columns = self._layout(packed, row)
            some = self._on_canvas(some, self._read_image(source), rows, columns)
            grid = self.config.vision.grid
            shares = covered(some, rows * grid, columns * grid)
            there = self.locate(packed, row, np.arange(packed.available[row]))
            down, across = np.divmod(there.tile, columns)
            found = shares[down * grid + there.row, across * grid + there.column]
            out.append(np.where(there.row >= 0, found, 0.0))
        return out

    def _layout(self, packed: MllamaPacked, row: int) -> tuple[int, int]:
        """Rows and columns of tiles of a prompt's first image; it must have one."""
        images, vision = packed.inputs.images, self.config.vision
        assert images is not None  # noqa: S101
        image = int(images.tile_index[row, 0]) // vision.max_num_tiles
        return vision.supported_aspect_ratios[int(images.aspect_ratio_ids[image]) - 1]

    def _on_canvas(self, boxes: Boxes, image: Image.Image, rows: int, columns: int) -> list[Box]:
        """Parts of an image as parts of its tiles, which may be larger."""
        from transformers.models.mllama.image_processing_pil_mllama import (
            get_image_size_fit_to_canvas,
        )

        side = self.config.vision.image_size
        high, wide = get_image_size_fit_to_canvas(
            image.height, image.width, rows * side, columns * side, side
        )
        down, across = high / (rows * side), wide / (columns * side)
        return [(a * across, b * down, c * across, d * down) for a, b, c, d in boxes]

    def kept_map(
        self, network: Any, packed: MllamaPacked, row: int, kept: KeptTokens
    ) -> np.ndarray:
        """1 for every kept patch of a prompt's first image, on the grid of its whole canvas."""
        images = packed.inputs.images
        vision = self.config.vision
        if images is None:
            return np.ones((vision.grid, vision.grid))
        rows, columns = self._layout(packed, row)
        out = np.zeros((rows * vision.grid, columns * vision.grid))
        is_patch = (kept.image == 0) & (kept.row >= 0)
        tile_row, tile_column = np.divmod(kept.tile[is_patch], columns)
        down = tile_row * vision.grid + kept.row[is_patch]
        out[down, tile_column * vision.grid + kept.column[is_patch]] = 1
        return out

    def _tokenize(self, prompt: Prompt, images: int, begun: str = "") -> list[int]:
        if isinstance(prompt, str):
            if IMAGE_MARK not in prompt:
                prompt = IMAGE_MARK * images + prompt
            from transformers.models.mllama.processing_mllama import build_string_from_input

            text = build_string_from_input(prompt + begun, self.processor.bos_token, IMAGE_MARK)
            return list(self.processor.tokenizer(text)["input_ids"])
        template = self.processor.chat_template
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        if not template:
            raise ValueError("this checkpoint has no chat template; give the prompt as plain text")
        text = render(template, prompt, self.tokenizer.special_tokens_map)
        check_text(text, "what the chat template makes of the chat")
        return list(self.tokenizer(text + begun, add_special_tokens=False)["input_ids"])


def _ratios(tiles: int) -> list[tuple[int, int]]:
    """How so many tiles at most can lie, as transformers numbers them: rows and columns."""
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_all_supported_aspect_ratios,
    )

    return get_all_supported_aspect_ratios(tiles)
