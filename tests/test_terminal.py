"""catp_jax.terminal: nothing that is shown steers the terminal."""

import dataclasses
import io
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from catp_jax import api, cli_demo
from catp_jax.plan import Plan
from catp_jax.plan import table as plan_table
from catp_jax.study import tasks
from catp_jax.study.records import Setting
from catp_jax.study.sweep import sweep
from catp_jax.study.tables import table as study_table
from catp_jax.terminal import as_text, one_line, printable
from catp_jax.training import scene_questions
from convert.report import Report
from convert.report import table as report_table
from tests.study.answerer import Tiny, examples

STEERING = {
    "colour": "\x1b[31mred\x1b[0m",
    "window title": "\x1b]0;mine\x07",
    "one-byte escape": "\x9b31m",
    "overwritten": "good\rbad",
    "erased": "bad\x08\x08\x08",
    "turned": "abc\u202edef",
    "half a character": "\ud800",
    "a byte that is no UTF-8": "\udcff",
}


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_what_steers_a_terminal_is_written_out(text: str):
    shown = printable(text)
    assert {unicodedata.category(c) for c in shown}.isdisjoint({"Cc", "Cf", "Cs"})
    assert shown.encode("ascii").decode("unicode_escape") == text
    assert printable(shown) == shown


def test_other_text_stays():
    text = "one\n\ttwo: café, 画像, [b], \\x1b"
    assert printable(text) == text
    assert one_line(text) == text.replace("\n", "\\n").replace("\t", "\\t")


NAMES = {
    "no markup": "p[/red]",
    "markup": "p[bold]x[/bold]",
    "an escape sequence": "p\x1b[31mx",
    "two lines": "p\nx",
}


def study(name):
    return study_table(list(sweep(Tiny(), examples(2), [Setting("l2", 2)])), name)


def plan(name):
    figures = dict.fromkeys(Plan.__dataclass_fields__, 1)
    nothing = {"target": None, "prefill_work": None, "token_work": None, "found_batch": None}
    more = {"model": name, "mesh": {}, "prefill_traffic": (), "token_traffic": ()}
    return plan_table(Plan(**{**figures, **nothing, **more}))  # type: ignore[arg-type]


def converted(name):
    return report_table(Report(Path(name), "hub", (), ()))


def shown(what):
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("table", [study, plan, converted, as_text])
def test_a_name_is_shown_as_it_is_and_not_obeyed(name, table):
    text = shown(table(name))
    assert one_line(name) in text
    # what rich itself writes for a terminal: italics of titles, and no colour
    assert "\x1b[31m" not in text


def show_tiny(monkeypatch, asked):
    """Has the demo show a tiny model and some questions."""
    monkeypatch.setattr(api, "load", lambda *given, **options: Tiny())
    task = dataclasses.replace(tasks.easy_vqa_task(), examples=tuple(asked))
    monkeypatch.setattr(scene_questions, "scenes_task", lambda scenes: task)
    monkeypatch.setattr(cli_demo, "settings_for", lambda model: [Setting("l2", 2)])


def test_the_demo_says_words_that_a_tokenizer_lacks(tmp_path, monkeypatch, capsys):
    asked = examples(4)
    show_tiny(monkeypatch, [dataclasses.replace(asked[0], question="an okapi ?"), *asked[1:]])
    cli_demo.demo(tmp_path / "out", [Path("tiny")], 4, None)
    assert "no tokens for 1 of the words" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_demo_shows_names_as_they_are(tmp_path, monkeypatch, capsys, name):
    show_tiny(monkeypatch, examples(4))
    cli_demo.demo(tmp_path / name.replace("/", ""), [Path(name)], 4, None)
    out, err = capsys.readouterr()
    assert one_line(Path(name).name) in err
    assert one_line(name.replace("/", "")) in out
    assert "\x1b[31m" not in out + err
