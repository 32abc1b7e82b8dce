"""The front door: `load` a checkpoint folder, `generate` answers about images.

model = catp_jax.load("path/to/folder")
model.generate(images=["a.png"], prompts=["what color is the shape?"]).text
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from transformers import AutoProcessor
from transformers.models.mllama.processing_mllama import build_string_from_input

import convert
from catp_jax.contract import Keep, Site, check_sites
from catp_jax.generation import generate as programs
from catp_jax.generation.images import ImageLike, read_image
from catp_jax.generation.inputs import (
    KeptTokens,
    Packed,
    ProcessedImage,
    check_marks,
    locate,
    pack,
    round_up,
)
from catp_jax.generation.sampling import sampling
from catp_jax.models.cross_decoder import MaskMode
from catp_jax.models.frozen import Frozen, freeze
from catp_jax.models.mllama import Mllama, MllamaConfig
from catp_jax.models.tiled_vit import VisionMode
from catp_jax.pruning import budget

IMAGE_MARK = "<|image|>"

Prompt = str | Sequence[dict[str, Any]]
"""Plain text, or chat messages for the checkpoint's own chat template."""

Done = dict[str | int, tuple[ImageLike, ProcessedImage]]
"""Images read already, by path or identity, with their source."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt, read: its tokens, and its images as the model sees them."""

    tokens: list[int]
    images: list[ProcessedImage]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a batch of prompts got; lists have one entry a prompt.

    `text` is without special tokens, `tokens` with them, the end token included. `available` counts
    visual tokens before pruning; `kept` says which were kept (None: nothing was pruned).
    `slots` is the room that each prompt's visual tokens take in a cross-attention cache.
    `reports` has the final state of each pruner, `logits` those of the first new token.
    """

    text: list[str]
    tokens: list[list[int]]
    available: tuple[int, ...]
    kept: list[KeptTokens] | None
    slots: int
    reports: tuple[Any, ...]
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint with its processor, ready to answer."""

    network: Frozen
    config: MllamaConfig
    processor: Any
    end_tokens: tuple[int, ...]
    pad_token: int

    @property
    def sites(self) -> frozenset[Site]:
        """Where this model can be pruned."""
        return Mllama.sites

    @property
    def dtype(self) -> jnp.dtype:
        """The number type of the text decoder, and so of its caches."""
        return self.network.thaw().language_model.embed_tokens.embedding.dtype

    def prepare(
        self,
        images: Sequence[ImageLike | Sequence[ImageLike] | None],
        prompts: Sequence[Prompt],
        *,
        mask_mode: MaskMode = "meta",
    ) -> Packed:
        """Reads images and prompts into arrays for `generate_packed`.

        `images[b]` is the image of `prompts[b]`, a list of several, or None. A prompt without any
        `<|image|>` mark gets its images in front.

        Raises ValueError for an image that cannot be read or marks that don't fit the images.
        """
        if isinstance(prompts, str) or isinstance(images, str | Path | np.ndarray | Image.Image):
            raise ValueError("images and prompts are lists, with one entry for each question")
        if not prompts:
            raise ValueError("at least one prompt is wanted")
        if len(images) != len(prompts):
            raise ValueError(
                f"one entry of images per prompt is wanted, got {len(images)} for {len(prompts)} "
                f"prompts; use None for a prompt without an image"
            )
        done: Done = {}
        questions = []
        for number, (own, prompt) in enumerate(zip(images, prompts, strict=True)):
            try:
                questions.append(self.read(own, prompt, done=done))
            except ValueError as error:
                where = f"prompt {number}: " if len(prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        return self.pack(questions, mask_mode=mask_mode)

    def read(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        prompt: Prompt,
        *,
        max_new_tokens: int = 0,
        done: Done | None = None,
    ) -> Question:
        """One prompt as tokens, and its images as the model sees them.

        `done` remembers images by path or identity: one that comes again is processed and encoded
        once. Raises ValueError if something cannot be used, or `max_new_tokens` would not fit.
        """
        done = {} if done is None else done
        processed = [self._process(image, done) for image in _as_list(images)]
        tokens = self._tokenize(prompt, len(processed))
        check_marks(tokens, len(processed), self.config.image_token_index)
        self._check_length(len(tokens), max_new_tokens)
        return Question(tokens=tokens, images=processed)

    def visual_tokens(self, question: Question) -> int:
        """How many visual tokens a question has, before any pruning."""
        per_tile = self.config.vision.tokens_per_tile
        return sum(image.num_tiles for image in question.images) * per_tile

    def pack(self, questions: Sequence[Question], *, mask_mode: MaskMode = "meta") -> Packed:
        """A batch of questions as arrays."""
        tokens = [question.tokens for question in questions]
        return pack(tokens, [question.images for question in questions], self.config, mask_mode)

    def generate(
        self,
        images: Sequence[ImageLike | Sequence[ImageLike] | None],
        prompts: Sequence[Prompt],
        pruners: Sequence[Any] = (),
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        mask_mode: MaskMode = "meta",
    ) -> Answers:
        """Answers each prompt about its images.

        Temperature 0 is greedy; otherwise row i draws with `seed + i`, or its own entry of `seed`.
        `pruners` apply in order. See `prepare` for images and prompts, `cross_decoder.MaskMode` for
        `mask_mode`.

        Raises ValueError for input that cannot be used, with the reason.
        """
        packed = self.prepare(images, prompts, mask_mode=mask_mode)
        return self.generate_packed(
            packed,
            pruners,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )

    def generate_packed(
        self,
        packed: Packed,
        pruners: Sequence[Any] = (),
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> Answers:
        """`generate` on prepared inputs, in the mask mode they were packed for."""
        mask_mode = packed.mask_mode
        pruners = tuple(pruners)
        self._check(packed, pruners, max_new_tokens)
        choice = sampling(
            len(packed.available), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        ends = jnp.asarray(self.end_tokens, jnp.int32)
        pad = jnp.asarray(self.pad_token, jnp.int32)
        if any(pruner.keep is None for pruner in pruners):
            front, keep, selection = programs.look(
                self.network, pruners, packed.inputs, mode=mask_mode
            )
            if keep is not None:
                keep, selection = programs.cut(keep, selection, self._capacity(keep))
            out = programs.go_on(
                self.network,
                front,
                keep,
                selection,
                choice,
                ends,
                pad,
                mode=mask_mode,
                max_new_tokens=max_new_tokens,
            )
        else:
            out = programs.generate(
                self.network,
                pruners,
                packed.inputs,
                choice,
                ends,
                pad,
                mode=mask_mode,
                max_new_tokens=max_new_tokens,
            )
        return self._answers(jax.device_get(out), packed)

    @staticmethod
    def _capacity(keep: Keep) -> int:
        """The smallest of a few sizes that holds what every sample wants to keep."""
        wanted = int(keep.valid.sum(axis=1).max())
        return round_up(max(wanted, 1), budget.capacities(keep.valid.shape[1]))

    def _answers(self, out: programs.Generated, packed: Packed) -> Answers:
        tokens = [
            row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)
        ]
        kept = None
        chosen = out.selection.kept
        if chosen is not None:
            kept = [
                locate(indices[valid], tiles, self.config)
                for indices, valid, tiles in zip(
                    np.asarray(chosen.indices), np.asarray(chosen.valid), packed.tiles, strict=True
                )
            ]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return Answers(
            text=[text.strip() for text in texts],
            tokens=tokens,
            available=packed.available,
            kept=kept,
            slots=packed.slots if chosen is None else chosen.indices.shape[1],
            reports=out.selection.states,
            logits=np.asarray(out.logits, np.float32),
        )

    def _check(self, packed: Packed, pruners: tuple[Any, ...], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is at least 1, got {max_new_tokens}")
        self._check_length(packed.longest, max_new_tokens)
        check_sites(pruners, self.sites, "this model")
        vision = self.config.vision
        images = max((max((i for i, _ in own), default=-1) + 1 for own in packed.tiles), default=0)
        for pruner in pruners:
            if pruner.keep is not None and images:
                budget.count(pruner.keep, images * vision.max_num_tiles * vision.tokens_per_tile)

    def _check_length(self, longest: int, new: int) -> None:
        room = self.config.text.max_position_embeddings
        if longest + new > room:
            raise ValueError(
                f"a prompt of {longest} tokens and {new} new ones do not fit the model's {room} "
                f"positions; shorten either"
            )

    def process_image(self, source: ImageLike) -> ProcessedImage:
        """The image as the model sees it: resized, cut into tiles, normalised."""
        out = self.processor.image_processor([[read_image(source)]], return_tensors="np")
        return ProcessedImage(
            pixels=np.asarray(out["pixel_values"][0, 0], np.float32),
            aspect_ratio_id=int(out["aspect_ratio_ids"][0, 0]),
            num_tiles=int(out["num_tiles"][0][0]),
        )

    def _process(self, source: ImageLike, done: Done) -> ProcessedImage:
        key = str(source) if isinstance(source, str | Path) else id(source)
        if key not in done:
            # the source is kept: once it is gone, another object may get its id
            done[key] = (source, self.process_image(source))
        return done[key][1]

    def _tokenize(self, prompt: Prompt, images: int) -> list[int]:
        if isinstance(prompt, str):
            if IMAGE_MARK not in prompt:
                prompt = IMAGE_MARK * images + prompt
            text = build_string_from_input(prompt, self.processor.bos_token, IMAGE_MARK)
            return list(self.processor.tokenizer(text)["input_ids"])
        if not self.processor.chat_template:
            raise ValueError("this checkpoint has no chat template; give the prompt as plain text")
        text = self.processor.apply_chat_template(prompt, add_generation_prompt=True)
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _as_list(own: Any) -> list[ImageLike]:
    if own is None:
        return []
    return list(own) if isinstance(own, list | tuple) else [own]


def load(folder: str | Path, dtype: str | None = None, *, vision_mode: VisionMode = "hf") -> Model:
    """Loads a Hugging Face folder of Llama 3.2 Vision, or one made of it by `catp-jax convert`.

    `dtype` casts the weights ("float32", "bfloat16"); None takes them as stored. `vision_mode` says
    which states of the tower the decoder gets, see `tiled_vit.VisionMode`.

    Raises ValueError if the folder is not a checkpoint that is supported, with all reasons.
    """
    folder = Path(folder)
    network, config = convert.load(folder, dtype)
    network.vision_model.mode = vision_mode
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has weights but no processor that can be read (tokenizer.json, "
            f"tokenizer_config.json, preprocessor_config.json): {error}"
        ) from None
    _check_processor(folder, processor, config)
    ends, pad = _special_tokens(folder)
    if pad is None:
        pad = processor.tokenizer.pad_token_id
    return Model(
        network=freeze(network),
        config=config,
        processor=processor,
        end_tokens=ends,
        pad_token=ends[0] if pad is None else pad,
    )


def _check_processor(folder: Path, processor: Any, config: MllamaConfig) -> None:
    """Raises ValueError if the processor makes other tiles or tokens than the model takes."""
    images, vision = processor.image_processor, config.vision
    pairs = {
        "tile height": (images.size["height"], vision.image_size),
        "tile width": (images.size["width"], vision.image_size),
        "max_image_tiles": (images.max_image_tiles, vision.max_num_tiles),
        "image token": (processor.image_token_id, config.image_token_index),
    }
    wrong = [
        f"{name}: {has}, not {wanted}" for name, (has, wanted) in pairs.items() if has != wanted
    ]
    if wrong:
        raise ValueError(f"{folder}: the processor does not fit config.json ({'; '.join(wrong)})")


def _special_tokens(folder: Path) -> tuple[tuple[int, ...], int | None]:
    """End and padding tokens: generation_config.json's word counts before config.json's."""
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    settings = {**settings, **settings.get("text_config", {})}
    own = folder / "generation_config.json"
    if own.is_file():
        try:
            settings |= json.loads(own.read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{own} cannot be read: {error}") from None
    ends = settings.get("eos_token_id")
    if ends is None:
        raise ValueError(f"{folder} names no eos_token_id in its config or generation config")
    return tuple(ends) if isinstance(ends, list) else (ends,), settings.get("pad_token_id")
