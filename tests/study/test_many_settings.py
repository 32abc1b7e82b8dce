"""A sweep of more settings than have their programs in memory together."""

import pytest

from catp_jax.generation import generate as programs
from catp_jax.generation.options import Options
from catp_jax.study import sweep as sweeps
from catp_jax.study.journal import Journal
from catp_jax.study.records import Answers, Conditions, Setting
from tests.study.answerer import Tiny, examples, without_times

CONDITIONS = Conditions(batch=3, seed=5, options=Options(max_new_tokens=2))
SETTINGS = [Setting("position", keep) for keep in (1, 2, 3, 4)] + [Setting("random", 2)]
QUESTIONS = examples(8)


def run(path, settings=SETTINGS, model=None, **options):
    journal = Journal(path)
    return list(
        sweeps.sweep(model or Tiny(), QUESTIONS, settings, CONDITIONS, journal=journal, **options)
    )


class Remembering(Tiny):
    """How many prefills are compiled after each batch."""

    def __init__(self):
        super().__init__()
        self.compiled = []

    def generate_packed(self, packed, pruners, **options):
        out = super().generate_packed(packed, pruners, **options)
        self.compiled.append(programs.prefill._cache_size())
        return out


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sweeps, "AT_ONCE", 2)
    programs.prefill.clear_cache()


def test_results_are_those_of_all_together(tmp_path, monkeypatch):
    together, told = run(tmp_path / "together.jsonl"), []
    monkeypatch.setattr(sweeps, "AT_ONCE", 2)
    apart = run(tmp_path / "apart.jsonl", progress=lambda *counts: told.append(counts))
    assert without_times(apart) == without_times(together)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert (told[0], told[-1]) == ((0, 48), (48, 48))


def test_few_programs_are_in_memory_together(tmp_path, few):
    model = Remembering()
    run(tmp_path / "x.jsonl", model=model)
    assert max(model.compiled) == 3  # two settings, and the unpruned model


def test_it_resumes_in_the_middle(tmp_path, few):
    whole, path = run(tmp_path / "whole.jsonl"), tmp_path / "x.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for number in (1, 4, len(lines) // 2, len(lines) - 2):
        path.write_bytes(b"".join(lines[:number]))
        again = run(path)
        assert without_times(again) == without_times(whole)
        answers = [(one.setting, one.batch) for one in Journal(path).all(Answers)]
        assert len(answers) == len({*answers}) == 6 * 3


def test_a_budget_past_what_there_is_is_refused_before_anything_is_asked(tmp_path, few):
    model, path = Tiny(), tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="9"):
        run(path, [*SETTINGS, Setting("l2", 9)], model)
    assert (model.batches, path.exists()) == ([], False)
