"""Requests by the file: answered a batch at a time, and one that cannot be used costs no other.

    {"prompt": "what is this?", "images": ["a.png"], "id": "first"}     see `readers.rows`
    {"prompt": "what is this?", "images": "a.png", "begun": "It is"}    the answer goes on from that
    {"messages": [{"role": "user", "content": "what is this?"}]}        for the chat template; its
                                                    parts may hold images, see `readers.chat`

Images are read while the device answers the batch before. What is answered goes to a file that
resumes (`lines`), or wherever the caller puts it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from catp_jax.answers import Answers, NonFinite
from catp_jax.generation.options import Options
from catp_jax.generation.sampling import check_seeds
from catp_jax.lines import JsonLines, Row
from catp_jax.model import Model
from catp_jax.readers.chat import take_images
from catp_jax.readers.reading import Prompt, Question
from catp_jax.readers.rows import lines_of, parse
from catp_jax.sharding.distributed import agreed, is_first

OF_A_MODEL = (".safetensors", ".json", ".model", ".txt", ".jinja")  # files, by their endings
ANSWERED = {"line": (int,), "text": (str, list), "settings": (str,), "images": (list,)}
KEYS = ("prompt", "messages", "images", "image", "begun", "id")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and its images; `number` is its place among all, from 0, and `line` its line in a
    file, from 1. `key` names its answer, which goes on from what is `begun`.
    """

    prompt: Prompt
    images: tuple[Any, ...] = ()
    number: int = 0
    line: int | None = None
    key: str | int | None = None
    begun: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A request that got no answer, and why."""

    line: int | None
    message: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a request got: the answers to prompt `index` of its batch."""

    request: Request
    answers: Answers
    index: int

    @property
    def text(self) -> str:
        """The answer; of several the first."""
        return self.texts[0]

    @property
    def texts(self) -> list[str]:
        """All answers, `num_return_sequences` of them."""
        return self._entries(self.answers.text)

    def _entries(self, entries: list[Any]) -> list[Any]:
        """Those of this request, of a list that has one for each answer."""
        each = len(entries) // len(self.answers.available)
        return entries[self.index * each : (self.index + 1) * each]

    def as_row(self) -> Row:
        """As JSON has it, with what was kept; several answers are lists."""
        request, answers, index = self.request, self.answers, self.index
        place = {"line": request.line, "id": request.key}
        return {
            **{key: value for key, value in place.items() if value is not None},
            **_asked(request),
            **self._answers(),
            "visual_tokens": answers.available[index],
            "kept": None if answers.kept is None else answers.kept[index].as_rows(),
            "reports": [
                {name: value[index].item() for name, value in vars(report).items()}
                for report in answers.reports
                if dataclasses.is_dataclass(report)
            ],
        }

    def _answers(self) -> Row:
        """Text and tokens, and logprobs where they were asked for."""
        answers = self.answers
        row: Row = {"text": self.texts, "tokens": self._entries(answers.tokens)}
        if answers.logprobs is not None:
            row["logprobs"] = self._entries(answers.logprobs)
        if answers.alternatives is not None:
            row["alternatives"] = [
                [[{"token": token, "logprob": value} for token, value in place] for place in text]
                for text in self._entries(answers.alternatives)
            ]
        return row if len(self.texts) > 1 else {key: value[0] for key, value in row.items()}


def read_requests(path: Path) -> tuple[list[Request], list[Problem]]:
    """The requests of a file, and what is wrong with the lines that are none.

    Images' paths start from the file's folder. Raises ValueError if there is no file or no line.
    """
    requests, problems, lines = [], [], {}
    for number, line in lines_of(path):
        try:
            request = _request(line, number, path.parent)
            if request.key is not None and lines.setdefault(request.key, number) != number:
                raise ValueError(f"id {request.key!r} is that of line {lines[request.key]}")
            requests.append(request)
        except ValueError as error:
            problems.append(Problem(number, str(error)))
    if not requests and not problems:
        raise ValueError(f"{path} has no requests; give one JSON object a line")
    return requests, problems


