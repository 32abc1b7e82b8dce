"""A report holds the figures of its files, and its pictures are pictures."""

import base64
import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from catp_jax.generation.options import Options
from catp_jax.study.curves import by_layer, draw_curves, kept_panel, layer_of
from catp_jax.study.finished import read_study
from catp_jax.study.journal import Journal
from catp_jax.study.pictures import panels_of
from catp_jax.study.records import Conditions, Setting
from catp_jax.study.report import (
    Reported,
    by_voting_layer,
    described,
    make_folder,
    write_report,
)
from catp_jax.study.results import estimates, unpruned_of
from catp_jax.study.sweep import sweep
from catp_jax.study.tables import main_table, table
from tests.study.answerer import Tiny, examples

SETTINGS = [Setting("position", 4), Setting("position", "25%"), Setting("l2", 2)]
CONDITIONS = Conditions(task="tiny", source={"split": "test"}, batch=3)


def swept(path, name="mini", settings=SETTINGS):
    return list(
        sweep(
            Tiny(),
            examples(7),
            settings,
            CONDITIONS,
            journal=Journal(path),
            name=name,
            pictured=(0, 2),
        )
    )


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def is_drawn(path):
    """A picture of some size with more than a few colours in it."""
    found = pixels(path)
    return min(found.shape[:2]) > 200 and len(np.unique(found.reshape(-1, 3), axis=0)) > 50


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny.jsonl"
    return path, swept(path)


def test_a_study_is_read_as_it_was_run(finished):
    path, results = finished
    study = read_study(path)
    assert [r.figures() for r in study.results] == [r.figures() for r in results]
    assert [r.answers for r in study.results] == [r.answers for r in results]
    assert study.header.name == "mini"
    assert study.unfinished == ()
    assert len(study.pictures) == 2


def test_a_report_has_a_table_a_csv_curves_and_pictures(finished, tmp_path):
    path, results = finished
    out = tmp_path / "deep" / "report"
    written, said = write_report([path], out)
    assert said == []
    pictures = ["accuracy.png", "cache.png", "positions.png", "kept.png"]
    tables = ["settings.csv", "figures.csv"]
    assert [p.name for p in written] == ["report.html", "report.md", *tables, *pictures]
    assert sorted(out.iterdir()) == sorted(written)
    assert all(is_drawn(out / picture) for picture in pictures)

    text = (out / "report.md").read_text()
    assert "7 questions about 4 images of tiny (split test), asked as “{question}”" in text
    for result in results:
        (line,) = [
            line
            for line in text.splitlines()
            if line.startswith(f"| {result.setting.method} | ")
            and f"{result.visual_tokens:g}" in line.split("|")[2]
            and line.count("|") > 6  # not of the table of differences
        ]
        assert f"{result.accuracy:.1%} [{100 * result.low:.1f}, {100 * result.high:.1f}]" in line
        assert f"| {result.kl:.3f} [" in line
        assert f"| {result.cost.cache_bytes:,} |" in line
    page = (out / "report.html").read_text()
    for picture in pictures:
        assert f"]({picture})" in text
        data = base64.b64encode((out / picture).read_bytes()).decode()
        assert f'src="data:image/png;base64,{data}"' in page
    assert page.count("<img ") == len(pictures)

    with (out / "settings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [r.accuracy for r in results]
    assert [float(row["prefill_flops"]) for row in rows] == [r.cost.prefill_flops for r in results]
    assert [row["keep"] for row in rows] == ["", "4", "25%", "2"]
    assert {row["model"] for row in rows} == {"mini"}
    assert json.loads(rows[1]["pruners"])[0]["class"] == "Position"


def test_panels_show_the_whole_image_and_what_each_method_kept(finished):
    study = read_study(finished[0])
    one_budget = [r for r in study.results if r.setting.keep != "25%"]
    results = [renamed(r, {}, keep=2) if r.setting.keep else r for r in one_budget]
    rows = panels_of(study.pictures, results)
    assert [[p.caption.split("\n")[0] for p in row] for row in rows] == [
        [f"question {n}?", "position", "l2"] for n in (0, 2)
    ]
    whole, first, longest = rows[0]
    unpruned, position, l2 = (r.answers[0] for r in results)
    assert whole.kept is None
    assert whole.image.shape == (20, 24, 3)
    assert (first.kept.sum(), longest.kept.sum()) == (4, 2)
    assert whole.caption.endswith(f"\nunpruned: {unpruned.text}")
    for panel, answer in ((first, position), (longest, l2)):
        assert panel.caption.endswith(f"\n{answer.text}")
        assert panel.is_right == (answer.score == 1)


def renamed(result, names, keep=None):
    method = names.get(result.setting.method, result.setting.method)
    setting = Setting(method, keep or result.setting.keep)
    return dataclasses.replace(result, setting=setting)


def test_several_files_are_several_models(finished, tmp_path):
    swept(tmp_path / "other.jsonl", name="other")
    swept(tmp_path / "again.jsonl")
    written, _ = write_report(
        [finished[0], tmp_path / "other.jsonl", tmp_path / "again.jsonl"], tmp_path / "report"
    )
    names = [p.name for p in written]
    assert [n for n in names if n.startswith("kept")] == ["kept-1.png", "kept-2.png", "kept-3.png"]
    text = written[1].read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")][2:5] == [
        "## mini (tiny)",
        "## other",
        "## mini (again)",
    ]
    one = pixels(tmp_path / "report" / "accuracy.png").shape
    write_report([finished[0]], tmp_path / "single")
    assert one[1] > 2 * pixels(tmp_path / "single" / "accuracy.png").shape[1]


