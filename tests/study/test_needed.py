"""A study of a task that knows what its questions need: families, oracle, anti, differences."""

import dataclasses

import numpy as np
import pytest

from catp_jax.study.journal import Journal
from catp_jax.study.records import Answers, Conditions, Setting
from catp_jax.study.results import difference, estimates, families, interval, needed_kept
from catp_jax.study.sweep import sweep
from catp_jax.study.tables import difference_table, family_table
from tests.study.answerer import Tiny, examples

SETTINGS = [Setting("oracle", 2), Setting("anti", 2), Setting("random", 2), Setting("l2", 2)]
FAMILIES = ("odd", "even")


def knowing(number):
    """Questions that need tokens n and n + 1 of eight; of every fifth nobody knows."""
    out = []
    for n, example in enumerate(examples(number)):
        boxes = tuple(((n + k) % 8 / 8, 0.0, 1.0, 1.0) for k in (0, 1))
        family = FAMILIES[n % 2 == 0]
        needed = boxes if n % 5 else ()
        out.append(dataclasses.replace(example, family=family, needed=needed))
    return out


@pytest.fixture(scope="module")
def results():
    return list(sweep(Tiny(), knowing(20), SETTINGS, Conditions(batch=8)))


def test_oracle_keeps_what_each_question_needs_and_anti_none_of_it(results):
    _, oracle, anti, random, _ = results
    for n, (kept, dropped) in enumerate(zip(oracle.answers, anti.answers, strict=True)):
        if n % 5:
            assert {*kept.kept} == {n % 8, (n + 1) % 8}
            assert not {*dropped.kept} & {n % 8, (n + 1) % 8}
            assert (kept.needed, dropped.needed) == (1.0, 0.0)
        else:
            assert kept.needed is None
    assert needed_kept(oracle.answers) == 1.0
    assert needed_kept(anti.answers) == 0.0
    assert 0 < needed_kept(random.answers) < 1
    assert needed_kept(results[0].answers) == 1.0


def test_of_means_no_share_of_the_needed_tokens_is_told():
    (_, pooled) = sweep(Tiny(), knowing(6), [Setting("pool", 2)])
    assert [answer.kept for answer in pooled.answers] == [(1, 5)] * 6
    assert needed_kept(pooled.answers) is None


def test_answers_say_their_family_and_image_also_when_read_back(tmp_path):
    path = tmp_path / "sweep.jsonl"
    written = list(sweep(Tiny(), knowing(6), SETTINGS[:1], journal=Journal(path)))
    read = [one for row in Journal(path).all(Answers) for one in row.answers]
    assert read == [one for result in written for one in result.answers]
    assert [one.family for one in read[:3]] == ["even", "odd", "even"]
    assert [one.image for one in read[:4]] == [0, 0, 1, 1]


@pytest.mark.parametrize("method", ["oracle", "anti"])
def test_a_task_that_does_not_know_is_refused_before_anything_is_written(method, tmp_path):
    path = tmp_path / "sweep.jsonl"
    with pytest.raises(ValueError, match=f"{method} must know which visual tokens are needed"):
        list(sweep(Tiny(), examples(6), [Setting(method, 2)], journal=Journal(path)))
    assert not path.exists()


def test_differences_are_of_the_same_questions(results):
    unpruned, oracle, anti, *_ = results
    mean, low, high = difference(oracle.answers, anti.answers)
    scores = [np.mean([one.score for one in result.answers]) for result in (unpruned, oracle, anti)]
    assert mean == pytest.approx(scores[1] - scores[2])
    assert low <= mean <= high
    assert difference(oracle.answers, oracle.answers) == (0.0, 0.0, 0.0)
    images = [one.image for one in oracle.answers]
    gains = [a.score - b.score for a, b in zip(oracle.answers, anti.answers, strict=True)]
    assert (low, high) == interval(gains, images)


def test_tables_by_family_and_of_differences(results):
    figures = estimates(results)
    by_family = family_table(results, figures)
    assert by_family.head == ("method", "kept", "needed, kept", "even (10)", "odd (10)")
    assert len(by_family.lines) == len(results)
    assert by_family.lines[1][:3] == ("oracle", "2", "100.0% [100.0, 100.0]")
    assert by_family.lines[2][:3] == ("anti", "2", "0.0% [0.0, 0.0]")
    numbers = families(results[1].answers)["odd"]
    odd = np.mean([results[1].answers[number].score for number in numbers])
    assert by_family.lines[1][4].startswith(f"{odd:.1%} [")
    whole, chance = (difference_table(results, figures, other) for other in ("unpruned", "random"))
    assert whole.head == chance.head == ("method", "kept", "all", "even", "odd")
    assert [line[0] for line in whole.lines] == ["oracle", "anti", "random", "l2"]
    assert [line[0] for line in chance.lines] == ["oracle", "anti", "l2"]  # not against itself
    gains = [results[1].answers[n].score - results[0].answers[n].score for n in numbers]
    assert whole.lines[0][4].startswith(f"{100 * np.mean(gains):+.1f} [")
    assert all("[" in cell for line in (*whole.lines, *chance.lines) for cell in line[2:])


def test_a_task_without_families_has_no_such_table():
    plain = list(sweep(Tiny(), examples(6), [Setting("l2", 2)]))
    assert family_table(plain, estimates(plain)) is None
