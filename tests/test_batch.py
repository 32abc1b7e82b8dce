"""Requests by the file: which lines are requests, and a file of answers that resumes."""

import dataclasses
import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from catp_jax.answers import NonFinite
from catp_jax.api import load
from catp_jax.batch import Answer, AnswerFile, Problem, Request, answer, read_requests
from catp_jax.generation.options import Options
from tests.command import catp_jax
from tests.shallow import shallow

ASSETS = Path(__file__).resolve().parents[1] / "catp_jax" / "assets"
CIRCLE = str(ASSETS / "blue-circle.png")
ASK = "what color is the shape?"
MESSAGES = [{"role": "user", "content": "hello"}]


def write(path: Path, *rows: dict | bytes) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def generate(requests: Path, *words: object):
    """The command on a file of requests; its answers and what else it said."""
    folder = shallow("mini-blip2-opt")
    return catp_jax("generate", folder, "--batch", requests, "--batch-size", 2, *words)


@pytest.mark.parametrize(
    ("row", "request_"),
    [
        ({"prompt": "a"}, Request("a")),
        ({"prompt": "", "images": None}, Request("")),
        ({"prompt": "a", "image": "b.png"}, Request("a", ("here/b.png",))),
        ({"prompt": "a", "images": "b.png"}, Request("a", ("here/b.png",))),
        ({"prompt": "a", "image": ["b.png", "/c.png"]}, Request("a", ("here/b.png", "/c.png"))),
        ({"prompt": "a", "image": "data:image/png;x"}, Request("a", ("data:image/png;x",))),
        ({"prompt": "a", "image": "file:///c.png"}, Request("a", ("file:///c.png",))),
        ({"messages": MESSAGES, "id": 7}, Request(MESSAGES, key=7)),
        ({"prompt": "a", "begun": " It is"}, Request("a", begun=" It is")),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "b.png"}]}]},
            Request([{"role": "user", "content": [{"type": "image"}]}], ("here/b.png",)),
        ),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
                "images": ["b.png", "data:,c"],
            },
            Request(
                [{"role": "user", "content": [{"type": "image"}] * 2}], ("here/b.png", "data:,c")
            ),
        ),
        (b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}\r', Request("é")),
    ],
)
def test_a_line_may_spell_its_request_in_several_ways(tmp_path, row, request_):
    path = write(tmp_path / "rows.jsonl", row, b"", b"  ")
    (found,), problems = read_requests(path)
    assert not problems
    own = [str(image).replace(str(tmp_path), "here") for image in found.images]
    assert (found.prompt, tuple(own), found.key) == (
        request_.prompt,
        request_.images,
        request_.key,
    )
    assert (found.number, found.line) == (0, 1)


