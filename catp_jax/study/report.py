"""The report on one or several sweeps, from their files alone."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from catp_jax.generation.options import Options
from catp_jax.study.curves import (
    cache_panel,
    draw_curves,
    is_layered,
    kept_panel,
    layer_panel,
)
from catp_jax.study.finished import Study, read_studies
from catp_jax.study.page import Section, as_html, as_markdown
from catp_jax.study.pictures import draw_kept, panels_of, pictured_budget
from catp_jax.study.plain import shown
from catp_jax.study.positions import draw_positions, positions_of
from catp_jax.study.records import UNPRUNED, Conditions, Header, Result
from catp_jax.study.results import NEEDS_PIXELS, RANDOM, Estimate, estimates, families, pooled
from catp_jax.study.tables import (
    NOTES,
    difference_table,
    family_table,
    main_table,
    write_figures,
    write_settings,
)

TITLE = "What pruning costs, and what it saves"
BY_NUMBER = re.compile(r"catp:layers=\d+")


@dataclass(frozen=True)
class Reported:
    """A study as a report has it, under a model's name: several seeds of a method are one result,
    and `figures` are the means of each result by name, with their intervals.
    """

    name: str
    number: int
    study: Study

    @cached_property
    def results(self) -> list[Result]:
        """One of each line."""
        return pooled(self.study.results)

    @cached_property
    def figures(self) -> list[dict[str, Estimate]]:
        """Those of each result."""
        return estimates(self.results)

    @property
    def is_layered(self) -> bool:
        """Whether votes of at least two layers can be compared."""
        return is_layered(self.results, self.study.header.cross_layers)

    @property
    def curves(self) -> tuple[list[Result], list[dict[str, Estimate]]]:
        """What goes into the curves: not CATP's layers by number, which have a figure of their own
        where there are several.
        """
        pairs = zip(self.results, self.figures, strict=True)
        left = [
            pair
            for pair in pairs
            if not (self.is_layered and BY_NUMBER.fullmatch(pair[0].setting.method))
        ]
        return [result for result, _ in left], [own for _, own in left]

    @property
    def kinds(self) -> list[str]:
        """The figures that are accuracies of some of the questions."""
        names = [f"accuracy, {family}" for family in families(self.results[0].answers)]
        hard = f"accuracy, {NEEDS_PIXELS}"
        return [*names, *([hard] if any(hard in own for own in self.figures) else [])]


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
    """Page, Markdown, CSV, curves and pictures of one or several sweeps; the files written, and
    messages.

    Raises ValueError if a file cannot be used or `out` is no folder.
    """
    messages: list[str] = []
    studies = read_studies(paths, messages)
    make_folder(out)
    for name, study in studies.items():
        messages += [f"{name}: not finished: {line}" for line in study.unfinished]
    return draw_report(studies, out), messages


def draw_report(studies: Mapping[str, Study], out: Path) -> list[Path]:
    """Writes the report's files into a folder."""
    models = [Reported(name, n, study) for n, (name, study) in enumerate(studies.items(), start=1)]
    tables = [out / "settings.csv", out / "figures.csv"]
    write_settings({model.name: model.study.results for model in models}, tables[0])
    write_figures({model.name: (model.results, model.figures) for model in models}, tables[1])
    sections = [*_overview(models, out)]
    for model in models:
        sections += _sections(model, out, f"-{model.number}" if len(models) > 1 else "")
    sections += [*by_voting_layer(models, out), Section("What the figures mean", texts=NOTES)]
    pages = [out / "report.html", out / "report.md"]
    for page, render in zip(pages, (as_html, as_markdown), strict=True):
        page.write_text(render(TITLE, sections), encoding="utf-8")
    return [*pages, *tables, *(section.picture for section in sections if section.picture)]


def _overview(models: Sequence[Reported], out: Path) -> list[Section]:
    """Curves of all models beside each other."""
    kept, cached = out / "accuracy.png", out / "cache.png"
    draw_curves([kept_panel(*model.curves, _title(model)) for model in models], kept)
    draw_curves([cache_panel(model.curves[0], _title(model)) for model in models], cached)
    return [
        Section(
            "Accuracy over visual tokens kept",
            picture=kept,
            caption="Accuracy over the visual tokens that are kept; bars and bands are 95 % "
            "intervals over images. Grey are what no method is: chance, and the bounds, which are "
            "told what is needed.",
        ),
        Section(
            "Accuracy over cache bytes",
            picture=cached,
            caption="What a cache of some size can answer. The broad line is the front: no other "
            "setting is better at as few bytes or fewer.",
        ),
    ]


def _title(model: Reported) -> str:
    first = model.results[0]
    return f"{model.name}: {first.questions} questions, {first.images} images"


