"""A loaded model: prompts and images in, answers out."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

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
from catp_jax.contract import Keep, Pruners, finds_number, settle, turn
from catp_jax.generation import generate as programs
from catp_jax.generation.buckets import TOKEN_COUNTS, round_up
from catp_jax.generation.decoding import Decoding, Stop
from catp_jax.generation.forcing import Forcing
from catp_jax.generation.options import Options
from catp_jax.loaded import Loaded
from catp_jax.pruning import budget
from catp_jax.pruning.named import Named, named
from catp_jax.pruning.named import pruners as pruners_of
from catp_jax.readers.chat import check_text
from catp_jax.readers.images import ImageLike
from catp_jax.readers.packing import Packed
from catp_jax.readers.reading import Prompt, Question
from catp_jax.readers.token_text import pieces, spellings, stop_machine, texts_of
from catp_jax.sharding import place


class Model(Loaded):
    """A checkpoint with its processor, ready to answer."""

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
        if any(map(finds_number, pruners)):
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
        if any(map(finds_number, pruners)):
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
        self.check_length(packed.longest, chosen.max_new_tokens)
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


def _shared(question: Question[Any], whole: Question[Any]) -> Question[Any]:
    """The question up to where the whole text's tokens part from its own."""
    pairs = zip(question.tokens, whole.tokens, strict=False)
    shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return dataclasses.replace(question, tokens=shared)
