"""Measures pruning methods at several budgets on one task, against the unpruned model.

Batches are the outer loop: each is read once, answered unpruned and then under every setting, so
that neither the images nor the logits of a large task have to stay in memory. Of very many settings
`AT_ONCE` at a time, since compiled programs have to stay, too. With a journal on disk a sweep can
be stopped at any time and resumes after its last line; more methods and budgets can be added to it
later.
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from catp_jax.contract import Keep
from catp_jax.study.batches import Answerer, Batches, EncodedBatch, Pruners
from catp_jax.study.cost import measure, on_gpu, sizes
from catp_jax.study.journal import Journal
from catp_jax.study.pictures import as_png
from catp_jax.study.records import (
    FORMAT,
    UNPRUNED,
    Answer,
    Answers,
    Conditions,
    Data,
    Header,
    Picture,
    Result,
    Setting,
    SettingCost,
)
from catp_jax.study.results import kl_divergence, result_of
from catp_jax.study.tasks import Example, Measures, Score, digest, exact_match

AT_ONCE = 32
"""Settings whose programs are in memory together, and which take turns if they are timed. Those of
one, of a mini BLIP-2, take 500 to 650 of the 65,530 mappings that Linux lets a process have
(`vm.max_map_count`).
"""


def versions() -> dict[str, str]:
    """The packages that the figures may depend on."""
    numbers = {"python": platform.python_version()}
    for package in ("catp-jax", "jax", "flax", "numpy", "transformers", "pillow"):
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers


def known_parts(conditions: Conditions, examples: Sequence[Example]) -> dict[str, Any]:
    """What a header says that is known without a model, for `Journal.check`."""
    images = {example.image_id for example in examples}
    return {
        "conditions": conditions,
        "data": Data(len(examples), len(images), digest(examples)),
        "versions": versions(),
    }


def sweep(
    model: Answerer,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    conditions: Conditions | None = None,
    *,
    score: Score = exact_match,
    measures: Measures | None = None,
    journal: Journal | None = None,
    name: str = "model",
    pictured: Sequence[int] = (),
    is_timed: bool = False,
    gpu: str | None = None,
    report: Callable[[str], None] = lambda doing: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Result]:
    """Yields the unpruned model's result, then one per setting, once all are answered.

    The last batch is filled up with its own first questions, so that every batch has one shape.
    `journal` keeps every step (default: in memory); `name` is the model's in it. `pictured` are
    numbers of examples to draw. `is_timed` asks for times, which takes a
    prefill and a step of each setting on top, and `gpu`, one of `targets.GPUS`, for what they would
    cost there, which takes its compiler. `report` hears what is being done, `progress` how many
    answers there are and will be.

    Raises ValueError if the compiler is not there, a budget is larger than what there is to keep, a
    question cannot be asked (with its id and image), or the journal is of other conditions. What
    the first batch shows is raised before anything is written; of more settings than `AT_ONCE`,
    what making their methods shows.
    """
    if not examples:
        raise ValueError("a study requires at least one question")
    conditions, journal = conditions or Conditions(), journal or Journal()
    settings = list(dict.fromkeys([Setting(UNPRUNED, None), *settings]))
    header = Header(
        format=FORMAT,
        name=name,
        **known_parts(conditions, examples),
        model=model.describe(),
        device=jax.devices()[0].device_kind,
    )
    batches = Batches(model, examples, conditions, is_timed, report)
    groups = [settings[start : start + AT_ONCE] for start in range(0, len(settings), AT_ONCE)]
    wanted = {*settings}
    there = (len(one.answers) for one in journal.all(Answers) if one.setting in wanted)
    done, total = sum(there), len(settings) * len(examples)
    try:
        journal.check(**{key: value for key, value in vars(header).items() if key != "name"})
        journal.claim()
        if len(groups) > 1:  # what is wrong with the last is said before the first is answered
            _pruned(batches, _to_measure(journal, batches, settings, gpu))
        progress(done, total)
        for some in groups:
            _begin(journal, header, batches, some, gpu)
            asked = list(dict.fromkeys([settings[0], *some]))
            for new in _answer(journal, batches, asked, score, frozenset(pictured)):
                done += new
                progress(done, total)
            if len(groups) > 1:
                batches.forget_programs()
        measure = partial(measures, examples) if measures else lambda scores: {}
        yield from _results(journal, settings, conditions.seed, measure)
    finally:
        journal.release()


def _to_measure(
    journal: Journal, batches: Batches, settings: list[Setting], gpu: str | None
) -> list[Setting]:
    """The settings of which the journal does not say all that is asked about their costs."""
    known = [
        one.setting
        for one in journal.all(SettingCost)
        if (not batches.is_timed or one.cost.prefill_ms is not None)
        and (gpu is None or (one.cost.gpu is not None and one.cost.gpu.name == gpu))
    ]
    return [setting for setting in settings if setting not in known]


def _pruned(
    batches: Batches, settings: list[Setting]
) -> tuple[dict[Setting, EncodedBatch], dict[Setting, Pruners]]:
    """The first batch as each of the settings has it, and their methods for it."""
    first = batches.encode_each(0, settings)
    return first, {setting: batches.pruners(setting, first[setting]) for setting in settings}


def _begin(
    journal: Journal, header: Header, batches: Batches, settings: list[Setting], gpu: str | None
) -> None:
    """Writes the header, once it is known to fit, and what each setting costs on the first
    batch.
    """
    new = _to_measure(journal, batches, settings, gpu)
    if not new:
        return
    before = {one.setting: one.cost for one in journal.all(SettingCost)}
    batches.report("reading images")
    first, pruned = _pruned(batches, new)
    batches.compile(pruned, first)
    options = batches.conditions.options
    shapes = {
        "batch": len(first[new[0]].packed.available),
        "new_slots": options.max_new_tokens,
        "num_beams": options.num_beams,
    }
    network = batches.model.network
    given = [(pruners, first[setting].packed.inputs) for setting, pruners in pruned.items()]
    if batches.is_timed:
        batches.report("compiling, timing")
        costs = measure(network, given, **shapes)
    else:
        costs = [
            before.get(setting) or sizes(network, *some, **shapes)
            for setting, some in zip(new, given, strict=True)
        ]
    there = [before[setting].gpu if setting in before else None for setting in new]
    if gpu is not None:
        batches.report(f"compiling for {gpu}")
        there = on_gpu(gpu, network, given, options.max_new_tokens)
    journal.begin(header)  # now that every setting has run once
    for setting, cost, on in zip(new, costs, there, strict=True):
        cost = dataclasses.replace(cost, gpu=on)
        journal.append(SettingCost(setting, batches.as_data(setting, first[setting]), cost))


def _answer(
    journal: Journal,
    batches: Batches,
    settings: list[Setting],
    score: Score,
    pictured: frozenset[int],
) -> Iterator[int]:
    """Has every batch answered under every setting, the unpruned one first; yields how many answers
    each adds to the journal.
    """
    there = {(one.setting, one.batch) for one in journal.all(Answers)}
    for number in range(len(batches)):
        missing = [setting for setting in settings if (setting, number) not in there]
        if not missing:
            continue
        needed = list(dict.fromkeys([settings[0], *missing]))  # KL needs the unpruned logits
        encoded = batches.encode_each(number, needed)
        pruned = {setting: batches.pruners(setting, encoded[setting]) for setting in needed}
        batches.compile(pruned, encoded)
        # before the answers, which end the batch
        _draw(journal, batches, encoded[settings[0]], pictured)
        reference = np.empty(0)
        for setting in needed:
            batch = encoded[setting]
            batches.report(f"answering: {setting}")
            out, ms = batches.ask(pruned[setting], batch)
            if setting == settings[0]:
                reference = out.logits[: len(batch.examples)]
            if (setting, number) in there:
                continue
            answers = tuple(_answers(batches, batch, out, reference, score, pictured))
            ms = (batch.ms + ms) / len(batch.packed.available) if batches.is_timed else None
            journal.append(Answers(setting, number, ms, answers))
            yield len(answers)


def _answers(
    batches: Batches,
    batch: EncodedBatch,
    out: Any,
    reference: np.ndarray,
    score: Score,
    pictured: frozenset[int],
) -> Iterator[Answer]:
    """The answers to a batch's questions, without those that filled it up."""
    count = len(batch.examples)
    kl = kl_divergence(reference, out.logits[:count])
    first = batch.number * batches.conditions.batch
    network, reader = batches.model.network, batches.model.reader
    for row, (example, text) in enumerate(zip(batch.examples, out.text, strict=False)):
        kept = None if out.kept is None else out.kept[row]
        is_drawn = kept is not None and not out.cached and first + row in pictured
        grid = _rounded(reader.kept_map(network, batch.packed, row, kept)) if is_drawn else None
        yield Answer(
            id=example.id,
            text=text,
            score=score(text, example),
            kl=float(kl[row]),
            available=batch.packed.available[row],
            kept=None if kept is None else tuple(np.asarray(kept.number).tolist()),
            map=grid,
            image=example.image_id,
            family=example.family,
            needed=None if out.is_merged else _share(batch.needed, row, kept, out.cached),
            grid=reader.grid(batch.packed, row),
            is_merged=out.is_merged,
            cached=_mean_number(out.cached, row),
        )


