"""A report as Markdown and as a page of HTML that opens anywhere: its pictures are in it."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from catp_jax.study.tables import Table

MARKS = re.compile(r"[\\|<`*]|\](?=\()")  # what Markdown would take for its own


@dataclass(frozen=True)
class Section:
    """A part of a report under a heading: texts, then a table, then a picture with its caption."""

    title: str
    level: int = 2
    texts: tuple[str, ...] = ()
    table: Table | None = None
    picture: Path | None = None
    caption: str = ""


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report's text, to lie beside its pictures."""
    lines = [f"# {_plain(title)}", ""]
    for section in sections:
        lines += [f"{'#' * section.level} {_plain(section.title)}", ""]
        for text in section.texts:
            lines += [_plain(text), ""]
        if section.table is not None:
            lines += [*_table(section.table), ""]
        if section.picture is not None:
            caption = _plain(section.caption)
            lines += [f"![{caption}]({section.picture.name})", "", caption, ""]
    return "\n".join(lines)


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The same as one file that needs no other; whatever others wrote is text in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("page.html.jinja").render(title=title, sections=sections)


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _table(table: Table) -> list[str]:
    marks = ["---"] * table.names + ["---:"] * (len(table.head) - table.names)
    return [
        f"| {' | '.join(map(_plain, table.head))} |",
        f"|{'|'.join(marks)}|",
        *(f"| {' | '.join(map(_plain, line))} |" for line in table.lines),
    ]


def _plain(text: str) -> str:
    """A text that Markdown leaves as it is, on one line."""
    return MARKS.sub(lambda match: "\\" + match[0], " ".join(text.split()))
