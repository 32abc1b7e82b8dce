"""The report on one or several sweeps, from their files alone."""

import base64
import io
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from catp_jax.generation.options import Options
from catp_jax.study.curves import by_layer, draw_accuracy, draw_layers, unpruned_of
from catp_jax.study.journal import Journal
from catp_jax.study.pictures import Panel, draw_kept
from catp_jax.study.plain import shown
from catp_jax.study.records import (
    Answers,
    Conditions,
    Header,
    Picture,
    Result,
    Setting,
    SettingCost,
)
from catp_jax.study.tables import (
    NOTES,
    markdown_differences,
    markdown_families,
    markdown_table,
    write_csv,
)
from catp_jax.terminal import one_line

PANELS = 7  # at most, in a row of pictures


@dataclass(frozen=True)
class Study:
    """What one sweep's file holds; `unfinished` says what is not answered yet."""

    header: Header
    results: tuple[Result, ...]
    pictures: tuple[Picture, ...]
    unfinished: tuple[str, ...]

    @property
    def is_layered(self) -> bool:
        """Whether votes of at least two layers can be compared."""
        return len({layer for layer, _ in by_layer(self.results, self.header.cross_layers)}) > 1


def read_study(path: Path, messages: list[str] | None = None) -> Study:
    """Reads a sweep's file, see `study_of`; that a last line was cut off goes to `messages`.

    Raises ValueError if the file is none.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give one that `catp-jax study` has written")
    journal = Journal(path, report=([] if messages is None else messages).append)
    return study_of(journal)


def study_of(journal: Journal) -> Study:
    """What a sweep has found. Raises ValueError if no setting is finished."""
    if journal.header is None:
        raise ValueError(
            f"{journal.path or 'the study'} is empty; give one that `catp-jax study` has written"
        )
    batches: dict[Setting, list[Answers]] = defaultdict(list)
    for batch in journal.all(Answers):
        batches[batch.setting].append(batch)
    answers = {
        setting: tuple(
            answer
            for batch in sorted(some, key=lambda batch: batch.batch)
            for answer in batch.answers
        )
        for setting, some in batches.items()
    }
    questions = journal.header.data.questions
    results = [
        result.with_answers(answers[result.setting])
        for result in journal.all(Result)
        if len(answers.get(result.setting, ())) == questions
    ]
    done = {result.setting for result in results}
    unfinished = [
        f"{cost.setting}: {len(answers.get(cost.setting, ()))} of {questions} questions"
        for cost in journal.all(SettingCost)
        if cost.setting not in done
    ]
    if not results:
        raise ValueError(
            f"{journal.path or 'the study'} has no finished setting yet "
            f"({'; '.join(unfinished) or 'nothing answered'}); run the same `catp-jax study` "
            "again, which resumes"
        )
    return Study(
        header=journal.header,
        results=tuple(results),
        pictures=tuple(journal.all(Picture)),
        unfinished=tuple(unfinished),
    )


def make_folder(out: Path) -> None:
    """Makes a folder for figures, if there is none. Raises ValueError if nothing can be written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder for the figures")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}") from None


def write_report(paths: Sequence[Path], out: Path) -> tuple[list[Path], list[str]]:
    """Table, CSV, curves and pictures of one or several sweeps; the files written, and messages.

    Raises ValueError if a file cannot be used or `out` is no folder.
    """
    messages: list[str] = []
    studies = _named([read_study(path, messages) for path in paths], paths)
    make_folder(out)
    for name, study in studies.items():
        messages += [f"{name}: not finished: {line}" for line in study.unfinished]
    return draw_report(studies, out), messages


def draw_report(studies: dict[str, Study], out: Path) -> list[Path]:
    """Writes the report's files into a folder."""
    written = [out / "results.csv", out / "accuracy.png"]
    write_csv({name: study.results for name, study in studies.items()}, written[0])
    draw_accuracy({name: _curves(study) for name, study in studies.items()}, written[1])
    layered = {name: study for name, study in studies.items() if study.is_layered}
    if layered:
        written.append(out / "layers.png")
        draw_layers(
            {name: study.results for name, study in layered.items()},
            written[-1],
            {name: study.header.cross_layers for name, study in layered.items()},
        )
    pictures = {}
    for number, (name, study) in enumerate(studies.items(), start=1):
        if rows := panels(study):
            pictures[name] = out / (f"kept-{number}.png" if len(studies) > 1 else "kept.png")
            draw_kept(rows, pictures[name])
    written += pictures.values()
    text = markdown(studies, pictures)
    written.insert(0, out / "report.md")
    written[0].write_text(text, encoding="utf-8")
    return written


def _curves(study: Study) -> list[Result]:
    """What goes into the curves: not the layers by number, if they have a figure of their own."""
    numbered = re.compile(r"catp:layers=\d+")
    left = [r for r in study.results if not numbered.fullmatch(r.setting.method)]
    return left if study.is_layered else list(study.results)