def test_one_file_twice_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="is given twice"):
        write_report([finished[0], finished[0]], tmp_path)


def layered(path, finished):
    """The finished study's file, as if it had been run with CATP's single layers."""
    names = {"position": "catp:layers=1", "l2": "catp:layers=2"}
    rows = []
    for line in finished[0].read_text().splitlines():
        row = json.loads(line)
        if "setting" in row:
            row["setting"]["method"] = names.get(row["setting"]["method"], row["setting"]["method"])
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")


def test_the_layer_figure_is_drawn_where_there_are_single_layers(finished, tmp_path):
    path = tmp_path / "layers.jsonl"
    layered(path, finished)
    written, _ = write_report([path], tmp_path / "report")
    assert is_drawn(tmp_path / "report" / "layers.png")
    assert "](layers.png)" in written[1].read_text()
    study = read_study(path)
    assert [layer_of(r.setting.method) for r in study.results] == [None, 1, 1, 2]


def with_methods(study, names, cross_layers=None):
    """The study, as if these methods had been run in a model with so many cross layers."""
    results = tuple(renamed(result, names) for result in study.results)
    header = dataclasses.replace(study.header, model={"cross_layers": cross_layers})
    return dataclasses.replace(study, header=header, results=results)


def voting(study, out):
    """The texts and pictures about the layers that vote."""
    return by_voting_layer([Reported("mini", 1, study)], out)


def test_the_first_and_the_last_layer_are_layers_to_compare(finished, tmp_path):
    study = with_methods(
        read_study(finished[0]), {"position": "catp", "l2": "catp:layers=first"}, cross_layers=6
    )
    assert [layer for layer, _ in by_layer(study.results, 6)] == [6, 6, 1]
    (section,) = voting(study, tmp_path)
    assert is_drawn(section.picture)


def test_without_two_layers_the_report_says_which_methods_would_do(finished, tmp_path):
    names = {"position": "catp", "l2": "catp:layers=last"}
    study = with_methods(read_study(finished[0]), names, cross_layers=6)
    (section,) = voting(study, tmp_path)
    assert "Not drawn" in section.texts[0]
    assert "--prune catp:layers=first --prune catp:layers=last" in section.texts[0]
    assert section.picture is None
    assert voting(read_study(finished[0]), tmp_path) == []


def test_what_was_left_out_stands_in_the_conditions(finished):
    study = read_study(finished[0])
    conditions = dataclasses.replace(
        study.header.conditions,
        source={"drawn": 9, "objects": None},
        left_out={"without an annotation": 2},
    )
    header = dataclasses.replace(study.header, conditions=conditions)
    text = described(header)
    assert "(drawn 9)" in text
    assert "Left out, without an annotation: 2." in text


