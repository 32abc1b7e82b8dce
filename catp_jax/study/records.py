"""What a study writes down: one frozen class for each kind of line in its file (see `journal`).

A field that a class gains is written, read, checked and shown in the CSV without further ado. One
with a default leaves older files readable; any other change is a new `FORMAT`.
"""

import dataclasses
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from catp_jax.generation.options import Options
from catp_jax.study.plain import Record, to_plain
from catp_jax.study.tasks import QUESTION, fill

FORMAT = 3
UNPRUNED = "unpruned"
SEEN: dict[str, type] = {"image_scale": float, "tiles": int}
"""What a model may see less of, unpruned, by the name that it has as a setting's method."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method and how many visual tokens it keeps: a count, or a percentage such as "25%".

    Several that apply in order are separated by commas, and so are their budgets:
    `Setting("catp,fastv", "16,8")`. `Setting("unpruned", None)` prunes nothing, nor does
    `Setting("image_scale", "0.5")` or `Setting("tiles", "1")`, which show the model smaller images.
    """

    method: str
    keep: int | str | None

    @property
    def seen(self) -> dict[str, Any]:
        """What the model sees less of: keywords of its `seeing`."""
        kind = SEEN.get(self.method)
        return {} if kind is None else {self.method: kind(self.keep)}

    def __str__(self) -> str:
        if self.seen:
            return f"{self.method} {self.keep}"
        return self.method if self.keep is None else f"{self.method}, keep {self.keep}"


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How every question is asked: what must not change within one file.

    `source` says where the questions of the `task` come from, and `left_out` how many of them could
    not be used, by the reason. `prompt` has "{question}" where the question goes; `is_chat` puts it
    through the model's chat template, and the answer goes on from what is `begun`. If it `is_late`,
    the prompt's last token is read from the cache. `loading` is how the model was loaded, as far as
    its own description does not tell.

    `seed` draws the bootstrap and, with a question's number, sampled answers and what random
    methods keep.
    """

    task: str = "questions"
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    prompt: str = QUESTION
    is_chat: bool = False
    begun: str = ""
    is_late: bool = False
    batch: int = 32
    options: Options = Options(max_new_tokens=10)  # noqa: RUF009 it is frozen
    seed: int = 42
    loading: dict[str, Any] = dataclasses.field(default_factory=dict)

    def ask(self, question: str) -> str | list[dict[str, Any]]:
        """What the model is asked: a text, or a chat of one message with an image."""
        text = fill(self.prompt, question)
        if not self.is_chat:
            return text
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


@dataclasses.dataclass(frozen=True)
class Data:
    """How many questions and images there are, and a fingerprint of them in their order."""

    questions: int
    images: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Header(Record):
    """What every answer of a file depends on. `model` is the model's description of itself."""

    format: int
    name: str
    conditions: Conditions
    data: Data
    model: dict[str, Any]
    device: str
    versions: dict[str, str]

    @property
    def cross_layers(self) -> int | None:
        """How many cross-attention layers can vote, if the model says so."""
        count = self.model.get("cross_layers")
        return count if isinstance(count, int) else None


@dataclasses.dataclass(frozen=True)
class GpuCost:
    """What a whole batch costs on a GPU that its programs were compiled for: bytes that its prefill
    and one greedy step after it move through memory, and FLOPs of the prefill's matrix products.
    """

    name: str
    prefill_bytes: int
    prefill_flops: int
    token_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one question costs, as its share of a batch: bytes of cache (of all beams) and FLOPs of
    the prefill's matrix products.

    Times, in ms, are of a whole batch: its prefill, and one greedy step after it, as medians with
    half the interquartile range. None: not measured.
    """

    cache_bytes: int
    prefill_flops: float
    prefill_ms: float | None = None
    prefill_spread: float | None = None
    token_ms: float | None = None
    token_spread: float | None = None
    gpu: GpuCost | None = None


@dataclasses.dataclass(frozen=True)
class SettingCost(Record):
    """A setting's cost, found before its questions are asked; `pruners` as classes and fields."""

    setting: Setting
    pruners: tuple[dict[str, Any], ...]
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Picture(Record):
    """An image as the model sees it, a PNG in base64, and question `number` about it; `boxes` are
    the parts of the picture that its answer depends on, where the task says so.
    """

    number: int
    question: str
    answers: tuple[str, ...]
    png: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question under one setting.

    `kl` is the KL divergence of the first answer token's distribution from the unpruned model's,
    in nats. `kept` are numbers of visual tokens, of `available` ones (None: all). `cached` is how
    many of them the caches of layers hold that were pruned apart, in the mean over those and their
    heads (None: none were). `map` shows where in the picture the kept tokens look, [rows, columns]
    in 0 … 1, for pictured questions.

    `image` numbers the image, `family` is the kind of question, and `needed` the share of what the
    answer depends on that was kept, where the task says so. If it `is_merged`, what is kept are
    means of tokens, each named by one in their middle; nothing is `needed` then, since means hold a
    part of everything.

    `grid` says how the visual tokens lie in the image: rows and columns of tiles, and of patches in
    each, tile by tile; what else a tile has comes before its patches. None: they have no place.
    """

    id: str
    text: str
    score: float
    kl: float
    image: int
    available: int
    kept: tuple[int, ...] | None
    map: tuple[tuple[float, ...], ...] | None = None
    family: str = ""
    needed: float | None = None
    grid: tuple[int, int, int, int] | None = None
    is_merged: bool = False
    cached: float | None = None

    @property
    def visual_tokens(self) -> float:
        """How many were kept."""
        if self.cached is not None:
            return self.cached
        return self.available if self.kept is None else len(self.kept)


@dataclasses.dataclass(frozen=True)
class Answers(Record):
    """One batch under one setting. `ms` is a question's time, as a share of the batch's: its image,
    prefill and answer; None: not measured.
    """

    setting: Setting
    batch: int
    ms: float | None
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class Result(Record):
    """How a setting did.

    `visual_tokens`: mean number kept. `accuracy`: mean score, `low` and `high` its bootstrap 95 %
    interval. `agreement`: share of the questions with the same answer as unpruned. `kl`: mean over
    the questions. `milliseconds` of a question: the median over batches, `spread` half the
    interquartile range; None: not measured. `measures` are what else the task is reported by.

    `answers` are those of all questions in order.
    """

    setting: Setting
    questions: int
    images: int
    visual_tokens: float
    accuracy: float
    low: float
    high: float
    agreement: float
    kl: float
    milliseconds: float | None
    spread: float | None
    cost: Cost
    pruners: tuple[dict[str, Any], ...]
    seed: int
    versions: dict[str, str]
    measures: dict[str, float] = dataclasses.field(default_factory=dict)
    answers: Annotated[tuple[Answer, ...], Field(exclude=True)] = ()

    def figures(self) -> dict[str, Any]:
        """Everything that is a figure, for JSON: no answers."""
        return to_plain(self)

    def with_answers(self, answers: tuple[Answer, ...], cost: Cost) -> "Result":
        """The same figures, with what they are of, and the cost as it is known by now."""
        return dataclasses.replace(self, answers=answers, cost=cost)

    @property
    def maps(self) -> dict[int, np.ndarray]:
        """Where the kept tokens of pictured questions look, by the question's number."""
        return {
            number: np.asarray(answer.map)
            for number, answer in enumerate(self.answers)
            if answer.map is not None
        }


KINDS: dict[str, type[Record]] = {
    "header": Header,
    "cost": SettingCost,
    "picture": Picture,
    "answers": Answers,
    "result": Result,
}
"""The classes by the word that a line begins with."""
