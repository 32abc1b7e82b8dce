"""A sweep's file: it only grows, and what a kill leaves of it is of use."""

import dataclasses
import json

import pytest

from catp_jax.generation.options import Options
from catp_jax.study.journal import Journal, differences
from catp_jax.study.records import (
    FORMAT,
    Answer,
    Answers,
    Conditions,
    Cost,
    Data,
    Header,
    Picture,
    Setting,
    SettingCost,
)

HEADER = Header(
    format=FORMAT,
    name="mini",
    conditions=Conditions(task="easy-vqa", options=Options(bad_words=("é", "b\nc"))),
    data=Data(4, 2, "abc"),
    model={"kind": "tiny", "layers": [1, 2]},
    device="cpu",
    versions={"catp-jax": "0.1.0"},
)
COST = SettingCost(Setting("l2", "25%"), ({"class": "L2Norm"},), Cost(100, 5.0))
ANSWERS = Answers(
    setting=Setting("l2", "25%"),
    batch=1,
    ms=None,
    answers=(
        Answer("x", "ü\nv", 0.3, 0.125, 3, 8, (1, 5), ((1.0, 0.5), (0.0, 0.25))),
        Answer("y", "", 1.0, 0.0, 4, 8, None),
    ),
)
PICTURE = Picture(3, "who?", ("é", "b"), "aGk=")


@pytest.fixture
def path(tmp_path):
    """A journal with a header and two more records."""
    path = tmp_path / "runs" / "sweep.jsonl"
    journal = Journal(path)
    journal.begin(HEADER)
    journal.append(COST)
    journal.append(ANSWERS)
    return path


def test_records_come_back_as_they_were_written(path):
    journal = Journal(path)
    assert journal.header == HEADER
    assert journal.records == [HEADER, COST, ANSWERS]
    assert journal.all(Answers) == [ANSWERS]
    assert len(path.read_text().splitlines()) == 3


def test_without_a_path_records_are_kept_in_memory_alike(path):
    journal = Journal()
    assert journal.header is None
    journal.begin(HEADER)
    assert journal.append(COST) == COST
    journal.append(ANSWERS)
    assert journal.records == Journal(path).records
    assert journal.digest == Journal(path).digest


def test_a_file_cut_off_anywhere_resumes_after_its_last_whole_line(path):
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    added = Journal()
    added.append(PICTURE)
    line = json.dumps({"row": "picture", **dataclasses.asdict(PICTURE)}, ensure_ascii=False)
    for cut in [*range(1, len(whole), 7), *ends]:
        path.write_bytes(whole[:cut])
        messages = []
        journal = Journal(path, report=messages.append)
        kept = max([end for end in ends if end <= cut], default=0)
        assert len(journal.records) == sum(end <= cut for end in ends)
        assert path.read_bytes() == whole[:cut]  # reading changes nothing
        assert bool(messages) == (kept < cut)
        if messages:
            assert f"({cut - kept} bytes)" in messages[0]
        if kept == 0:
            journal.begin(HEADER)
            assert path.read_bytes() == whole[: ends[0]]
        else:
            journal.append(PICTURE)
            assert path.read_bytes() == whole[:kept] + f"{line}\n".encode()


def test_a_last_line_of_rubbish_is_taken_away(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0\0\n")
    Journal(path).append(PICTURE)
    assert path.read_bytes().startswith(whole + b'{"row": "picture"')


@pytest.mark.parametrize("line", ["oh", "[" * 100_000, "[1]", "{}", '{"row": 3}'])
def test_a_damaged_line_in_the_middle_is_named(path, line):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], f"{line}\n", lines[2]]))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        Journal(path)


def changed(row, *keys, value=None):
    """The row with a value in it replaced, or taken away."""
    row = json.loads(json.dumps(row))
    *way, last = keys
    part = row
    for key in way:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return row