def _request(line: bytes, number: int, folder: Path) -> Request:
    """A line's request. Raises ValueError if it is none."""
    row = parse(line, KEYS, folder)
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("give either a prompt or messages")
    prompt: Any = row.get("prompt", row.get("messages"))
    if not isinstance(prompt, str if "prompt" in row else list):
        raise ValueError(f"a prompt is a text, and messages are a list; got {prompt!r}")
    begun = row.get("begun", "")
    if not isinstance(begun, str):
        raise ValueError(f"what is begun of an answer is a text, got {begun!r}")
    images = row["images"]
    if isinstance(prompt, list):
        prompt, images = take_images(prompt, images, folder)
    return Request(prompt, tuple(images), number - 1, number, row["id"], begun)


def answer(
    model: Model,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    prune: str | Sequence[str] | None = None,
    keep: int | str | Sequence[int | str] | None = None,
    options: Options | None = None,
    is_chat: bool = False,
) -> Iterator[Answer | Problem]:
    """Answers requests a batch at a time; problems come as they are found.

    `is_chat` puts plain prompts through the checkpoint's chat template. Each request draws with
    `seed` and its own number, whatever else is asked; the answers of request i with seeds from
    `seed + i * num_return_sequences` on. Several hosts take part together.

    Raises ValueError for a request that cannot be used and has no line to tell it by.
    """
    options = options or dataclasses.replace(model.defaults, num_return_sequences=1)
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    if not isinstance(options.seed, int):
        raise ValueError(
            f"seed is one number, to which each request adds its own; got {options.seed!r}"
        )
    last = max((request.number for request in requests), default=0)
    check_seeds([*_seeds(options, last)])
    under_way: Iterator[Answer | Problem] = iter(())
    for start in range(0, len(requests), batch_size):
        chunk, images = requests[start : start + batch_size], {}
        usable: list[tuple[Request, Question[Any]]] = []
        for request in chunk:
            try:
                prompt = as_chat(request) if is_chat else request.prompt
                question = model.read(
                    request.images,
                    prompt,
                    begun=request.begun,
                    max_new_tokens=options.max_new_tokens,
                    cache=images,
                )
                usable.append((request, question))
            except Exception as error:  # whatever it is, the others get their answers
                if request.line is None:
                    raise
                message = str(error) if isinstance(error, ValueError) else repr(error)
                yield Problem(request.line, message)
        readable = {request.number for request, _ in usable}
        flags = agreed([request.number in readable for request in chunk])
        shared = {one.number for one, flag in zip(chunk, flags, strict=True) if flag}
        for request, _ in usable:
            if request.number not in shared:
                yield Problem(request.line, "another process cannot use it")
        usable = [pair for pair in usable if pair[0].number in shared]
        yield from under_way  # the device was at work while these were read
        under_way = _begin(model, usable, batch_size, prune, keep, options)
    yield from under_way


def _begin(
    model: Model,
    usable: Sequence[tuple[Request, Question[Any]]],
    batch_size: int,
    prune: Any,
    keep: Any,
    options: Options,
) -> Iterator[Answer | Problem]:
    """Sets the device to work on a batch; the answers come from what is returned."""
    if not usable:
        return iter(())
    # short batches are filled up, so that all have one shape
    filled = [*usable, *[usable[0]] * (batch_size - len(usable))]
    seeds = [seed for request, _ in filled for seed in _seeds(options, request.number)]
    fetch = model.begin(
        model.pack([question for _, question in filled]),
        prune=prune,
        keep=keep,
        **vars(dataclasses.replace(options, seed=seeds)),
    )

    def answers() -> Iterator[Answer | Problem]:
        try:
            found = fetch()
        except NonFinite as error:
            bad = [usable[number][0] for number in error.numbers if number < len(usable)]
            if any(request.line is None for request in bad):
                raise
            yield from (Problem(request.line, str(NonFinite())) for request in bad)
            numbers = {request.number for request in bad}
            rest = [pair for pair in usable if pair[0].number not in numbers]
            yield from _begin(model, rest, batch_size, prune, keep, options)
            return
        for index, (request, _) in enumerate(usable):
            yield Answer(request, found, index)

    return answers()


