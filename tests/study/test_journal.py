"""A sweep's file: it only grows, and what a kill leaves of it is of use."""

import json

import pytest

from catp_jax.study.journal import Journal, differences

HEADER = {
    "task": "easy-vqa",
    "generation": {"num_beams": 1},
    "name": "mini",
    **dict.fromkeys(("data", "prompt", "batch", "seed", "versions")),
}


@pytest.fixture
def path(tmp_path):
    """A journal with a header and two rows."""
    path = tmp_path / "runs" / "sweep.jsonl"
    journal = Journal(path)
    journal.begin(HEADER)
    journal.append({"row": "note", "batch": 0, "text": ["é", "b\nc"]})
    journal.append({"row": "note", "batch": 1, "maps": {3: (1.0, 0.5)}})
    return path


def test_rows_come_back_as_they_were_written(path):
    journal = Journal(path)
    assert journal.header == {"row": "header", **HEADER}
    assert journal.find("note", batch=0) == [{"row": "note", "batch": 0, "text": ["é", "b\nc"]}]
    assert journal.find("note", batch=1)[0]["maps"] == {"3": [1.0, 0.5]}
    assert len(path.read_text().splitlines()) == 3


def test_without_a_path_rows_are_kept_in_memory_alike():
    journal = Journal()
    assert journal.header is None
    journal.begin(HEADER)
    row = journal.append({"row": "answers", "maps": {3: (1.0,)}})
    assert journal.find("answers") == [row] == [{"row": "answers", "maps": {"3": [1.0]}}]


def test_a_file_cut_off_anywhere_goes_on_from_its_last_whole_line(path):
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        said = []
        journal = Journal(path, report=said.append)
        kept = max([end for end in ends if end <= cut], default=0)
        assert len(journal.rows) == sum(end <= cut for end in ends)
        assert path.read_bytes() == whole[:cut]  # reading changes nothing
        assert bool(said) == (kept < cut)
        if said:
            assert f"({cut - kept} bytes)" in said[0]
        if kept == 0:
            journal.begin(HEADER)
            assert path.read_bytes() == whole[: ends[0]]
        else:
            journal.append({"row": "more"})
            assert path.read_bytes() == whole[:kept] + b'{"row": "more"}\n'


def test_a_last_line_of_rubbish_is_taken_away(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0\0\n")
    Journal(path).append({"row": "more"})
    assert path.read_bytes() == whole + b'{"row": "more"}\n'


def test_a_damaged_line_in_the_middle_is_named(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "oh\n", lines[2]]))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        Journal(path)


def test_a_line_that_nests_too_deep_is_damaged(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "[" * 100_000 + "\n", lines[2]]))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        Journal(path)


def test_a_row_that_lacks_its_fields_is_named(path):
    with path.open("a") as file:
        file.write('{"row": "picture", "number": 3}\n')
    with pytest.raises(ValueError, match=r"line 4 of .* is 'picture' without question, png"):
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
    assert json.loads(path.read_text()) == {"row": "header", **HEADER}


def test_another_sweep_is_refused_with_every_difference(path):
    other = {**HEADER, "task": "vqav2", "generation": {"num_beams": 5, "seed": 1}}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another sweep") as refusal:
        Journal(path).begin(other)
    assert 'task: "easy-vqa" → "vqav2"' in str(refusal.value)
    assert "generation.num_beams: 1 → 5" in str(refusal.value)
    assert "generation.seed: nothing → 1" in str(refusal.value)
    assert path.read_bytes() == before


def test_a_part_of_the_header_can_be_checked_and_the_name_may_change(path):
    Journal(path).check({"generation": {"num_beams": 1}})
    Journal(path).begin({**HEADER, "name": "moved"})
    with pytest.raises(ValueError, match="num_beams"):
        Journal(path).check({"generation": {"num_beams": 2}})


def test_long_values_are_shown_in_part():
    (line,) = differences({"model": "x" * 200}, {"model": None})
    assert line.startswith('model: "xxx')
    assert line.endswith("… → nothing")
    assert len(line) < 110
