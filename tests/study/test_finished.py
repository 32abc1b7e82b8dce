"""What may stand in one report: the same questions, asked with the same versions."""

import dataclasses

import pytest

from catp_jax.study.finished import check_comparable, read_studies
from catp_jax.study.journal import Journal
from catp_jax.study.records import Conditions, Data, Setting
from catp_jax.study.report import write_report
from catp_jax.study.sweep import sweep
from tests.study.answerer import Tiny, examples

CONDITIONS = Conditions(task="tiny", source={"split": "test"})


def write(path, model=None, name="one", conditions=CONDITIONS, number=4):
    journal = Journal(path)
    settings = [Setting("l2", 2)]
    list(sweep(model or Tiny(), examples(number), settings, conditions, journal=journal, name=name))
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write(tmp_path_factory.mktemp("runs") / "one.jsonl")


def test_several_models_and_ways_to_ask_go_together(one, tmp_path):
    asked = dataclasses.replace(CONDITIONS, prompt="Q: {question}", batch=2, seed=1)
    other = write(tmp_path / "other.jsonl", Tiny("another"), "other", asked)
    assert list(read_studies([one, other])) == ["one", "other"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "scenes"}, 'task: "tiny" → "scenes"'),
        ({"source": {"split": "validation"}}, 'source.split: "test" → "validation"'),
        ({"left_out": {"damaged": 2}}, "left_out.damaged: nothing → 2"),
    ],
)
def test_another_bed_is_refused_by_name(one, tmp_path, change, said):
    other = write(tmp_path / "b.jsonl", conditions=dataclasses.replace(CONDITIONS, **change))
    with pytest.raises(ValueError, match="do not belong in one report") as caught:
        write_report([one, other], tmp_path / "report")
    assert said in str(caught.value)
    assert str(one) in str(caught.value)
    assert str(other) in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_other_questions_are_refused(one, tmp_path):
    other = write(tmp_path / "b.jsonl", number=5)
    with pytest.raises(ValueError, match=r"data\.questions: 4 → 5; .*data\.digest"):
        read_studies([one, other])


def test_other_versions_are_refused(one, tmp_path):
    header = Journal(one).header
    newer = dataclasses.replace(header, name="b", versions={**header.versions, "jax": "99"})
    with pytest.raises(ValueError, match=r"b.jsonl .* versions.jax: \S+ → \"99\""):
        check_comparable({one: header, tmp_path / "b.jsonl": newer})


def test_another_model_of_the_same_name_is_refused(one, tmp_path):
    other = write(tmp_path / "b.jsonl", Tiny("retrained"))
    with pytest.raises(ValueError, match=r'model\.kind: "tiny" → "retrained"'):
        read_studies([one, other])


def test_every_file_is_compared_not_only_neighbours(one, tmp_path):
    header = Journal(one).header
    data = Data(header.data.questions, header.data.images, "0")
    headers = {
        one: header,
        tmp_path / "b": dataclasses.replace(header, name="b"),
        tmp_path / "c": dataclasses.replace(header, name="c", data=data),
    }
    with pytest.raises(ValueError, match="/c do not belong"):
        check_comparable(headers)
