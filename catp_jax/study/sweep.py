"""Measures pruning methods at several budgets on one task, against the unpruned model.

Batches are the outer loop: each is read once, answered unpruned and then under every setting, so
that neither the images nor the logits of a large task have to stay in memory. With a journal on
disk a sweep can be stopped at any time and goes on from its last line; more methods and budgets can
be added to it later.
"""

import dataclasses
import enum
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.contract import Site
from catp_jax.generation.beam import EarlyStopping
from catp_jax.pruning import named
from catp_jax.struct import replace
from catp_jax.study.cost import Cost, in_parallel, measure, sizes
from catp_jax.study.journal import Journal, Row
from catp_jax.study.pictures import as_png
from catp_jax.study.results import (
    UNPRUNED,
    Result,
    Setting,
    interval,
    kl_divergence,
    median_and_spread,
)
from catp_jax.study.tasks import QUESTION, Example, Score, digest, exact_match, fill

FORMAT = 1  # of the journal's rows


@runtime_checkable
class Answerer(Protocol):
    """What a study needs of a loaded model (`catp_jax.api`).

    `describe` is a fingerprint, as JSON has it. `prepare` gives `inputs`, `available`, the visual
    tokens of each prompt, and `most`, what a prompt of the model may have; `encode` does once what
    all settings have in common. `generate_packed` gives
    `text`, `logits` of the first new token, and `kept`, None or one entry a prompt, whose `number`
    counts visual tokens before pruning.
    `picture` is an image as the model sees it, [height, width, 3] in 0 … 1, and `kept_map` where in
    it a prompt's kept tokens look, [rows, columns] in 0 … 1.
    """

    @property
    def dtype(self) -> Any: ...
    @property
    def sites(self) -> frozenset[Site]: ...
    @property
    def network(self) -> Any: ...
    def describe(self) -> dict[str, Any]: ...
    def prepare(self, images: Any, prompts: Any) -> Any: ...
    def encode(self, packed: Any) -> Any: ...
    def generate_packed(
        self,
        packed: Any,
        pruners: Any,
        *,
        max_new_tokens: int,
        num_beams: int,
        length_penalty: float,
        min_new_tokens: int,
        early_stopping: EarlyStopping,
    ) -> Any: ...
    def picture(self, source: Any) -> np.ndarray: ...
    def kept_map(self, packed: Any, row: int, kept: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How every question is asked: what must not change within one file.

    `seed` draws the bootstrap and, with a question's number, what random methods keep of it.
    """

    task: str = "questions"
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str = QUESTION
    batch: int = 64
    max_new_tokens: int = 4
    num_beams: int = 1
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    early_stopping: EarlyStopping = "heuristic"
    seed: int = 0

    @property
    def generation(self) -> dict[str, Any]:
        """The options of `generate_packed`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "length_penalty": self.length_penalty,
            "min_new_tokens": self.min_new_tokens,
            "early_stopping": self.early_stopping,
        }

    def header(self, examples: Sequence[Example]) -> Row:
        """What a journal says of itself, as far as it is known without a model."""
        return {
            "format": FORMAT,
            "task": self.task,
            "data": {
                **self.source,
                "questions": len(examples),
                "images": len({example.image_id for example in examples}),
                "digest": digest(examples),
            },
            "prompt": self.prompt,
            "batch": self.batch,
            "generation": self.generation,
            "seed": self.seed,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """The packages that the figures may depend on."""
    found = {"python": platform.python_version()}
    for package in ("catp-jax", "jax", "flax", "numpy", "transformers", "pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def sweep(
    model: Answerer,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    conditions: Conditions | None = None,
    *,
    score: Score = exact_match,
    journal: Journal | None = None,
    name: str = "model",
    pictured: Sequence[int] = (),
    is_timed: bool = False,
    report: Callable[[str], None] = lambda doing: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Result]:
    """Yields the unpruned model's result, then one per setting, once all are answered.

    The last batch is filled up with its own first questions, so that every batch has one shape.
    `journal` keeps every step (default: in memory); `name` is the model's in it. `pictured` are
    numbers of examples that pictures are wanted of. `is_timed` asks for times, which takes a
    prefill and a step of each setting on top. `report` is told what is being done, `progress` how
    many answers there are and will be.

    Raises ValueError if a budget is larger than what there is to keep, a question cannot be asked
    (with its id and image), or the journal is of other conditions. What the first batch shows is
    raised before anything is written.
    """
    if not examples:
        raise ValueError("a study wants at least one example")
    conditions = conditions or Conditions()
    journal = journal or Journal()
    every = list(dict.fromkeys([Setting(UNPRUNED, None), *settings]))
    header = {
        "name": name,
        **conditions.header(examples),
        "model": model.describe(),
        "device": jax.devices()[0].device_kind,
    }
    run = _Sweep(model, examples, conditions, every, journal, report, is_timed)
    try:
        run.begin(header)
        yield from run.results(run.answer(score, frozenset(pictured), progress))
    finally:
        journal.release()


class _Sweep:
    """One sweep's arguments, which all its steps share."""

    def __init__(
        self,
        model: Answerer,
        examples: Sequence[Example],
        conditions: Conditions,
        every: list[Setting],
        journal: Journal,
        report: Callable[[str], None],
        is_timed: bool,
    ) -> None:
        self.model, self.examples, self.conditions = model, examples, conditions
        self.every, self.journal, self.report = every, journal, report
        self.is_timed = is_timed
        starts = range(0, len(examples), conditions.batch)
        self.batches = [examples[start : start + conditions.batch] for start in starts]
        self.compiled: set[tuple[Setting, str]] = set()
        self.encoded: set[str] = set()

    def begin(self, header: Row) -> None:
        """The header, once it is known to fit, and what each setting costs on the first batch."""
        self.journal.check({key: header[key] for key in header if key != "name"})
        self.journal.claim()
        known = [
            Setting(**row["setting"])
            for row in self.journal.find("cost")
            if not self.is_timed or row["prefill_ms"] is not None
        ]
        new = [setting for setting in self.every if setting not in known]
        self.report("reading images")
        packed = self.encode(self.prepare(0))[0] if new else None
        pruned = [self.pruners(setting, packed, 0) for setting in new]
        if packed is None:
            return
        self.compile(0, packed, dict(zip(new, pruned, strict=True)))
        shapes = {
            "inputs": packed.inputs,
            "batch": len(packed.available),
            "new_slots": self.conditions.max_new_tokens,
            "num_beams": self.conditions.num_beams,
        }
        if self.is_timed:
            self.report("compiling, timing")
            costs = measure(self.model.network, pruned, **shapes)
        else:
            costs = [sizes(self.model.network, some, **shapes) for some in pruned]
        self.journal.begin(header)  # now that every setting has run once
        for setting, cost in zip(new, costs, strict=True):
            self.journal.append(
                {
                    "row": "cost",
                    "setting": dataclasses.asdict(setting),
                    "pruner": self.as_data(setting, packed),
                    **dataclasses.asdict(cost),
                }
            )

    def answer(
        self, score: Score, pictured: frozenset[int], progress: Callable[[int, int], None]
    ) -> dict[tuple[Setting, int], Row]:
        """Has every batch answered under every setting; the rows, by setting and batch."""
        rows = {
            (Setting(**row["setting"]), row["batch"]): row for row in self.journal.find("answers")
        }
        done = sum(len(row["text"]) for (setting, _), row in rows.items() if setting in self.every)
        total = len(self.every) * len(self.examples)
        progress(done, total)
        for number, some in enumerate(self.batches):
            missing = [setting for setting in self.every if (setting, number) not in rows]
            if not missing:
                continue
            packed, before = self.encode(self.prepare(number))
            asked = list(dict.fromkeys([self.every[0], *missing]))  # KL wants the unpruned logits
            pruned = {setting: self.pruners(setting, packed, number) for setting in asked}
            self.compile(number, packed, pruned)
            self.pictures(number, pictured)  # before the answers, which say that a batch is done
            reference = np.empty(0)
            for setting in asked:
                self.report(f"answering: {setting}")
                out, passed = self.clocked(partial(self.ask, pruned[setting], packed, number))
                logits = out.logits[: len(some)]
                if setting == self.every[0]:
                    reference = logits
                if (setting, number) in rows:
                    continue
                kept = None if out.kept is None else out.kept[: len(some)]
                first = number * self.conditions.batch
                rows[setting, number] = self.journal.append(
                    {
                        "row": "answers",
                        "setting": dataclasses.asdict(setting),
                        "batch": number,
                        "ms": (before + passed) / len(packed.available) if self.is_timed else None,
                        "ids": [example.id for example in some],
                        "text": list(out.text[: len(some)]),
                        "score": [
                            score(text, example)
                            for text, example in zip(out.text, some, strict=False)
                        ],
                        "kl": kl_divergence(reference, logits).tolist(),
                        "available": list(packed.available[: len(some)]),
                        "kept": None
                        if kept is None
                        else [np.asarray(own.number).tolist() for own in kept],
                        "maps": {
                            first + index: self.kept_map(packed, index, own)
                            for index, own in enumerate(kept or [])
                            if first + index in pictured
                        },
                    }
                )
                done += len(some)
                progress(done, total)
        return rows

    def results(self, rows: dict[tuple[Setting, int], Row]) -> Iterator[Result]:
        """The figures of each setting, from its rows."""
        written = {Setting(**row["setting"]): row for row in self.journal.find("result")}
        images = [example.image_id for example in self.examples]
        unpruned = self.gather(rows, self.every[0])
        for setting in self.every:
            mine = [rows[setting, number] for number in range(len(self.batches))]
            own = self.gather(rows, setting)
            counts = [
                available if kept is None else len(kept)
                for available, kept in zip(own["available"], own["kept"], strict=True)
            ]
            if setting not in written:
                low, high = interval(own["score"], images, seed=self.conditions.seed)
                cost = self.journal.find("cost", setting=dataclasses.asdict(setting))[-1]
                same = [a == b for a, b in zip(own["text"], unpruned["text"], strict=True)]
                times = [row["ms"] for row in mine if row["ms"] is not None]
                milliseconds, spread = median_and_spread(times) if times else (None, None)
                result = Result(
                    setting=setting,
                    questions=len(self.examples),
                    images=len(set(images)),
                    visual_tokens=float(np.mean(counts)),
                    accuracy=float(np.mean(own["score"])),
                    low=low,
                    high=high,
                    agreement=float(np.mean(same)),
                    kl=float(np.mean(own["kl"])),
                    milliseconds=milliseconds,
                    spread=spread,
                    seed=self.conditions.seed,
                    versions=versions(),
                    pruner=cost["pruner"],
                    **{field.name: cost[field.name] for field in dataclasses.fields(Cost)},
                )
                written[setting] = self.journal.append({"row": "result", **result.figures()})
            yield Result.of(
                written[setting],
                answers=tuple(own["text"]),
                kept=tuple(None if kept is None else tuple(kept) for kept in own["kept"]),
                maps={
                    int(index): np.asarray(grid)
                    for row in mine
                    for index, grid in row["maps"].items()
                },
            )

    def gather(
        self, rows: dict[tuple[Setting, int], Row], setting: Setting
    ) -> dict[str, list[Any]]:
        """A setting's answers over all batches, a list for each column."""
        out: dict[str, list[Any]] = {key: [] for key in ("text", "score", "kl", "available")}
        out["kept"] = []
        for number in range(len(self.batches)):
            row = rows[setting, number]
            for key in out:
                out[key] += row[key] or [None] * len(row["text"])
        return out

    def prepare(self, number: int) -> Any:
        """A batch, filled up to the common size; a lone one keeps its own.

        Raises ValueError, with the id and the image, for a question that cannot be used.
        """
        some = list(self.batches[number])
        filled = (some * self.conditions.batch)[: self.conditions.batch] if number else some
        images = [example.image for example in filled]
        prompts = [fill(self.conditions.prompt, example.question) for example in filled]
        try:
            return self.model.prepare(images, prompts)
        except ValueError:
            for example, prompt in zip(some, prompts, strict=False):
                try:
                    self.model.prepare([example.image], [prompt])
                except ValueError as error:
                    raise ValueError(
                        f"question {example.id!r} about {str(example.image)!r}: {error}"
                    ) from None
            raise

    def encode(self, packed: Any) -> tuple[Any, float]:
        """A batch with its images encoded, and the milliseconds that it took."""
        shapes = str(jax.tree.map(jnp.shape, packed.inputs))
        if self.is_timed and shapes not in self.encoded:
            jax.block_until_ready(self.model.encode(packed).encoded)  # compiles
            self.encoded.add(shapes)
        return self.clocked(lambda: self.model.encode(packed))

    def clocked(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a call gives, and the milliseconds that it took."""
        started = time.perf_counter()
        out = call()
        if self.is_timed:
            jax.block_until_ready(getattr(out, "encoded", None))
        return out, 1000 * (time.perf_counter() - started)

    def ask(self, pruners: tuple[Any, ...], packed: Any, number: int) -> Any:
        """A batch's answers. Raises ValueError, with the questions' ids, if it does not fit."""
        try:
            return self.model.generate_packed(packed, pruners, **self.conditions.generation)
        except ValueError as error:
            first, last = self.batches[number][0].id, self.batches[number][-1].id
            raise ValueError(f"questions {first!r} to {last!r}: {error}") from None

    def pruners(self, setting: Setting, packed: Any, batch: int | None) -> tuple[Any, ...]:
        """The setting's pruner for a batch; one that draws does so anew for each question.

        A count is the same for every prompt, a percentage leaves each prompt its own.
        """
        if setting.method == UNPRUNED:
            return ()
        methods, most = ((setting.method, setting.keep or ""),), max(packed.available)
        try:
            made = named.pruners(methods, packed.available, most, self.model.sites, packed.most)
        except ValueError as error:
            raise ValueError(f"{setting.method}: {error}") from None
        if not made:  # no prompt has an image
            return ()
        (pruner,) = made
        if hasattr(pruner, "seed") and batch is not None:
            first = pruner.seed + self.conditions.seed + batch * self.conditions.batch
            rows = np.arange(len(packed.available), dtype=np.uint32)
            pruner = replace(pruner, seed=jnp.asarray(np.uint32(first) + rows))
        return (pruner,)

    def as_data(self, setting: Setting, packed: Any) -> dict[str, Any] | None:
        """The setting's pruner as class and fields."""
        for pruner in self.pruners(setting, packed, None):
            values = {
                field.name: getattr(pruner, field.name) for field in dataclasses.fields(pruner)
            }
            fields = {key: _as_json(value) for key, value in values.items() if key != "limit"}
            return {"class": type(pruner).__name__, **fields, "keep": setting.keep}
        return None

    def compile(self, number: int, packed: Any, pruned: dict[Setting, Any]) -> None:
        """Runs what has not run for this batch's shapes, so that no compiling is timed."""
        keys = {
            setting: (setting, str(jax.tree.map(jnp.shape, (packed.inputs, pruners))))
            for setting, pruners in pruned.items()
        }
        new = [setting for setting in pruned if keys[setting] not in self.compiled]
        if new:
            self.report(f"compiling {len(new)} programs")
            ask = partial(self.ask, packed=packed, number=number)
            in_parallel(ask, [pruned[setting] for setting in new], self.model.network)
            self.compiled |= {keys[setting] for setting in new}

    def kept_map(self, packed: Any, index: int, kept: Any) -> list[list[float]]:
        """Where a prompt's kept tokens look, with as many digits as can be seen."""
        return np.round(np.asarray(self.model.kept_map(packed, index, kept), float), 3).tolist()

    def pictures(self, number: int, pictured: frozenset[int]) -> None:
        """Writes the pictures of a batch's questions that are wanted and not there yet."""
        there = {row["number"] for row in self.journal.find("picture")}
        first = number * self.conditions.batch
        for index, example in enumerate(self.batches[number], start=first):
            if index in pictured and index not in there:
                self.journal.append(
                    {
                        "row": "picture",
                        "number": index,
                        "question": example.question,
                        "answers": list(dict.fromkeys(example.accepted)),
                        "png": as_png(self.model.picture(example.image)),
                    }
                )


def _as_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    return np.asarray(value).tolist() if hasattr(value, "shape") else value
