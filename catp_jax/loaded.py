"""What was loaded, and prompts and images on their way in: read, packed into arrays, encoded."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.contract import BY_LAYER, Site
from catp_jax.generation import generate as programs
from catp_jax.generation.contrast import Contrasted, contrasted
from catp_jax.generation.options import Options
from catp_jax.models.frozen import Frozen
from catp_jax.models.narrow import narrow_type
from catp_jax.readers.chat import check_text
from catp_jax.readers.images import NO_LIST, Fetch, ImageLike
from catp_jax.readers.packing import Packed
from catp_jax.readers.processor import fingerprint
from catp_jax.readers.reading import ImageCache, Prompt, Question, Reader, arrange
from catp_jax.readers.seen import Seen
from catp_jax.sharding import place
from catp_jax.sharding.rules import shares


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint with its processor: what it is, and prompts as it reads them.

    `defaults` are the options that count where a call gives none, from the folder's
    generation_config.json; `note` says in a line what was found there, see
    `readers.generation_config`.
    """

    network: Frozen | Contrasted | place.Sharded
    reader: Reader
    end_tokens: tuple[int, ...]
    pad_token: int
    defaults: Options = dataclasses.field(default_factory=Options)
    note: str = ""
    fetch: Fetch | None = None

    def __repr__(self) -> str:
        return f"Model({self.network.summary})"

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.reader.config

    @property
    def sites(self) -> frozenset[Site]:
        """Where this model can be pruned."""
        return self.network.sites

    @property
    def dtype(self) -> jnp.dtype:
        """The number type of the language model, and so of its caches."""
        return self.network.thaw().dtype

    def describe(self) -> dict[str, Any]:
        """What tells this model from others, for records: its kind, size, number type, a checksum
        over a little of every array, and one of the processor.
        """
        network = self.network.thaw()
        layers = self.reader.cross_layers
        return {
            "model": type(network).__name__,
            "language_model": type(network.language_model).__name__,
            **({} if layers is None else {"cross_layers": layers}),
            "parameters": sum(array.size for array in self.network.arrays),
            "dtype": str(self.dtype),
            **({"weights": narrowed} if (narrowed := narrow_type(self.network.arrays)) else {}),
            "checksum": self.checksum,
            "processor": fingerprint(self.reader.processor),
            **self.reader.seen.described(),
            **self._contrast,
        }

    @functools.cached_property
    def checksum(self) -> str:
        """Of the shape and a little of every array."""
        checksum = hashlib.sha256()
        for array in self.network.arrays:
            some = place.fetch(array[(0,) * (array.ndim - 1)][:16] if array.ndim else array)
            checksum.update(repr(array.shape).encode() + np.asarray(some, np.float32).tobytes())
        return checksum.hexdigest()[:16]

    @property
    def _contrast(self) -> dict[str, Any]:
        """Of a contrasted model, for records."""
        network = self.network
        inner = network.frozen if isinstance(network, place.Sharded) else network
        if not isinstance(inner, Contrasted):
            return {}
        return {"contrast": [float(place.fetch(one)) for one in (inner.alpha, inner.beta)]}

    def seeing(self, image_scale: float = 1.0, tiles: int | None = None) -> Self:
        """The model, to which images are shown with fewer pixels, or of which an image has so many
        tiles at most; see `readers.seen`.

        Raises ValueError for a scale that is not above 0 and at most 1, and for tiles that the
        model does not have.
        """
        seen = Seen(image_scale, tiles)
        seen.check(self.config)
        reader: Any = self.reader
        return dataclasses.replace(self, reader=dataclasses.replace(reader, seen=seen))

    def contrasting(self, alpha: float = 1.0, beta: float = 0.1) -> Self:
        """The model, whose answers are what it says of the visual tokens that are kept in contrast
        to what it says of all of them; see `generation.contrast` (MINT), also for the errors. It
        takes twice the time and two caches.
        """
        if self._contrast:
            raise ValueError("this model is contrasted already; begin with the model itself")
        if not isinstance(self.network, place.Sharded):
            return dataclasses.replace(self, network=contrasted(self.network, alpha, beta))
        mesh, inner = self.network.mesh, contrasted(self.network.frozen, alpha, beta)
        numbers = place.replicate({"alpha": inner.alpha, "beta": inner.beta}, mesh)
        inner = dataclasses.replace(inner, **numbers)
        return dataclasses.replace(self, network=place.Sharded(mesh=mesh, frozen=inner))

    def prepare(
        self,
        images: Sequence[ImageLike | Sequence[ImageLike] | None] | None,
        prompts: Sequence[Prompt],
        begun: Sequence[str] | None = None,
    ) -> Packed[Any]:
        """Reads images and prompts into arrays for `generate_packed`.

        `images[b]` is the image of `prompts[b]`, a list of several, or None; None in place of all
        leaves them to the chats that hold their own, see `readers.chat`. `begun[b]` is what the
        answer begins with: the model goes on from there, see `generate`.

        Raises ValueError for an image that cannot be read or a prompt that doesn't fit its images.
        """
        return self.pack(self.questions(images, prompts, begun))

    def questions(
        self,
        images: Sequence[ImageLike | Sequence[ImageLike] | None] | None,
        prompts: Sequence[Prompt],
        begun: Sequence[str] | None = None,
        *,
        max_new_tokens: int = 0,
        cache: ImageCache | None = None,
    ) -> list[Question[Any]]:
        """What `prepare` packs: each prompt with its images, as `read` reads it."""
        if isinstance(prompts, NO_LIST) or isinstance(images, NO_LIST):
            raise ValueError("images and prompts are lists, with one entry for each question")
        if not prompts:
            raise ValueError("at least one prompt is wanted")
        images = [None] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise ValueError(
                f"one entry of images per prompt is wanted, got {len(images)} for {len(prompts)} "
                f"prompts; use None for a prompt without an image"
            )
        begun = [""] * len(prompts) if begun is None else begun
        if isinstance(begun, NO_LIST) or len(begun) != len(prompts):
            raise ValueError('begun is a list, with a text for each prompt; "" for none')
        cache = {} if cache is None else cache
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "cache": cache}
        questions = []
        for number, (sources, prompt, text) in enumerate(zip(images, prompts, begun, strict=True)):
            try:
                questions.append(self.read(sources, prompt, begun=text, **options))
            except ValueError as error:
                where = f"prompt {number}: " if len(prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        return questions

    def read(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        prompt: Prompt,
        *,
        begun: str = "",
        max_new_tokens: int = 0,
        cache: ImageCache | None = None,
    ) -> Question[Any]:
        """One prompt as tokens, what is `begun` of its answer, and its images as the model sees
        them.

        `cache` remembers images by path or identity: one that comes again is processed and encoded
        once. Raises ValueError if something cannot be used, or `max_new_tokens` would not fit.
        """
        cache = {} if cache is None else cache
        sources, prompt = arrange(_as_list(images), prompt, cache, self.fetch)
        check_text(begun, "the begun answer")
        question = self.reader.read(sources, prompt, cache, begun)
        self.check_length(self.reader.length(question), max_new_tokens)
        return question

    def pack(self, questions: Sequence[Question[Any]]) -> Packed[Any]:
        """A batch of questions as arrays, where the model is."""
        if isinstance(self.network, place.Sharded):
            mesh = self.network.mesh
            packed = self.reader.pack(questions, shares(mesh))
            inputs = place.place_inputs(packed.inputs, mesh)
        else:
            packed = self.reader.pack(questions)
            inputs = jax.device_put(packed.inputs)  # here, and not again at every call
        begun = tuple(question.begun for question in questions)
        return dataclasses.replace(packed, inputs=inputs, begun=begun if any(begun) else ())

    def late(self, packed: Packed[Any]) -> Packed[Any]:
        """The batch with each prompt's last token read from the cache, as answers are: what is
        pruned there counts from an answer's first word on, and answers may be of one word.

        Raises ValueError if this model prunes nothing in its cache, for a prompt of one token or
        one that ends with an image, which the last token alone would see; and for a batch that is
        encoded or late already.
        """
        if packed.encoded is not None or packed.last is not None:
            raise ValueError("late wants a batch as prepare gives it, before encode")
        if not self.sites & {*BY_LAYER}:
            raise ValueError(
                "this model prunes nothing in its cache, so it makes no difference what reads it"
            )
        tokens, valid = packed.inputs.tokens, packed.inputs.token_valid
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        last = jnp.where(valid, places, -1).max(axis=1, keepdims=True)
        of_prompt = jnp.take_along_axis(tokens, last, axis=1)[:, 0]
        is_image = np.asarray(place.fetch(of_prompt)) == self.config.image_token_index
        is_short = np.asarray(place.fetch(valid)).sum(axis=1) < 2
        if (is_image | is_short).any():
            row = int((is_image | is_short).argmax())
            raise ValueError(
                f"prompt {row} ends with an image or is a single token; to read its last token "
                "from the cache there must be text behind the image"
            )
        return dataclasses.replace(packed, inputs=packed.inputs.before(last), last=of_prompt)

    def encode(self, packed: Packed[Any]) -> Packed[Any]:
        """The batch with its images encoded, for whoever asks about it more than once."""
        encoded = programs.encode(self.network, packed.inputs)
        return dataclasses.replace(packed, encoded=encoded)

    def check_length(self, longest: int, new: int) -> None:
        """Raises ValueError for a prompt, or answer, beyond the model's last position."""
        room = self.reader.positions
        if room is not None and longest + new > room:
            raise ValueError(
                f"a prompt of {longest} tokens and {new} new ones do not fit the model's {room} "
                f"positions; shorten either"
            )


def _as_list(images: Any) -> list[ImageLike]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
