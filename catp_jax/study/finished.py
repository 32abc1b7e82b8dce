"""Finished studies, read from their files: what a report is of."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from catp_jax.study.journal import Journal, differences
from catp_jax.study.records import Answers, Header, Picture, Result, Setting, SettingCost
from catp_jax.terminal import one_line


@dataclass(frozen=True)
class Study:
    """What one sweep's file holds; `unfinished` says what is not answered yet."""

    header: Header
    results: tuple[Result, ...]
    pictures: tuple[Picture, ...]
    unfinished: tuple[str, ...]


def read_studies(paths: Sequence[Path], messages: list[str] | None = None) -> dict[str, Study]:
    """The studies of several files by their models' names, with the file's where that is not
    enough; that a last line was cut off goes to `messages`.

    Raises ValueError if a file is none, is given twice, or cannot be compared with the others.
    """
    studies = [read_study(path, messages) for path in paths]
    check_comparable(dict(zip(paths, [study.header for study in studies], strict=True)))
    names = [study.header.name for study in studies]
    named: dict[str, Study] = {}
    for name, study, path in zip(names, studies, paths, strict=True):
        name = one_line(name if names.count(name) == 1 else f"{name} ({path.stem})")
        if name in named:
            raise ValueError(f"{path} is given twice, or beside another file of its name")
        named[name] = study
    return named


def check_comparable(headers: dict[Path, Header]) -> None:
    """Raises ValueError, naming two files and where they differ, unless all asked the same
    questions with the same versions, and files of one name are of one model.
    """
    first, *others = headers
    for path in others:
        faults = differences(_bed(headers[first]), _bed(headers[path]))
        if faults:
            raise ValueError(
                f"{first} and {path} do not belong in one report; they differ in "
                f"{'; '.join(faults)} (first → second). Make a report of each"
            )
    by_name: dict[str, Path] = {}
    for path, header in headers.items():
        other = by_name.setdefault(header.name, path)
        faults = differences(headers[other].model, header.model, "model")
        if faults:
            raise ValueError(
                f"{other} and {path} are both of {header.name!r}, but of different models; they "
                f"differ in {'; '.join(faults)} (first → second). Make a report of each, or run "
                "one of them from a folder of another name"
            )


def _bed(header: Header) -> dict[str, Any]:
    """What has to be the same for two models' figures to stand side by side."""
    conditions = header.conditions
    return {
        "task": conditions.task,
        "source": conditions.source,
        "left_out": conditions.left_out,
        "data": asdict(header.data),
        "versions": header.versions,
    }


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
    costs = {one.setting: one.cost for one in journal.all(SettingCost)}
    questions = journal.header.data.questions
    results = [
        result.with_answers(answers[result.setting], costs.get(result.setting, result.cost))
        for result in journal.all(Result)
        if len(answers.get(result.setting, ())) == questions
    ]
    done = {result.setting for result in results}
    unfinished = [
        f"{setting}: {len(answers.get(setting, ()))} of {questions} questions"
        for setting in costs
        if setting not in done
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
