"""Tables of a study's results, and the report on one or several sweeps, all from their files."""

import base64
import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from catp_jax.study.curves import by_layer, draw_accuracy, draw_layers, unpruned_of
from catp_jax.study.journal import Journal, Row
from catp_jax.study.pictures import Panel, draw_kept
from catp_jax.study.results import Result, Setting

WIDE = 130  # letters that the whole table wants
PANELS = 7  # at most, in a row of pictures

NOTES = """\
- accuracy: mean score; in brackets its bootstrap 95 % interval, over images, each with all its
  questions
- agreement: share of the questions answered as the unpruned model answers them
- KL: of the first answer token's distribution from the unpruned model's, mean over the questions
- cache: all that decoding keeps of one question, a share of its batch; with beam search the
  beams share what the prompt left, and each keeps its own new tokens
- prefill FLOPs: of one question, as the compiler counts them in the compiled prefill of a batch;
  other programs count loops and kernels differently
- times, where they were asked for: medians ± half the interquartile range; prefill and token (a
  greedy step, whatever the beams) of a whole batch, question with its image and everything around
  it, as a share of its batch
"""


@dataclass(frozen=True)
class Study:
    """What one sweep's file holds.

    `pictures` have each a question's picture and text; `unfinished` says what is not answered yet.
    """

    name: str
    header: Row
    results: tuple[Result, ...]
    pictures: tuple[Row, ...]
    unfinished: tuple[str, ...]

    @property
    def cross_layers(self) -> int | None:
        """How many cross-attention layers can vote, if the model says so."""
        return self.header.get("model", {}).get("cross_layers")

    @property
    def is_layered(self) -> bool:
        """Whether votes of at least two layers can be compared."""
        return len({layer for layer, _ in by_layer(self.results, self.cross_layers)}) > 1