def _share(needed: np.ndarray | None, row: int, kept: Any, cached: dict[int, Keep]) -> float | None:
    """The share of what is needed that was kept, in the mean over layers that were pruned apart."""
    total = 0.0 if needed is None else float(needed[row].sum())
    if needed is None or not total:
        return None
    if cached:
        shares = [needed[row][numbers].sum() / total for numbers in _by_head(cached, row)]
        return round(float(np.mean(shares)), 4)
    left = total if kept is None else float(needed[row][np.asarray(kept.number)].sum())
    return round(left / total, 4)


def _mean_number(cached: dict[int, Keep], row: int) -> float | None:
    """How many visual tokens are left, in the mean over layers that were pruned apart."""
    if not cached:
        return None
    return round(float(np.mean([len(numbers) for numbers in _by_head(cached, row)])), 4)


def _by_head(cached: dict[int, Keep], row: int) -> Iterator[np.ndarray]:
    """The numbers of the visual tokens that a prompt has left, in each layer and each of its heads
    if they differ.
    """
    for keep in cached.values():
        indices, valid = np.asarray(keep.indices[row]), np.asarray(keep.valid[row])
        size = indices.shape[-1]
        for own, is_there in zip(indices.reshape(-1, size), valid.reshape(-1, size), strict=True):
            yield own[is_there]


