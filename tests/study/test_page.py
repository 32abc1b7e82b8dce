"""A page holds what others wrote as text, and needs no other file."""

import dataclasses
import html.parser

import pytest

from catp_jax.study.finished import read_study
from catp_jax.study.journal import Journal
from catp_jax.study.page import Section, as_html, as_markdown
from catp_jax.study.records import Conditions, Setting
from catp_jax.study.report import draw_report
from catp_jax.study.sweep import sweep
from catp_jax.study.tables import Table
from tests.study.answerer import Tiny, examples

EVIL = '<script>alert("1")</script><img src=x onerror=alert(2)> $\\frac{ | *b* `c` [d](http://e.f)'


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report in which everything that others may name is hostile."""
    folder = tmp_path_factory.mktemp("evil")
    questions = [dataclasses.replace(one, question=EVIL, answer=EVIL) for one in examples(4)]
    conditions = Conditions(task=EVIL, source={EVIL: EVIL}, prompt="{question} " + EVIL)
    journal = Journal(folder / "x.jsonl")
    list(sweep(Tiny(), questions, [Setting("l2", 2)], conditions, journal=journal, pictured=[0]))
    study = read_study(folder / "x.jsonl")
    draw_report({EVIL: study}, folder)
    return folder


def test_hostile_texts_stay_texts(page):
    found = Tags((page / "report.html").read_text())
    tags = {tag for tag, _ in found.tags}
    assert "script" not in tags
    assert EVIL in found.text
    assert all(
        name in ("src", "alt", "class", "lang", "charset", "name", "content")
        for _, attributes in found.tags
        for name in attributes
    )


def test_the_page_needs_no_other_file(page):
    found = Tags((page / "report.html").read_text())
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(sources) == len([*page.glob("*.png")])
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {tag for tag, _ in found.tags} & {"link", "iframe", "object", "embed", "base"}
    assert "url(" not in (page / "report.html").read_text()


def test_markdown_leaves_hostile_texts_as_they_are(page):
    text = (page / "report.md").read_text()
    assert "\\<script>" in text
    assert text.replace("\\<", "").count("<") == 0
    assert "](http" not in text.replace("\\](http", "")


def test_a_caption_is_read_in_both(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    section = Section("One", picture=picture, caption="Accuracy | kept.")
    assert as_markdown("Title", [section]).endswith(
        "![Accuracy \\| kept.](a.png)\n\nAccuracy \\| kept.\n"
    )
    assert "Accuracy | kept." in Tags(as_html("Title", [section])).text


def test_a_table_is_the_same_in_both():
    table = Table(("method", "a | b"), (("x", "1.0 [0.5, 2]"), ("y|z", "–")))
    text = as_markdown("Title", [Section("One", table=table, level=3)])
    lines = text.splitlines()
    assert lines[:5] == ["# Title", "", "### One", "", "| method | a \\| b |"]
    assert lines[5:8] == ["|---|---:|", "| x | 1.0 [0.5, 2] |", "| y\\|z | – |"]
    found = Tags(as_html("Title", [Section("One", table=table, level=3)]))
    assert [tag for tag, _ in found.tags].count("td") == 4
    for cell in ("Title", "One", "a | b", "1.0 [0.5, 2]", "y|z"):
        assert cell in found.text