def read_study(path: Path, said: list[str] | None = None) -> Study:
    """Reads a sweep's file; a last line that was cut off is told to `said`.

    Raises ValueError if the file is none, or no setting in it is finished.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give one that `catp-jax study` has written")
    journal = Journal(path, report=[].append if said is None else said.append)
    header, rows = journal.header, journal.find("answers")
    if header is None:
        raise ValueError(f"{path} is empty; give one that `catp-jax study` has written")
    answered: dict[Setting, list[Row]] = {}
    for row in rows:
        answered.setdefault(Setting(**row["setting"]), []).append(row)
    results, unfinished = [], []
    for row in journal.find("result"):
        own = sorted(answered[Setting(**row["setting"])], key=lambda answer: answer["batch"])
        results.append(
            Result.of(
                row,
                answers=tuple(text for answer in own for text in answer["text"]),
                maps={
                    int(number): np.asarray(grid)
                    for answer in own
                    for number, grid in answer["maps"].items()
                },
            )
        )
    done = {result.setting for result in results}
    for row in journal.find("cost"):
        setting = Setting(**row["setting"])
        if setting not in done:
            count = sum(len(answer["text"]) for answer in answered.get(setting, []))
            unfinished.append(f"{setting}: {count} of {header['data']['questions']} questions")
    if not results:
        raise ValueError(
            f"{path} has no finished setting yet ({'; '.join(unfinished) or 'nothing answered'}); "
            f"run the same `catp-jax study` again to go on"
        )
    return Study(
        name=header["name"],
        header=header,
        results=tuple(results),
        pictures=tuple(journal.find("picture")),
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
    """Table, CSV, curves and pictures of one or several sweeps; the files written, what to say.

    Raises ValueError if a file cannot be used or `out` is no folder.
    """
    said: list[str] = []
    studies = _named([read_study(path, said) for path in paths], paths)
    make_folder(out)
    for name, study in studies.items():
        said += [f"{name}: not finished: {line}" for line in study.unfinished]

    written = [out / "results.csv", out / "accuracy.png"]
    write_csv({name: study.results for name, study in studies.items()}, written[0])
    draw_accuracy({name: _curves(study) for name, study in studies.items()}, written[1])
    layered = {name: study for name, study in studies.items() if study.is_layered}
    if layered:
        written.append(out / "layers.png")
        draw_layers(
            {name: study.results for name, study in layered.items()},
            written[-1],
            {name: study.cross_layers for name, study in layered.items()},
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
    return written, said


def _curves(study: Study) -> list[Result]:
    """What goes into the curves: not the layers by number, if they have a figure of their own."""
    numbered = re.compile(r"catp:layers=\d+")
    left = [r for r in study.results if not numbered.fullmatch(r.setting.method)]
    return left if study.is_layered else list(study.results)


def _named(studies: Sequence[Study], paths: Sequence[Path]) -> dict[str, Study]:
    """The studies by their models' names, with the file's where that is not enough."""
    names = [study.name for study in studies]
    found: dict[str, Study] = {}
    for study, path in zip(studies, paths, strict=True):
        name = study.name if names.count(study.name) == 1 else f"{study.name} ({path.stem})"
        if name in found:
            raise ValueError(f"{path} is given twice, or beside another file of its name")
        found[name] = study
    return found


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
        number, image = picture["number"], _picture(picture)
        caption = picture["question"]
        if unpruned is not None:
            caption += f"\nall: {unpruned.answers[number]}"
        row = [Panel(image, None, caption)]
        own = [r for r in study.results if r.setting.method == shown and number in r.maps]
        for result in sorted(own, key=lambda result: -result.visual_tokens)[: PANELS - 1]:
            caption = f"{shown}, keep {result.setting.keep}:\n{result.answers[number]}"
            row.append(Panel(image, result.maps[number], caption))
        rows.append(row)
    return rows


def _picture(row: Row) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(row["png"]))) as image:
        return np.asarray(image.convert("RGB")) / 255


def markdown(studies: dict[str, Study], pictures: dict[str, Path]) -> str:
    """The report's text."""
    lines = ["# What pruning costs, and what it saves", ""]
    for name, study in studies.items():
        lines += [f"## {name}", "", _conditions(study.header), ""]
        lines += [*markdown_table(study.results), ""]
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
        said = [
            "CATP with the votes of one cross-attention layer (those asked for by number are left "
            "out of the curves above).",
            "",
            "![Accuracy by layer](layers.png)",
        ]
    elif catp:
        count = catp[0].cross_layers
        last = "catp:layers=last" if count else "catp:layers=2"
        said = [
            f"Not drawn: it wants CATP with the votes of at least two layers, such as `--methods "
            f"catp:layers=first,{last}`"
            f"{f', by number from 1 to {count}' if count else ''}."
        ]
    else:
        return []
    return ["## By the layer that votes", "", *said, ""]


def _conditions(header: Row) -> str:
    data, generation = header["data"], header["generation"]
    counted = ("questions", "images", "digest", "drawn", "left_out")
    source = ", ".join(f"{key} {value}" for key, value in data.items() if key not in counted)
    search = f"{generation['num_beams']} beams" if generation["num_beams"] > 1 else "greedy"
    packages = ", ".join(f"{key} {value}" for key, value in header["versions"].items())
    beams = ""
    if generation["num_beams"] > 1:
        stopping = generation.get("early_stopping", "heuristic")
        beams = f", length penalty {generation['length_penalty']:g}, early stopping {stopping}"
    left_out = ""
    if "drawn" in data:
        count = sum(data["left_out"].values())
        kinds = ", ".join(f"{number} {kind}" for kind, number in data["left_out"].items())
        left_out = f" Of {data['drawn']} questions drawn {count} left out"
        left_out += f": {kinds}." if kinds else "."
    return (
        f"{data['questions']} questions about {data['images']} images of {header['task']}"
        f"{f' ({source})' if source else ''}, asked as `{header['prompt']}`.{left_out} "
        f"{search.capitalize()}{beams}, {generation['min_new_tokens']} to "
        f"{generation['max_new_tokens']} new tokens, "
        f"batches of {header['batch']}, seed {header['seed']}. On {header['device']}; {packages}."
    )


