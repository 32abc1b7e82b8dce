"""Measures pruning methods at several budgets on one task, against the unpruned model."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.contract import Site
from catp_jax.generation.inputs import KeptTokens
from catp_jax.models.mllama import MllamaConfig
from catp_jax.pruning import make
from catp_jax.struct import replace
from catp_jax.study.cost import cross_bytes_per_token
from catp_jax.study.tasks import Example, score

UNPRUNED = "unpruned"


@runtime_checkable
class Answerer(Protocol):
    """What a study needs of a loaded model (`catp_jax.api.Model`)."""

    @property
    def dtype(self) -> Any: ...
    @property
    def sites(self) -> frozenset[Site]: ...
    @property
    def config(self) -> MllamaConfig: ...
    def prepare(self, images: Any, prompts: Any) -> Any: ...
    def generate_packed(self, packed: Any, pruners: Any, *, max_new_tokens: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method and how many visual tokens it keeps; `Setting("unpruned", None)` prunes nothing."""

    method: str
    keep: int | None


@dataclasses.dataclass(frozen=True)
class Result:
    """How a setting did.

    `visual_tokens`: mean number kept. `accuracy` and `agreement` (same answer as unpruned): shares
    of the questions. `kl`: mean KL divergence of the first answer token's distribution from the
    unpruned one, in nats. `cross_kv_bytes`: cross-attention cache of one question.
    `milliseconds`: median time of a question in a batch, prefill and answer; `spread` is half the
    range of it over the batches. `answers` and `kept` (None: everything) are one per question.
    """

    setting: Setting
    questions: int
    visual_tokens: float
    accuracy: float
    agreement: float
    kl: float
    cross_kv_bytes: int
    milliseconds: float
    spread: float
    answers: tuple[str, ...]
    kept: tuple[KeptTokens | None, ...]


def sweep(
    model: Answerer,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    *,
    batch: int = 64,
    max_new_tokens: int = 4,
    report: Callable[[str], None] = lambda doing: None,
) -> Iterator[Result]:
    """Yields the unpruned model's result, then one result per setting.

    The last batch is filled up with its own first questions, so that every batch has one shape.
    `report` is told what is being done.
    """
    if not examples:
        raise ValueError("a study wants at least one example")
    batches = []
    for start in range(0, len(examples), batch):
        some = list(examples[start : start + batch])
        filled = (some * batch)[:batch] if start else some  # a lone batch keeps its size
        packed = model.prepare([e.image for e in filled], [e.question for e in filled])
        batches.append((some, packed))
    per_token = cross_bytes_per_token(model.config, model.dtype)

    every = [Setting(UNPRUNED, None), *settings]
    pruned = [
        () if setting.method == UNPRUNED else (make(setting.method, setting.keep, model.sites),)
        for setting in every
    ]
    report("compiling")
    # every program, for every shape that a batch has, before any is timed
    shapes = {str(jax.tree.map(jnp.shape, packed.inputs)): packed for _, packed in batches}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        once = partial(model.generate_packed, max_new_tokens=max_new_tokens)
        list(pool.map(once, *zip(*product(shapes.values(), pruned), strict=True)))

    reference: tuple[tuple[str, ...], np.ndarray] | None = None
    for setting, pruners in zip(every, pruned, strict=True):
        report(f"answering: {setting.method}, keep {setting.keep}")
        texts, logits, kept, counts, times, slots = [], [], [], [], [], 0
        for number, (some, packed) in enumerate(batches):
            # a method that draws does so anew for each batch, not once for the whole study
            drawn = [replace(p, seed=p.seed + number) if hasattr(p, "seed") else p for p in pruners]
            started = time.perf_counter()
            out = model.generate_packed(packed, drawn, max_new_tokens=max_new_tokens)
            times.append(1000 * (time.perf_counter() - started) / len(packed.available))
            texts += out.text[: len(some)]
            logits.append(out.logits[: len(some)])
            own = out.kept or [None] * len(some)
            kept += own[: len(some)]
            counts += [
                available if mine is None else len(mine.number)
                for mine, available in zip(kept[-len(some) :], out.available, strict=False)
            ]
            slots = max(slots, out.slots)
        answers, scores = tuple(texts), np.concatenate(logits)
        reference = reference or (answers, scores)
        right = [score(text, e.answer) for text, e in zip(answers, examples, strict=True)]
        same = [text == other for text, other in zip(answers, reference[0], strict=True)]
        yield Result(
            setting=setting,
            questions=len(examples),
            visual_tokens=float(np.mean(counts)),
            accuracy=float(np.mean(right)),
            agreement=float(np.mean(same)),
            kl=float(np.mean(kl_divergence(reference[1], scores))),
            cross_kv_bytes=slots * per_token,
            milliseconds=statistics.median(times),
            spread=(max(times) - min(times)) / 2,
            answers=answers,
            kept=tuple(kept),
        )


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) of the distributions that logits [n, vocab] stand for, in nats."""
    p, q = (x.astype(np.float64) for x in (reference, other))
    p, q = (x - x.max(axis=-1, keepdims=True) for x in (p, q))
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
