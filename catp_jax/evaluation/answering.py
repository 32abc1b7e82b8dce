"""A model for evaluation harnesses: it takes settings and options as they write them, and answers
any mixture of requests in their order.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from catp_jax import api
from catp_jax.answers import Likelihood, NonFinite
from catp_jax.batch import Answer, Request, answer, as_chat
from catp_jax.generation.options import Options
from catp_jax.pruning import make
from catp_jax.pruning.named import AUTO, named
from catp_jax.readers.reading import ImageCache, Prompt, Question
from catp_jax.study.tasks import QUESTION, check_prompt, fill

NEW_TOKENS = 1024  # of an answer whose task does not say how many
BATCHES_AT_ONCE = 8  # whose images are in memory
NO_ANSWER = "[no answer: {}]"
"""What stands for an answer that a model could not give."""

ANSWERING = ("seed", "logprobs", "num_return_sequences", "stop_strings", "bad_words")
SAMPLING = ("temperature", "top_k", "top_p")
TAKEN = {field.name for field in dataclasses.fields(Options)} - {*ANSWERING, *SAMPLING}
"""Options of transformers' `generate` that are ours too."""

EARLY = {True: "first", False: "heuristic"}
"""`early_stopping` of transformers, as ours."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: `images` brings them when its turn comes, `options` are those of transformers'
    `generate`, and `until` among them.
    """

    prompt: Prompt
    images: Callable[[], Sequence[Any]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Evaluated:
    """A loaded model with how it is pruned.

    `is_chat` puts prompts through the checkpoint's chat template; None: if it has one. Without a
    template a text goes where `prompt` has "{question}", as in BLIP-2's "Question: {question} Short
    answer:". `loading` are the keywords of `catp_jax.load`. Of `prune`, `keep` and `mesh` several
    parts may be joined by "+", since commas separate a harness's settings: `prune="l2+fastv"`,
    `keep="50%+8"`.

    Raises ValueError for settings that are none or do not go together, and for a method that does
    not fit the model.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        prune: str | None = None,
        keep: int | str | None = None,
        batch_size: int | str = 1,
        is_chat: bool | None = None,
        prompt: str = QUESTION,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        check_prompt(prompt)
        if is_chat and prompt != QUESTION:
            raise ValueError(
                "a prompt goes in place of the chat template; leave out prompt or chat"
            )
        known = [name for name in inspect.signature(api.load).parameters if name != "folder"]
        if unknown := [name for name in loading if name not in known]:
            raise ValueError(
                f"{', '.join(unknown)}: no setting of a model; there are pretrained, prune, keep, "
                f"batch_size, chat, prompt, seed, {', '.join(known)}"
            )
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size is a number of at least 1, got {batch_size!r}")
        self.batch_size, self.prompt, self.seed = int(batch_size), prompt, seed
        self.prune, self.keep = _parts(prune), _parts(keep)
        methods = named(self.prune, self.keep)  # before the model, which may take minutes
        loading["mesh"] = _parts(loading.get("mesh"))
        # the options are the tasks': a checkpoint's own would draw where they want one answer
        self.model = api.load(pretrained, **{"generation_config": False, **loading})
        for method, budget in methods:
            make(method, None if budget == AUTO else 1, self.model.sites)
        has_template = bool(getattr(self.model.reader.processor, "chat_template", None))
        self.is_chat = has_template if is_chat is None else is_chat
        if self.is_chat and prompt != QUESTION:
            raise ValueError(
                f"{pretrained} has a chat template, which its prompts go through; leave out "
                f"prompt={prompt!r}, or say chat=false"
            )

    def answers(
        self, asked: Sequence[Asked], progress: Callable[[int], Any] = lambda answered: None
    ) -> list[str]:
        """The answers, in the order of the requests. One that cannot be given says so in its place,
        and why; `progress` hears how many more there are.

        Raises ValueError for options that cannot be.
        """
        groups: dict[Options, list[int]] = {}
        for number, one in enumerate(asked):
            options = dataclasses.replace(options_of(one.options), seed=self.seed)
            groups.setdefault(options, []).append(number)
        texts = [""] * len(asked)
        for options, numbers in groups.items():
            step = self.batch_size * BATCHES_AT_ONCE
            for start in range(0, len(numbers), step):
                requests = [
                    Request(
                        self._worded(asked[n].prompt),
                        tuple(asked[n].images()),
                        number=n,
                        line=n + 1,
                    )
                    for n in numbers[start : start + step]
                ]
                for found in answer(
                    self.model,
                    requests,
                    batch_size=self.batch_size,
                    prune=self.prune,
                    keep=self.keep,
                    options=options,
                    is_chat=self.is_chat,
                ):
                    if isinstance(found, Answer):
                        texts[found.request.number] = cut(found.text, options.strings)
                    elif found.line is not None:
                        texts[found.line - 1] = _no_answer(found.line - 1, found.message)
                    progress(1)
        return texts

    def likelihoods(
        self,
        asked: Sequence[tuple[Asked, str]],
        progress: Callable[[int], Any] = lambda answered: None,
    ) -> list[Likelihood | None]:
        """How likely each request's answer is; None, and a warning, where it cannot be said."""
        found: list[Likelihood | None] = [None] * len(asked)
        for start in range(0, len(asked), self.batch_size):
            pairs: dict[int, tuple[Question[Any], Question[Any]]] = {}
            cache: ImageCache = {}
            for number, (one, text) in enumerate(asked[start : start + self.batch_size], start):
                try:
                    pairs[number] = self._pair(one, text, cache)
                except Exception as error:  # as in `answer`: the others get theirs
                    _no_answer(number, str(error) if isinstance(error, ValueError) else repr(error))
            for number, likelihood in self._batch(pairs).items():
                found[number] = likelihood
            progress(min(self.batch_size, len(asked) - start))
        return found

    def _worded(self, prompt: Prompt) -> Prompt:
        return fill(self.prompt, prompt) if isinstance(prompt, str) else prompt

    def _batch(self, pairs: Mapping[int, tuple[Any, Any]]) -> dict[int, Likelihood]:
        """The likelihoods in one batch at most, without those that cannot be said."""
        if not pairs:
            return {}
        rows = [*pairs.values()]
        rows += rows[:1] * (self.batch_size - len(rows))  # so that all have one shape
        questions, answered = zip(*rows, strict=True)
        try:
            some = self.model.likelihoods(questions, answered, prune=self.prune, keep=self.keep)
        except NonFinite as error:
            bad = {number for place, number in enumerate(pairs) if place in error.numbers}
            for number in bad:
                _no_answer(number, str(NonFinite()))
            return self._batch({number: pairs[number] for number in pairs if number not in bad})
        found = dict(zip(pairs, some, strict=False))
        for number, likelihood in found.items():
            if not likelihood.tokens:
                _no_answer(number, "the answer is empty")
        return {number: likelihood for number, likelihood in found.items() if likelihood.tokens}

    def _pair(self, one: Asked, text: str, cache: ImageCache) -> tuple[Any, Any]:
        """A question, and the same with its answer. Raises if it cannot be asked, ValueError where
        that was foreseen.
        """
        images = tuple(one.images())
        worded = self._worded(one.prompt)
        prompt = as_chat(Request(worded, images)) if self.is_chat else worded
        if isinstance(prompt, str):  # space belongs to the word behind it, as tokenizers see it
            bare = prompt.rstrip(" ")
            prompt, text = bare, prompt[len(bare) :] + text
        question = self.model.read(images, prompt, cache=cache)
        return question, self.model.read(images, prompt, begun=text, cache=cache)


def options_of(given: Mapping[str, Any]) -> Options:
    """What a task says to transformers' `generate`, as ours; what is None counts as not said.

    Without `do_sample` a temperature above 0 draws. Raises ValueError for values out of range.
    """
    said = {name: value for name, value in given.items() if value is not None}
    until = said.pop("until", ())
    strings = [until] if isinstance(until, str) else until
    temperature = said.pop("temperature", None)
    drawing = {name: said.pop(name) for name in ("top_k", "top_p") if name in said}
    if said.pop("do_sample", bool(temperature)) and temperature != 0:
        drawing["temperature"] = 1.0 if temperature is None else temperature
    else:
        drawing = {}
    options = {name: said.pop(name) for name in [*said] if name in TAKEN}
    early = options.pop("early_stopping", None)
    if options.get("num_beams", 1) == 1:
        options.pop("length_penalty", None)
    elif early is not None:
        options["early_stopping"] = EARLY.get(early, early)
    if said:
        warnings.warn(f"no option of generation here: {', '.join(said)}", stacklevel=2)
    return Options(
        **{"max_new_tokens": NEW_TOKENS, **options, **drawing},
        stop_strings=tuple(text for text in strings if text),
    )


def cut(text: str, strings: Sequence[str]) -> str:
    """A text up to the first of the strings."""
    return text[: min((place for s in strings if (place := text.find(s)) >= 0), default=None)]


def _parts(value: Any) -> Any:
    """A text with commas in place of "+"; a fraction that a harness made of a text is one again."""
    value = str(value) if isinstance(value, float) else value
    return value.replace("+", ",") if isinstance(value, str) else value


def _no_answer(number: int, message: str) -> str:
    warnings.warn(f"request {number} got no answer: {message}", stacklevel=2)
    return NO_ANSWER.format(message)