def columns(results: Sequence[Result], is_narrow: bool = False) -> list[tuple[str, list[str]]]:
    """Title and cells of each column that has something to show; the main ones if narrow."""
    every: list[tuple[str, bool, Callable[[Result], str], str | None]] = [
        # title, whether it is a main one, cell, the figure that has to be there
        ("method", True, lambda r: r.setting.method, None),
        ("kept", True, lambda r: f"{r.visual_tokens:.5g}" if is_narrow else _kept(r), None),
        (
            "accuracy, [95 %]",
            True,
            lambda r: f"{r.accuracy:.1%} [{100 * r.low:.1f}, {100 * r.high:.1f}]",
            None,
        ),
        ("agreement", True, lambda r: f"{r.agreement:.1%}", None),
        ("KL, nats", False, lambda r: f"{r.kl:.3f}", None),
        (
            "cache" if is_narrow else "cache, bytes",
            True,
            lambda r: decimal(r.cache_bytes) if is_narrow else f"{r.cache_bytes:,}",
            None,
        ),
        ("prefill, MFLOPs", False, lambda r: _millions(r.prefill_flops), "prefill_flops"),
        ("prefill, ms", False, lambda r: _time(r.prefill_ms, r.prefill_spread), "prefill_ms"),
        ("token, ms", False, lambda r: _time(r.token_ms, r.token_spread), "token_ms"),
        (
            "question, ms",
            True,
            lambda r: _number(r.milliseconds) if is_narrow else _time(r.milliseconds, r.spread),
            "milliseconds",
        ),
    ]
    return [
        (title, [cell(result) for result in results])
        for title, is_main, cell, wanted in every
        if (is_main or not is_narrow)
        and (wanted is None or any(getattr(result, wanted) is not None for result in results))
    ]


def _millions(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _time(median: float | None, spread: float | None) -> str:
    if median is None or spread is None:
        return "–"
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ± {spread:.{digits}f}"


def _kept(result: Result) -> str:
    """The mean number of visual tokens, and the percentage where one was asked for."""
    share = f" ({result.setting.keep})" if isinstance(result.setting.keep, str) else ""
    return f"{result.visual_tokens:.5g}{share}"


def markdown_table(results: Sequence[Result]) -> list[str]:
    """The table's lines."""
    own = columns(results)
    lines = [
        "| " + " | ".join(title for title, _ in own) + " |",
        "|---" + "|---:" * (len(own) - 1) + "|",
    ]
    for cells in zip(*(cells for _, cells in own), strict=True):
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(results: Sequence[Result], name: str = "", width: int = 80) -> Table:
    """The results as a table for a terminal of `width` letters, in their order."""
    first = results[0]
    title = f"{first.questions} questions about {first.images} images"
    out = Table(title=f"{name}: {title}" if name else title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    own = columns(results, is_narrow=width < WIDE)
    for number, (heading, _) in enumerate(own):
        out.add_column(
            heading.replace(", ", ",\n"), justify="right" if number else "left", no_wrap=True
        )
    for cells in zip(*(cells for _, cells in own), strict=True):
        out.add_row(*cells)
    return out


def write_csv(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """One row a model and setting, every figure a column; pruner and versions as JSON."""
    rows = []
    for name, own in results.items():
        for result in own:
            figures = result.figures()
            setting = figures.pop("setting")
            for key in ("pruner", "versions"):
                figures[key] = json.dumps(figures[key])
            rows.append({"model": name, **setting, **figures})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json_lines(results: Sequence[Result], path: Path) -> None:
    """One JSON object a line, figures only."""
    with path.open("w", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(result.figures()) + "\n")