def test_a_path_may_start_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (found,), _ = read_requests(write(tmp_path / "rows.jsonl", {"prompt": "", "image": "~/a.png"}))
    assert str(found.images[0]) == "/home/me/a.png"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a"}, "unknown: 'question'"),
        ({"prompt": "a", "begun": ["It is"]}, "what is begun of an answer is a text"),
        ({"prompt": "a", "img": "b.png", "imgs": []}, "unknown: 'img', 'imgs'"),
        ({"prompt": "a", "image": "b.png", "images": []}, "give one of them"),
        ({"prompt": "a", "messages": []}, "give either a prompt or messages"),
        ({"images": []}, "either a prompt or messages"),
        ({"prompt": 3}, "a prompt is a text"),
        ({"prompt": None}, "a prompt is a text"),
        ({"messages": "hello"}, "messages are a list"),
        ({"messages": []}, "a chat must be a list of at least one message"),
        ({"messages": [{"role": "user"}]}, "the content of message 0"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "is missing"),
        ({"prompt": "a", "images": 3}, "a list of paths"),
        ({"prompt": "a", "images": ""}, "the path of an image is empty"),
        ({"prompt": "a", "images": [None]}, "a list of paths"),
        ({"prompt": "a", "id": True}, "an id is"),
        ({"prompt": "a", "id": [1]}, "an id is"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": "a", "image": "b.png", "prompt": "c"}', "'prompt' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b'\x00\xfe{"prompt": "a"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_no_request_is_told_with_its_number(tmp_path, row, said):
    requests, (problem,) = read_requests(
        write(tmp_path / "rows.jsonl", {"prompt": "a"}, row, {"prompt": "c"})
    )
    assert [request.line for request in requests] == [1, 3]
    assert problem.line == 2
    assert said in problem.message


def test_an_id_names_one_request(tmp_path):
    requests, problems = read_requests(
        write(tmp_path / "rows.jsonl", *({"prompt": "a", "id": key} for key in (1, "1", 1)))
    )
    assert [request.key for request in requests] == [1, "1"]
    assert [(p.line, p.message) for p in problems] == [(3, "id 1 is that of line 1")]


def test_a_file_of_answers_resumes_wherever_it_was_cut_off(tmp_path):
    rows = [
        {"prompt": ASK, "image": CIRCLE},
        {"prompt": "what shape is present?", "image": CIRCLE, "id": "second"},
        {"prompt": ASK, "image": "gone.png"},
        {"prompt": "is there a circle?", "images": [CIRCLE], "id": 3},
    ]
    requests, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "out" / "answers.jsonl"
    done = generate(requests, "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert "line 3" in done.stderr
    whole = out.read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [row.get("id", row["line"]) for row in answers] == [1, "second", 3]
    assert [row["text"] for row in answers] == ["red", "triangle", "yes"]  # a shallow model
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 5, ends[0] - 1, ends[0], ends[1] + 20):
        out.write_bytes(whole[:cut])
        assert generate(requests, "--out", out).returncode == 1
        assert out.read_bytes() == whole
    requests.write_text("\n".join(json.dumps(rows[number]) for number in (0, 1, 3)))
    last = json.loads(whole.splitlines()[-1])
    out.write_bytes(whole[: ends[1]])
    assert generate(requests, "--out", out).returncode == 0  # the third line now
    assert json.loads(out.read_bytes().splitlines()[-1]) == {**last, "line": 3}
    done = generate(requests, "--out", out)
    assert (done.returncode, done.stdout) == (0, "")
    assert "has all answers already" in done.stderr


def test_an_id_is_not_taken_for_the_number_of_a_line(tmp_path):
    rows = [{"prompt": ASK, "image": CIRCLE, "id": 2}, {"prompt": ASK, "image": CIRCLE}]
    requests, out = write(tmp_path / "rows.jsonl", *rows), tmp_path / "answers.jsonl"
    generate(requests, "--out", out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[1])
    assert generate(requests, "--out", out).returncode == 0
    assert out.read_bytes() == lines[1] + lines[0]


def test_answers_of_another_model_of_the_same_name_are_not_mixed(tmp_path):
    requests = write(tmp_path / "rows.jsonl", {"prompt": ASK, "image": CIRCLE})
    for place, name in (("x", "mini-blip2-opt"), ("y", "mini-blip2-t5")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "m").symlink_to(shallow(name))
    words = ["--batch", requests, "--out", tmp_path / "answers.jsonl"]
    assert catp_jax("generate", tmp_path / "x" / "m", *words).returncode == 0
    done = catp_jax("generate", tmp_path / "y" / "m", *words)
    assert done.returncode == 1
    assert "of another model" in done.stderr


def test_answers_may_lie_in_the_models_own_folder(tmp_path):
    shutil.copytree(shallow("mini-blip2-opt"), tmp_path / "m")
    requests = write(tmp_path / "m" / "rows.jsonl", {"prompt": ASK, "image": CIRCLE})
    words = ["--batch", requests, "--out", tmp_path / "m" / "answers.jsonl"]
    assert catp_jax("generate", tmp_path / "m", *words).returncode == 0
    again = catp_jax("generate", tmp_path / "m", *words)
    assert (again.returncode, "has all answers already" in again.stderr) == (0, True)


def test_a_request_without_a_line_has_no_place_in_a_file_of_answers(tmp_path):
    file = AnswerFile(tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match="requests with a line"):
        file.add(Answer(Request("a"), answers=None, index=0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("id", value) for value in ([1], {}, True, 1.5)),
        *(("line", value) for value in ([1], "1", None, True)),
        *(("text", 5), ("settings", []), ("images", "a.png")),
    ],
)
def test_an_answer_of_the_wrong_kind_is_refused_with_its_line(tmp_path, key, value):
    row = {"line": 1, "id": "a", "prompt": "a", "images": [], "text": "b", "settings": "c"}
    path = write(tmp_path / "answers.jsonl", row, row | {key: value}, row)
    with pytest.raises(ValueError, match=f"line 2 of .* is an answer whose {key} is .*; delete it"):
        AnswerFile(path).missing([Request("a", line=1)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"options": Options(seed=2**32 - 1)}, "seeds lie between"),
        ({"options": Options(seed=[1, 2])}, "one number"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_for_some_request_is_refused_before_any_is_answered(options, said):
    asked = [Request(ASK, (CIRCLE,), number, number + 1) for number in range(3)]
    with pytest.raises(ValueError, match=said):
        next(answer(load(shallow("mini-blip2-opt")), asked, **options))


def test_answers_of_other_requests_and_options_are_not_mixed(tmp_path):
    requests = write(tmp_path / "rows.jsonl", {"prompt": ASK, "image": CIRCLE})
    out = tmp_path / "answers.jsonl"
    assert generate(requests, "--out", out).returncode == 0
    whole = out.read_bytes()
    for words in (
        ["--max-new-tokens", 3],
        ["--prune", "catp", "--keep", 8],
        ["--dtype", "float32"],
    ):
        done = generate(requests, "--out", out, *words)
        assert done.returncode == 1
        assert "with other options" in done.stderr
    write(requests, {"prompt": "is there a circle?", "image": CIRCLE})
    done = generate(requests, "--out", out)
    assert done.returncode == 1
    assert "line 1" in done.stderr
    assert "an answer to another prompt" in done.stderr
    (tmp_path / "notes.txt").write_text("notes")
    done = generate(requests, "--out", tmp_path / "notes.txt")
    assert "is not a file of answers" in done.stderr
    assert (out.read_bytes(), (tmp_path / "notes.txt").read_text()) == (whole, "notes")


def test_a_file_that_another_process_writes_is_refused_before_a_model_is_loaded(tmp_path):
    requests = write(tmp_path / "rows.jsonl", {"prompt": ASK, "image": CIRCLE})
    (tmp_path / "model").mkdir()
    shutil.copy(ASSETS / "mini-blip2-opt" / "config.json", tmp_path / "model")  # and no weights
    with (tmp_path / "answers.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = catp_jax(
            *("generate", tmp_path / "model", "--batch", requests),
            *("--out", tmp_path / "answers.jsonl"),
        )
    assert done.returncode == 1
    assert "another process is writing" in done.stderr


def test_a_row_without_finite_logits_is_told_and_the_others_are_answered(monkeypatch):
    model = load(shallow("mini-blip2-opt"))
    asked = [Request(ASK, (CIRCLE,), number, line) for number, line in enumerate((4, 6, 8))]
    begun = model.begin
    batches = []

    def begin(self, packed, **options):
        """As if the second prompt of the first batch made no numbers."""
        batches.append(options["seed"])
        return fails if len(batches) == 1 else begun(packed, **options)

    def fails():
        raise NonFinite([1])

    monkeypatch.setattr(type(model), "begin", begin)
    found = [*answer(model, asked, batch_size=3)]
    problem, *answered = found
    assert isinstance(problem, Problem)
    assert problem.line == 6
    assert "not finite" in problem.message
    assert "prompt 1" not in problem.message
    assert [(one.request.line, one.text) for one in answered] == [
        (4, "red"),
        (8, "red"),
    ]  # a shallow model
    assert batches == [(0, 1, 2), (0, 2, 0)]


def test_out_is_for_a_file_of_requests():
    done = catp_jax(
        "generate", ASSETS / "mini-blip2-opt", "--prompt", "a", "--out", "answers.jsonl"
    )
    assert done.returncode == 2
    assert "--batch" in done.stderr


@pytest.fixture(scope="module")
def mini():
    return load(shallow("mini-blip2-opt"))


TWO = [Request(ASK, (CIRCLE,)), Request(ASK, (CIRCLE,), 1, begun=" it is")]


def test_options_of_the_checkpoint_count(mini):
    defaults = Options(max_new_tokens=2, num_return_sequences=1)
    model = dataclasses.replace(mini, defaults=defaults)
    found = [row.as_row() for row in answer(model, TWO, batch_size=2)]
    assert max(len(row["tokens"]) for row in found) == 2
    assert "begun" not in found[0]
    assert found[1]["begun"] == " it is"


def test_several_answers_to_a_request_are_those_that_it_gets_alone(mini):
    several = {"temperature": 9.0, "num_return_sequences": 2, "max_new_tokens": 4, "logprobs": 1}
    requests = [*TWO, dataclasses.replace(TWO[0], number=2)]
    found = list(answer(mini, requests, batch_size=2, options=Options(**several, seed=5)))
    for number, one in enumerate(found):
        begun = [requests[number].begun]
        alone = mini.generate([CIRCLE], [ASK], seed=5 + 2 * number, begun=begun, **several)
        row = one.as_row()
        assert (row["text"], row["tokens"]) == (alone.text, alone.tokens)
        ours, theirs = (np.concatenate(some) for some in (row["logprobs"], alone.logprobs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert [len(places) for places in row["alternatives"]] == [4, 4]
    assert found[0].texts != found[2].texts
    with pytest.raises(ValueError, match="seeds lie between"):
        next(answer(mini, requests, options=Options(**several, seed=2**32 - 5)))


def test_the_best_answers_of_a_beam_search_are_the_requests_own(mini):
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    for one in answer(mini, TWO, batch_size=3, options=Options(**beams)):
        begun = [one.request.begun]
        assert one.texts == mini.generate([CIRCLE], [ASK], begun=begun, **beams).text