def _named(studies: Sequence[Study], paths: Sequence[Path]) -> dict[str, Study]:
    """The studies by their models' names, with the file's where that is not enough."""
    names = [study.header.name for study in studies]
    named: dict[str, Study] = {}
    for name, study, path in zip(names, studies, paths, strict=True):
        name = one_line(name if names.count(name) == 1 else f"{name} ({path.stem})")
        if name in named:
            raise ValueError(f"{path} is given twice, or beside another file of its name")
        named[name] = study
    return named


def panels(study: Study) -> list[list[Panel]]:
    """A row for each pictured question: the whole image, then what one method kept of it.

    The method is CATP where it was run, else the first that was.
    """
    methods = list(dict.fromkeys(result.setting.method for result in study.results if result.maps))
    if not methods:
        return []
    shown = "catp" if "catp" in methods else methods[0]
    unpruned = unpruned_of(study.results)
    rows = []
    for picture in study.pictures:
        number, image = picture.number, _image(picture)
        caption = picture.question
        if unpruned is not None:
            caption += f"\nall: {unpruned.answers[number].text}"
        row = [Panel(image, None, caption)]
        pruned = [r for r in study.results if r.setting.method == shown and number in r.maps]
        for result in sorted(pruned, key=lambda result: -result.visual_tokens)[: PANELS - 1]:
            caption = f"{shown}, keep {result.setting.keep}:\n{result.answers[number].text}"
            row.append(Panel(image, result.maps[number], caption))
        rows.append(row)
    return rows


def _image(picture: Picture) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(picture.png))) as image:
        return np.asarray(image.convert("RGB")) / 255


def markdown(studies: dict[str, Study], pictures: dict[str, Path]) -> str:
    """The report's text."""
    lines = ["# What pruning costs, and what it saves", ""]
    for name, study in studies.items():
        lines += [f"## {name}", "", _described(study.header), ""]
        lines += [*markdown_table(study.results), ""]
        for title, some in (
            ("By family of questions", markdown_families(study.results)),
            ("Against unpruned and random, paired", markdown_differences(study.results)),
        ):
            lines += [f"### {title}", "", *some, ""] if some else []
        if study.unfinished:
            lines += ["Not finished: " + "; ".join(study.unfinished) + ".", ""]
        if name in pictures:
            lines += [f"![What was kept of some images]({pictures[name].name})", ""]
    lines += ["## Accuracy over visual tokens kept", "", "![Accuracy](accuracy.png)", ""]
    lines += _layers(studies)
    return "\n".join([*lines, "## What the columns mean", "", NOTES])


def _layers(studies: dict[str, Study]) -> list[str]:
    """What compares the layers, or which methods would; nothing without CATP."""
    catp = [
        study
        for study in studies.values()
        if any(re.match(r"catp\b", result.setting.method) for result in study.results)
    ]
    if any(study.is_layered for study in catp):
        text = [
            "CATP with the votes of one cross-attention layer (those asked for by number are left "
            "out of the curves above).",
            "",
            "![Accuracy by layer](layers.png)",
        ]
    elif catp:
        count = catp[0].header.cross_layers
        last = "catp:layers=last" if count else "catp:layers=2"
        text = [
            f"Not drawn: it requires CATP with the votes of at least two layers, such as "
            f"`--prune catp:layers=first --prune {last}`"
            f"{f', by number from 1 to {count}' if count else ''}."
        ]
    else:
        return []
    return ["## By the layer that votes", "", *text, ""]


def _described(header: Header) -> str:
    """How and where the questions were asked, in a few sentences."""
    data, conditions = header.data, header.conditions
    source = ", ".join(f"{key} {value}" for key, value in conditions.source.items())
    left_out = "".join(f" Left out, {why}: {n}." for why, n in conditions.left_out.items())
    packages = ", ".join(f"{key} {value}" for key, value in header.versions.items())
    options = conditions.options
    return (
        f"{data.questions} questions about {data.images} images of {conditions.task}"
        f"{f' ({source})' if source else ''}, asked as `{conditions.prompt}`"
        f"{' through the chat template' if conditions.is_chat else ''}.{left_out} "
        f"{_search(options)}, {options.min_new_tokens} to {options.max_new_tokens} new tokens"
        f"{_others(conditions)}, batches of {conditions.batch}, seed {conditions.seed}. "
        f"On {header.device}; {packages}."
    )


def _search(options: Options) -> str:
    if options.num_beams > 1:
        return (
            f"{options.num_beams} beams, length penalty {options.length_penalty:g}, early stopping "
            f"{options.early_stopping}"
        )
    return f"Drawn at temperature {options.temperature:g}" if options.temperature else "Greedy"


def _others(conditions: Conditions) -> str:
    """Whatever else differs from the defaults."""
    described = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty")
    described += ("early_stopping", "temperature", "seed")
    plain = vars(Options())
    others = {
        name: value
        for name, value in vars(conditions.options).items()
        if name not in described and value != plain[name]
    }
    others |= {"begun": conditions.begun} if conditions.begun else {}
    others |= conditions.loading
    return "".join(f", {name} {shown(value)}" for name, value in others.items())