def _rounded(grid: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """A map with as many digits as can be seen."""
    return tuple(map(tuple, np.round(np.asarray(grid, float), 3).tolist()))


def _draw(
    journal: Journal, batches: Batches, batch: EncodedBatch, pictured: frozenset[int]
) -> None:
    """Writes the pictures of the pictured questions of a batch that are not there yet."""
    there = {picture.number for picture in journal.all(Picture)}
    first = batch.number * batches.conditions.batch
    for number, example in enumerate(batch.examples, start=first):
        if number in pictured and number not in there:
            answers = tuple(dict.fromkeys(example.accepted))
            png = as_png(batches.model.reader.picture(example.image))
            boxes = tuple(batches.model.reader.framed(example.image, example.needed))
            journal.append(Picture(number, example.question, answers, png, boxes))


def _results(
    journal: Journal,
    settings: list[Setting],
    seed: int,
    measure: Callable[[Sequence[float]], dict[str, float]],
) -> Iterator[Result]:
    """The figures of each setting, from its answers."""
    written = {result.setting: result for result in journal.all(Result)}
    costs = {cost.setting: cost for cost in journal.all(SettingCost)}
    answered: dict[Setting, list[Answers]] = {setting: [] for setting in settings}
    for one in sorted(journal.all(Answers), key=lambda one: one.batch):
        if one.setting in answered:
            answered[one.setting].append(one)
    unpruned = _joined(answered[settings[0]])
    for setting, batches in answered.items():
        answers = _joined(batches)
        if setting not in written:
            times = [batch.ms for batch in batches if batch.ms is not None]
            measures = measure([answer.score for answer in answers])
            result = result_of(costs[setting], answers, unpruned, times, seed, versions(), measures)
            written[setting] = journal.append(result)
        yield written[setting].with_answers(answers, costs[setting].cost)


def _joined(batches: Sequence[Answers]) -> tuple[Answer, ...]:
    return tuple(answer for batch in batches for answer in batch.answers)