def test_whatever_differs_from_the_defaults_stands_in_the_conditions(finished):
    study = read_study(finished[0])
    options = Options(temperature=0.5, bad_words=("red", "a b"), max_new_tokens=7)
    conditions = dataclasses.replace(
        study.header.conditions,
        options=options,
        is_chat=True,
        begun="It is",
        loading={"mask_mode": "hf"},
    )
    header = dataclasses.replace(study.header, conditions=conditions)
    text = described(header)
    assert "asked as “{question}” through the chat template. Drawn at temperature 0.5" in text
    assert ', bad_words ["red", "a b"], begun "It is", mask_mode "hf", batches of 3' in text
    plain = described(study.header)
    assert "Greedy, 0 to 10 new tokens, batches of 3" in plain


@pytest.mark.parametrize(
    ("method", "of", "layer"),
    [
        ("catp:layers=6", None, 6),
        ("catp:layers=first", None, 1),
        ("catp:layers=last", 6, 6),
        ("catp", 6, 6),
        ("catp", None, None),
        ("catp:layers=all", 6, None),
        ("catp:layers=1:image_weights", 6, None),
        ("position", 6, None),
    ],
)
def test_a_single_layer_goes_by_its_number(method, of, layer):
    assert layer_of(method, of) == layer


def test_an_unfinished_study_shows_what_it_has(finished, tmp_path):
    path = tmp_path / "x.jsonl"
    lines = finished[0].read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:30])  # two of four results
    written, said = write_report([path], tmp_path / "report")
    assert any("cut off" in line for line in said)
    assert "mini: not finished: position, keep 25%: 7 of 7 questions" in said
    assert "Not finished: position, keep 25%" in written[1].read_text()
    with (tmp_path / "report" / "settings.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2


def test_a_study_without_any_result_says_how_to_go_on(finished, tmp_path):
    path = tmp_path / "x.jsonl"
    lines = finished[0].read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"row": "result"' not in line))
    with pytest.raises(ValueError, match=r"no finished setting yet .*unpruned: 7 of 7"):
        read_study(path)
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_study(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_study(tmp_path / "nothing.jsonl")


def test_a_report_does_not_replace_a_file(finished, tmp_path):
    (tmp_path / "report").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        write_report([finished[0]], tmp_path / "report")


def test_the_terminal_shows_the_same_cells(finished):
    results = finished[1]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table(results, "mini", width=200))
    text = console.export_text()
    assert "mini: 7 questions about 4 images" in text
    for line in main_table(results, []).lines:
        assert all(cell in text for cell in line)


def test_a_narrow_terminal_gets_the_main_columns_whole(finished):
    cost = dataclasses.replace(finished[1][0].cost, cache_bytes=12_178_470)
    wide = {"cost": cost, "milliseconds": 1234.5, "accuracy": 1.0, "high": 1.0}
    results = [
        dataclasses.replace(renamed(r, {"position": "catp:image_weights"}), **wide)
        for r in finished[1]
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table(results, "mini"))
    text = console.export_text()
    assert "catp:image_weights" in text
    assert "…" not in text
    assert "KL" not in text


def test_columns_without_a_figure_are_left_out(finished):
    untimed = list(sweep(Tiny(), examples(3), SETTINGS))
    titles = main_table(untimed, []).head
    assert "prefill, MFLOPs" in titles
    assert not any("ms" in title or "moved" in title for title in titles)


def test_curves_need_no_unpruned_row(finished, tmp_path):
    pruned = [r for r in finished[1] if r is not unpruned_of(finished[1])]
    draw_curves([kept_panel(pruned, estimates(pruned), "a")], tmp_path / "a.png")
    assert is_drawn(tmp_path / "a.png")


@pytest.mark.parametrize("place", ["/proc/new", "/proc", "notes/new"])
def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("notes").touch()
    with pytest.raises(ValueError, match=f"{place} cannot be written"):
        make_folder(Path(place))


def test_smaller_images_go_by_how_they_were_made_smaller(finished):
    smaller = dataclasses.replace(finished[1][0], setting=Setting("image_scale", "0.5"))
    share = finished[1][2]  # of a percentage
    lines = main_table([smaller, share], []).lines
    assert [line[:2] for line in lines] == [("image_scale 0.5", "8"), ("position", "2 (25%)")]