def _seeds(options: Options, number: int) -> range:
    """What the answers to a request draw with."""
    each = options.num_return_sequences
    first = options.seed + number * each  # type: ignore[operator]
    return range(first, first + each)


class AnswerFile:
    """A file of answers, which resumes: a request that has its answer is not asked again.

    Of several hosts, all read the file and one writes.
    """

    def __init__(self, path: Path, report: Any = lambda message: None) -> None:
        self.path, self.settings, self.rows = path, "", list[Row]()
        self.lines = JsonLines(path, "a file of answers", '{"line": ', self._read, report)

    def _read(self, number: int, row: Row) -> None:
        if missing := [key for key in ANSWERED if key not in row]:
            raise ValueError(f"an answer without {', '.join(missing)}")
        for key, kinds in {**ANSWERED, "id": (str, int, type(None))}.items():
            if type(row.get(key)) not in kinds:
                raise ValueError(f"an answer whose {key} is {row[key]!r}")
        self.rows.append(row)

    def missing(self, requests: Sequence[Request]) -> tuple[list[Request], list[Problem]]:
        """The requests that have no answer yet, and those whose answer is another's."""
        there = {_place(row.get("id"), row["line"]): row for row in self.rows}
        out, problems = [], []
        for request in requests:
            row = there.get(_place(request.key, request.line))
            if row is None:
                out.append(request)
            elif any(row.get(name) != value for name, value in _asked(request).items()):
                message = f"{self.path} has an answer to another prompt in its place"
                problems.append(Problem(request.line, message))
        return out, problems

    def begin(self, settings: dict[str, Any]) -> None:
        """Takes the file for answers under these settings, which are noted with each by a digest.

        Raises ValueError if it has some under others, or if another process writes it.
        """
        record = json.dumps(settings, sort_keys=True).encode()
        self.settings = hashlib.sha256(record).hexdigest()[:8]
        if any(row["settings"] != self.settings for row in self.rows):
            raise ValueError(
                f"{self.path} has answers of another model or with other options; give another "
                "--out, or what it was begun with"
            )
        if is_first():
            self.lines.claim()

    def add(self, answer: Answer) -> None:
        """Writes an answer at once. Raises ValueError for one to a request that has no line."""
        if answer.request.line is None:
            raise ValueError("a file of answers is for requests with a line; give each its own")
        if is_first():
            row = {**answer.as_row(), "settings": self.settings}
            self.lines.append(row)
            self.rows.append(row)


def fingerprint(folder: Path) -> list[Any]:
    """What tells a model's folder from others without reading its weights: whatever else is put
    into it, such as a file of answers, counts for nothing.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix in OF_A_MODEL]
    stats = [(path.name, path.stat()) for path in files if path.is_file()]
    return [str(folder.resolve()), *((name, s.st_size, s.st_mtime_ns) for name, s in stats)]


def _place(key: str | int | None, line: int | None) -> tuple[str, str | int | None]:
    """How a request's answer is found again: an id is not a line's number."""
    return ("line", line) if key is None else ("id", key)


def _name(image: Any) -> str:
    """A path as it is; of anything else, whose content may be long, what kind it is."""
    if isinstance(image, Path) or (isinstance(image, str) and len(image) < 4096):
        return str(image)
    digest = hashlib.sha256(image.encode() if isinstance(image, str) else repr(image).encode())
    return f"{type(image).__name__} {digest.hexdigest()[:16]}"


def _asked(request: Request) -> Row:
    """The request itself, as JSON has it."""
    images = [_name(image) for image in request.images]
    row: Row = {"prompt": request.prompt, "images": images}
    return row | ({"begun": request.begun} if request.begun else {})


def as_chat(request: Request) -> Prompt:
    """The prompt as a user's message, images first."""
    if not isinstance(request.prompt, str):
        return request.prompt
    content: list[dict[str, Any]] = [{"type": "image"} for _ in request.images]
    content.append({"type": "text", "text": request.prompt})
    return [{"role": "user", "content": content}]
