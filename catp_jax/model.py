"""A loaded model: prompts and images in, answers out."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.answers import (
    Answers,
    Likelihood,
    NonFinite,
    alternatives_of,
    likelihoods_of,
    logprobs_of,
)
from catp_jax.contract import BY_LAYER, Keep, Pruners, Site, settle, turn
from catp_jax.generation import generate as programs
from catp_jax.generation.buckets import TOKEN_COUNTS, round_up
from catp_jax.generation.contrast import Contrasted, contrasted
from catp_jax.generation.decoding import Decoding, Stop
from catp_jax.generation.forcing import Forcing
from catp_jax.generation.options import Options
from catp_jax.models.frozen import Frozen
from catp_jax.models.narrow import narrow_type
from catp_jax.pruning import budget
from catp_jax.pruning.named import Named, named
from catp_jax.pruning.named import pruners as pruners_of
from catp_jax.readers.chat import check_text
from catp_jax.readers.images import NO_LIST, Fetch, ImageLike
from catp_jax.readers.packing import Packed
from catp_jax.readers.processor import fingerprint
from catp_jax.readers.reading import ImageCache, Prompt, Question, Reader, arrange
from catp_jax.readers.seen import Seen
from catp_jax.readers.token_text import pieces, spellings, stop_machine, texts_of
from catp_jax.sharding import place
from catp_jax.sharding.rules import shares


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint with its processor, ready to answer.

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

    def seeing(self, image_scale: float = 1.0, tiles: int | None = None) -> "Model":
        """The model, to which images are shown with fewer pixels, or of which an image has so many
        tiles at most; see `readers.seen`.

        Raises ValueError for a scale that is not above 0 and at most 1, and for tiles that the
        model does not have.
        """
        seen = Seen(image_scale, tiles)
        seen.check(self.config)
        reader: Any = self.reader
        return dataclasses.replace(self, reader=dataclasses.replace(reader, seen=seen))

    def contrasting(self, alpha: float = 1.0, beta: float = 0.1) -> "Model":
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
        self._check_length(self.reader.length(question), max_new_tokens)
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

    def generate(
        self,
        images: Sequence[ImageLike | Sequence[ImageLike] | None] | None,
        prompts: Sequence[Prompt],
        pruners: Sequence[Any] = (),
        *,
        prune: str | Sequence[str] | None = None,
        keep: int | str | Sequence[int | str] | None = None,
        begun: Sequence[str] | None = None,
        **options: Any,
    ) -> Answers:
        """Answers each prompt about its images.

        Methods apply in order: `pruners`, or by name, as the command takes them: `prune="fastv",
        keep="50%"`. The options are the fields of `generation.options.Options`. See `prepare` for
        images and prompts. What is not given is as `defaults` have it. An answer that is `begun`
        goes on from there, and `text` and `tokens` are what follows: it stands behind the prompt or
        what the chat template puts before an answer, and with T5 the decoder begins with it.

        Raises ValueError for input that cannot be used, with the reason.
        """
        packed = self.prepare(images, prompts, begun)
        return self.generate_packed(packed, pruners, prune=prune, keep=keep, **options)

    def generate_packed(
        self,
        packed: Packed[Any],
        pruners: Sequence[Any] = (),
        *,
        prune: str | Sequence[str] | None = None,
        keep: int | str | Sequence[int | str] | None = None,
        **options: Any,
    ) -> Answers:
        """`generate` on prepared inputs."""
        return self.begin(packed, pruners, prune=prune, keep=keep, **options)()

    def begin(
        self,
        packed: Packed[Any],
        pruners: Sequence[Any] = (),
        *,
        prune: str | Sequence[str] | None = None,
        keep: int | str | Sequence[int | str] | None = None,
        **options: Any,
    ) -> Callable[[], Answers]:
        """Starts `generate_packed` and returns at once; calling the result waits for answers."""
        chosen = self._options(options)
        out = self._run(packed, *self._asked(packed, pruners, named(prune, keep), chosen))
        return lambda: self._answers(place.fetch(out), packed)

    def likelihoods(
        self,
        questions: Sequence[Question[Any]],
        answered: Sequence[Question[Any]],
        pruners: Sequence[Any] = (),
        *,
        prune: str | Sequence[str] | None = None,
        keep: int | str | Sequence[int | str] | None = None,
    ) -> list[Likelihood]:
        """How likely the model finds given answers: `answered` are the same questions as
        `questions`, both from `read`, but that they have `begun` with the answer.

        An answer's tokens are those of the whole text from where it parts from the question: if a
        word runs across the border, that word is among them. An empty answer is certain.
        """
        pairs = zip(questions, answered, strict=True)
        packed = self.pack([_shared(question, whole) for question, whole in pairs])
        before = self.reader.before_answers(packed)
        whole = self.reader.before_answers(self.reader.pack(answered))
        given = [tokens[len(start) :] for start, tokens in zip(before, whole, strict=True)]
        new = round_up(max(1, *map(len, given)), TOKEN_COUNTS)
        chosen = self._pruners(packed, tuple(pruners), named(prune, keep))
        decoding = Forcing(
            given=jnp.asarray([[*tokens, *[0] * (new - len(tokens))] for tokens in given]),
            lengths=jnp.asarray([len(tokens) for tokens in given]),
        )
        stop = Options(max_new_tokens=new).stop(self.end_tokens, self.pad_token)
        out = place.fetch(self._run(packed, *self._placed(chosen, decoding, stop)))
        self._check_finite(out.is_finite, 1)
        return likelihoods_of(out.written, given)

    def _run(
        self, packed: Packed[Any], pruners: Pruners, decoding: Decoding, stop: Stop
    ) -> programs.Generated:
        if any(pruner.keep is None for pruner in pruners):
            selected = self._selected(pruners, packed)
            return programs.generate_from(self.network, *selected, decoding, stop)
        return programs.generate(self.network, pruners, packed.given, decoding, stop)

    def stream(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        prompt: Prompt,
        pruners: Sequence[Any] = (),
        *,
        prune: str | Sequence[str] | None = None,
        keep: int | str | Sequence[int | str] | None = None,
        begun: str = "",
        **options: Any,
    ) -> Iterator[str]:
        """The answer to one prompt, in pieces as its tokens come: put together they are what
        `generate` answers.

        A piece is text that no later token changes, so it may wait for the rest of a character, or
        for what follows a space. Arguments are those of `generate` for one prompt.

        Raises ValueError at once for input that cannot be used, and for several answers at a time.
        """
        chosen = self._options(options)
        if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
            raise ValueError(
                "a stream has one answer, drawn or greedy: leave out num_beams and "
                "num_return_sequences"
            )
        if chosen.logprobs is not None:
            raise ValueError("a stream is text alone; for logprobs use generate")
        packed = self.prepare([images], [prompt], [begun])
        asked = self._asked(packed, pruners, named(prune, keep), chosen)
        return pieces(self.reader.tokenizer, self._tokens(packed, *asked), begun)

    def _tokens(
        self, packed: Packed[Any], pruners: Pruners, decoding: Decoding, stop: Stop
    ) -> Iterator[int]:
        """The tokens of the first prompt's answer, one at a time."""
        new = stop.max_new_tokens
        if any(pruner.keep is None for pruner in pruners):
            selected = self._selected(pruners, packed)
            start = programs.prefill_from(self.network, *selected, new_slots=new)
        else:
            start = programs.prefill(self.network, pruners, packed.given, new_slots=new)
        carry = programs.first(start, decoding, stop)
        del start  # its cache, or there would be two
        for number in range(1, new + 1):
            state = carry.state
            token, is_open, finite = place.fetch((carry.last[0], state.is_open[0], state.is_finite))
            self._check_finite(finite, 1)
            yield int(token)
            if number == new or not is_open:
                return
            carry = programs.following(self.network, pruners, carry, decoding, stop)

    def _asked(
        self, packed: Packed[Any], pruners: Sequence[Any], methods: Named, chosen: Options
    ) -> tuple[Pruners, Decoding, Stop]:
        """What programs are called with besides the model and its inputs, where the model is."""
        pruners = self._pruners(packed, tuple(pruners), methods)
        self._check_length(packed.longest, chosen.max_new_tokens)
        before = self.reader.before_answers(packed) if chosen.reads_prompts else None
        decoding = chosen.decoding(len(packed.available), before)
        size, strings = self.config.text.vocab_size, chosen.strings
        machine = stop_machine(self.reader.tokenizer, size, strings) if strings else None
        stop = chosen.stop(self.end_tokens, self.pad_token, machine)
        return self._placed(pruners, decoding, stop)

    def _placed(
        self, pruners: Pruners, decoding: Decoding, stop: Stop
    ) -> tuple[Pruners, Decoding, Stop]:
        if isinstance(self.network, place.Sharded):
            return place.replicate((pruners, decoding, stop), self.network.mesh)
        return pruners, decoding, stop

    def _selected(self, pruners: Pruners, packed: Packed[Any]) -> tuple[Pruners, Any, Any, Any]:
        """The prefill up to the selection, for a method that finds its own number of tokens: the
        selection is cut to a capacity that holds them.
        """
        front, found, selection = programs.select_tokens(self.network, pruners, packed.given)
        if found is not None:
            found, selection = programs.truncate(found, selection, self._capacity(found))
        return pruners, front, found, selection

    @staticmethod
    def _capacity(keep: Keep) -> int:
        """The smallest of a few sizes that holds what every sample wants to keep."""
        wanted = int(keep.valid.sum(axis=1).max())
        return round_up(max(wanted, 1), budget.capacities(keep.valid.shape[1]))

    def _answers(self, out: programs.Generated, packed: Packed[Any]) -> Answers:
        answers = len(out.lengths) // len(packed.available)  # to a prompt
        is_finite = np.repeat(out.is_finite, len(out.lengths) // len(out.is_finite))
        self._check_finite(is_finite, answers)
        tokens = [
            row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)
        ]
        kept, chosen = None, out.selection.kept
        if chosen is not None:
            rows = zip(np.asarray(chosen.indices), np.asarray(chosen.valid), strict=True)
            kept = [
                self.reader.locate(packed, row, indices[valid])
                for row, (indices, valid) in enumerate(rows)
            ]
        begun = [text for text in packed.begun for _ in range(answers)]
        texts = texts_of(self.reader.tokenizer, tokens, begun or [""] * len(tokens))
        return Answers(
            text=texts,
            tokens=tokens,
            logprobs=logprobs_of(out.written),
            alternatives=alternatives_of(out.written),
            available=packed.available,
            kept=kept,
            cached=out.selection.cached,
            is_merged=out.selection.merged,
            capacity=packed.capacity if chosen is None else chosen.indices.shape[1],
            reports=out.selection.states,
            logits=np.asarray(out.logits, np.float32),
        )

    def _options(self, given: dict[str, Any]) -> Options:
        """Checked, with bad words as tokens."""
        chosen = self.defaults.over(**given)
        for name, texts in {"bad_words": chosen.bad_words, "stop_strings": chosen.strings}.items():
            for text in texts:
                check_text(text, f"one of {name}")
        words = [ids for w in chosen.bad_words for ids in spellings(self.reader.tokenizer, w)]
        if words:
            chosen = dataclasses.replace(
                chosen, bad_words=(), bad_words_ids=[*chosen.bad_words_ids, *words]
            )
        chosen.check_vocabulary(self.config.text.vocab_size)
        return chosen

    @staticmethod
    def _check_finite(is_finite: np.ndarray, each: int) -> None:
        """`each`: answers to a prompt."""
        if not is_finite.all():
            raise NonFinite(sorted({int(number) // each for number in np.flatnonzero(~is_finite)}))

    def _pruners(self, packed: Packed[Any], pruners: Pruners, methods: Named) -> Pruners:
        if methods and pruners:
            raise ValueError("give pruners, or methods by name (prune and keep), not both")
        if methods:
            pruners = pruners_of(
                methods, packed.available, packed.capacity, self.sites, packed.most
            )
        for pruner in pruners:
            if (of := getattr(pruner, "of_model", None)) not in (None, self.checksum):
                raise ValueError(
                    f"what {type(pruner).__name__} has learned is of another model (checksum {of}, "
                    f"and this one has {self.checksum}); calibrate it for this one, loaded as it "
                    "is now"
                )
        if methods:
            return pruners
        pruners = settle(pruners, self.sites)
        some = [pruner for pruner in pruners if not getattr(pruner, "keeps_all", False)]
        keeps = [pruner.keep for pruner in sorted(some, key=turn)]
        budget.check([keep for keep in keeps if keep is not None], packed.most)
        return pruners

    def _check_length(self, longest: int, new: int) -> None:
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


def _shared(question: Question[Any], whole: Question[Any]) -> Question[Any]:
    """The question up to where the whole text's tokens part from its own."""
    pairs = zip(question.tokens, whole.tokens, strict=False)
    shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return dataclasses.replace(question, tokens=shared)