@pytest.mark.parametrize(
    ("number", "keys", "value", "message"),
    [
        (1, ["versions", "jax"], 3, "versions.jax: input should be a valid string, got 3"),
        (1, ["data", "images"], "2", 'data.images: input should be a valid integer, got "2"'),
        (1, ["data", "digest"], None, "data.digest: field required"),
        (
            1,
            ["conditions", "batch"],
            True,
            "conditions.batch: input should be a valid integer, got true",
        ),
        (
            1,
            ["conditions", "options", "top_p"],
            "x",
            "options.top_p: input should be a valid number",
        ),
        (1, ["conditions", "options", "top_p"], 7, "top_p"),  # by the options' own check
        (
            1,
            ["conditions", "options", "early_stopping"],
            "so",
            "should be 'heuristic', 'first' or 'never'",
        ),
        (2, ["setting", "keep"], 1.5, "setting.keep.int: input should be a valid integer, got 1.5"),
        (2, ["cost"], 5, "cost: input should be an object, got 5"),
        (2, ["cost", "prefill_flops"], "5", "cost.prefill_flops: input should be a valid number"),
        (2, ["pruners"], None, "pruners: field required"),
        (2, ["pruner"], {}, "pruner: unexpected keyword argument"),
        (
            3,
            ["answers", 1, "score"],
            "1",
            'answers[1].score: input should be a valid number, got "1"',
        ),
        (3, ["answers", 0, "kept"], 3, "answers[0].kept: input should be a valid array, got 3"),
        (3, ["answers", 0, "kept", 1], 0.5, "answers[0].kept[1]: input should be a valid integer"),
        (
            3,
            ["answers", 0, "map", 1, 0],
            "a",
            "answers[0].map[1][0]: input should be a valid number",
        ),
        (3, ["answers", 0, "id"], None, "answers[0].id: field required"),
        (3, ["row"], "note", "of an unknown kind, 'note'"),
        (3, ["row"], "header", "a header, but the first line"),
    ],
)
def test_a_wrong_key_or_type_is_named_with_its_line(path, number, keys, value, message):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number - 1] = changed(rows[number - 1], *keys, value=value)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(ValueError, match=rf"line {number} of .*sweep.jsonl is ") as refusal:
        Journal(path)
    assert message in str(refusal.value)


def test_what_has_a_default_may_be_missing(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] = changed(rows[0], "conditions", "options", "top_p")
    rows[2] = changed(rows[2], "answers", 1, "map")
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert Journal(path).records == [HEADER, COST, ANSWERS]


@pytest.mark.parametrize("written", [1, 2, None])
def test_a_file_of_another_version_is_refused_by_its_name(path, written):
    row = {"row": "header", "format": written, "versions": {"catp-jax": "0.0.9"}, "generation": {}}
    path.write_text(json.dumps(row) + "\n" + '{"row": "answers"}\n')
    with pytest.raises(ValueError, match=rf"is of format {written}, written by catp-jax 0.0.9"):
        Journal(path)


@pytest.mark.parametrize("content", ["notes", "notes\n", "[]\n", '{"row": "answers"}\n', "{}"])
def test_another_kind_of_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a sweep's file"):
        Journal(path)
    assert path.read_text() == content


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        Journal(tmp_path)


def test_an_empty_file_is_a_new_one(tmp_path):
    path = tmp_path / "new.jsonl"
    path.touch()
    Journal(path).begin(HEADER)
    assert Journal(path).records == [HEADER]


def test_another_sweep_is_refused_with_every_difference(path):
    conditions = Conditions(task="vqav2", seed=1, options=Options(num_beams=5))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another sweep") as refusal:
        Journal(path).begin(dataclasses.replace(HEADER, conditions=conditions, model={"depth": 1}))
    assert 'conditions.task: "easy-vqa" → "vqav2"' in str(refusal.value)
    assert "conditions.seed: 42 → 1" in str(refusal.value)
    assert "conditions.options.num_beams: 1 → 5" in str(refusal.value)
    assert "model.depth: nothing → 1" in str(refusal.value)
    assert path.read_bytes() == before


def test_a_part_of_the_header_can_be_checked_and_the_name_may_change(path):
    Journal(path).check(data=HEADER.data, conditions=HEADER.conditions)
    Journal(path).begin(dataclasses.replace(HEADER, name="moved"))
    with pytest.raises(ValueError, match=r"data\.images: 2 → 3"):
        Journal(path).check(data=Data(4, 3, "abc"))


def test_long_values_are_shown_in_part():
    (line,) = differences({"model": "x" * 200}, {"model": None})
    assert line.startswith('model: "xxx')
    assert line.endswith("… → nothing")
    assert len(line) < 110