def _sections(model: Reported, out: Path, number: str) -> list[Section]:
    """What there is to say of one model; `number` tells its pictures from others'."""
    study, results, figures = model.study, model.results, model.figures
    texts = [described(study.header)]
    if all(result.cost.gpu is None for result in results):
        texts.append(
            "Bytes moved on a GPU were not asked for (`--gpu h100`, with JAX's compiler for it)."
        )
    if study.unfinished:
        texts.append(f"Not finished: {'; '.join(study.unfinished)}.")
    sections = [Section(model.name, texts=tuple(texts), table=main_table(results, figures))]
    if table := family_table(results, figures):
        panels = [kept_panel(*model.curves, _kind(kind), kind) for kind in model.kinds]
        picture = out / f"families{number}.png" if panels else None
        if picture is not None:
            draw_curves(panels, picture)
        sections.append(
            Section(
                "By family of questions",
                level=3,
                table=table,
                picture=picture,
                caption="Accuracy by family of questions, over the visual tokens kept.",
            )
        )
    for other, title in ((UNPRUNED, "unpruned"), (RANDOM, "random at the same budget")):
        if table := difference_table(results, figures, other):
            sections.append(Section(f"Against {title}, paired", level=3, table=table))
    if positions := positions_of(study.results):
        picture = out / f"positions{number}.png"
        draw_positions(positions, picture)
        sections.append(_positions(model, picture, positions[0].questions, positions[0].of))
    if rows := panels_of(study.pictures, study.results):
        picture = out / f"kept{number}.png"
        draw_kept(rows, picture)
        keep = pictured_budget(study.results)
        asked = [
            f"{line}. {picture.question} {_either(picture.answers)}."
            for line, picture in enumerate(study.pictures, start=1)
        ]
        framed = any(picture.boxes for picture in study.pictures)
        merged = any(answer.is_merged for result in results for answer in result.answers)
        sections.append(
            Section(
                f"What each method keeps at {keep}",
                level=3,
                texts=tuple(asked),
                picture=picture,
                caption="Bright is what was kept, or where the kept tokens look"
                f"{'; frames are what the answer depends on' if framed else ''}. "
                f"{'Of a mean of tokens one in their middle is bright. ' if merged else ''}"
                "Right answers are green (✓), wrong ones red (✗).",
            )
        )
    return sections


def _kind(figure: str) -> str:
    return figure.partition(", ")[2]


def _either(answers: Sequence[str]) -> str:
    return " or ".join(answers)


def _positions(model: Reported, picture: Path, questions: int, of: int) -> Section:
    """How often each place was kept."""
    some = "" if questions == of else f" Of the {questions} questions whose images are cut alike."
    return Section(
        "How often each position was kept",
        level=3,
        picture=picture,
        caption="As multiples of the mean over all positions: 1 everywhere is no bias towards a "
        "place. What a task asks about may lie anywhere or not: oracle shows where, if the task "
        f"knows.{some}",
    )


def by_voting_layer(models: Sequence[Reported], out: Path) -> list[Section]:
    """What compares the layers, or which methods would; nothing without CATP."""
    catp = [
        model
        for model in models
        if any(re.match(r"catp\b", result.setting.method) for result in model.results)
    ]
    if not catp:
        return []
    title = "By the layer that votes"
    layered = [model for model in catp if model.is_layered]
    if layered:
        picture = out / "layers.png"
        draw_curves(
            [
                layer_panel(model.results, _title(model), model.study.header.cross_layers)
                for model in layered
            ],
            picture,
        )
        caption = (
            "CATP with the votes of one cross-attention layer; those asked for by number are left "
            "out of the other curves."
        )
        return [Section(title, picture=picture, caption=caption)]
    count = catp[0].study.header.cross_layers
    last = "catp:layers=last" if count else "catp:layers=2"
    text = (
        "Not drawn: it requires CATP with the votes of at least two layers, such as "
        f"--prune catp:layers=first --prune {last}"
        f"{f', by number from 1 to {count}' if count else ''}."
    )
    return [Section(title, texts=(text,))]


def described(header: Header) -> str:
    """How and where the questions were asked, in a few sentences."""
    data, conditions = header.data, header.conditions
    named = [f"{key} {value}" for key, value in conditions.source.items() if value is not None]
    source = ", ".join(named)
    left_out = "".join(f" Left out, {why}: {n}." for why, n in conditions.left_out.items())
    packages = ", ".join(f"{key} {value}" for key, value in header.versions.items())
    options = conditions.options
    return (
        f"{data.questions} questions about {data.images} images of {conditions.task}"
        f"{f' ({source})' if source else ''}, asked as “{conditions.prompt}”"
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
    late = ", the last token of each prompt read from the cache" if conditions.is_late else ""
    return late + "".join(f", {name} {shown(value)}" for name, value in others.items())
