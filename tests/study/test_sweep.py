"""A sweep's figures, on a small model; that it goes on where it was stopped."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from catp_jax.generation.options import Options
from catp_jax.pruning import Random
from catp_jax.study.batches import Answerer
from catp_jax.study.journal import Journal
from catp_jax.study.records import UNPRUNED, Answers, Conditions, Picture, Setting, SettingCost
from catp_jax.study.sweep import sweep
from catp_jax.study.tables import main_table
from catp_jax.targets import is_available
from tests.study.answerer import (
    POSITIONS,
    TOKENS,
    WORDS,
    Tiny,
    examples,
    visual_tokens,
    without_times,
)

SETTINGS = [Setting("position", 4), Setting("l2", "25%"), Setting("random", 2)]
CONDITIONS = Conditions(batch=3, seed=5, options=Options(max_new_tokens=2))
QUESTIONS = examples(8)


def run(path=None, settings=SETTINGS, conditions=CONDITIONS, questions=QUESTIONS, **options):
    journal = Journal(path) if path else None
    pictured = options.pop("pictured", (0, 4))
    model = options.pop("model", None) or Tiny()
    return list(
        sweep(model, questions, settings, conditions, journal=journal, pictured=pictured, **options)
    )


def softmax(logits):
    return [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]


def with_options(**options):
    changed = dataclasses.replace(CONDITIONS.options, **options)
    return dataclasses.replace(CONDITIONS, options=changed)


def oracle(chosen):
    """Answers and their first token's distribution, with these tokens of each question."""
    texts, shares = [], []
    for example, kept in zip(QUESTIONS, chosen, strict=True):
        logits = visual_tokens(example.image, example.question)[list(kept)].sum(axis=0)
        texts.append(WORDS[int(np.argmax(logits))])
        shares.append(softmax(logits.astype(float)))
    return texts, shares


def test_of_two_sweeps_on_one_file_one_goes_on_and_every_row_is_there_once(tmp_path):
    path = tmp_path / "sweep.jsonl"
    two = [Journal(path), Journal(path)]
    first, second = (
        sweep(Tiny(), QUESTIONS, SETTINGS, CONDITIONS, journal=journal) for journal in two
    )
    next(first)  # it is under way
    with pytest.raises(ValueError, match="another process is writing"):
        next(second)
    with pytest.raises(ValueError, match="another process is writing"):
        next(sweep(Tiny(), QUESTIONS, SETTINGS, CONDITIONS, journal=Journal(path)))
    list(first)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in rows].count("header") == 1
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_the_small_model_is_what_a_study_wants():
    assert isinstance(Tiny(), Answerer)


def test_figures_are_those_of_the_questions_asked():
    whole, first, longest, drawn = run()
    everything, reference = oracle([range(TOKENS)] * 8)
    norms = [np.linalg.norm(visual_tokens(e.image, e.question), axis=1) for e in QUESTIONS]
    chosen = [
        (first, [range(4)] * 8),
        (longest, [sorted(np.argsort(-norm)[:2].tolist()) for norm in norms]),
        (drawn, [answer.kept for answer in drawn.answers]),
    ]
    assert whole.setting == Setting(UNPRUNED, None)
    assert [answer.text for answer in whole.answers] == everything
    assert (whole.agreement, whole.kl, whole.visual_tokens) == (1.0, 0.0, 8.0)
    assert [answer.kept for answer in whole.answers] == [None] * 8
    assert whole.accuracy == 6 / 8  # two questions have an answer that cannot be given
    for result, kept in chosen:
        texts, shares = oracle(kept)
        assert [answer.text for answer in result.answers] == texts
        assert [answer.kept for answer in result.answers] == [tuple(own) for own in kept]
        right = [text == e.answer for text, e in zip(texts, QUESTIONS, strict=True)]
        assert result.accuracy == pytest.approx(np.mean(right))
        assert [answer.score for answer in result.answers] == [float(one) for one in right]
        same = [a == b for a, b in zip(texts, everything, strict=True)]
        assert result.agreement == pytest.approx(np.mean(same))
        kl = [
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            for p, q in zip(reference, shares, strict=True)
        ]
        assert result.kl == pytest.approx(np.mean(kl), rel=1e-4)
        assert result.low <= result.accuracy <= result.high
        assert (result.questions, result.images, result.seed) == (8, 4, 5)


def test_costs_are_of_one_question():
    whole, first, longest, _ = run(is_timed=True)
    # four numbers of four bytes a slot, two slots for new tokens, and a count
    assert [r.cost.cache_bytes for r in (whole, first, longest)] == [
        4 * 4 * (kept + 2) + 4 for kept in (8, 4, 2)
    ]
    for result in (whole, first):
        assert result.cost.prefill_flops > 0
        assert min(result.cost.prefill_ms, result.cost.token_ms, result.milliseconds) > 0
    assert first.pruners == ({"class": "Position", "site": "ENTRY", "keep": 4},)
    assert whole.pruners == ()
    assert {"jax", "python", "catp-jax"} <= set(first.versions)


def test_beams_share_the_cache_of_their_prompt():
    one, many = (run(settings=[], conditions=with_options(num_beams=n)) for n in (1, 5))
    # each beam has a count of its own
    assert many[0].cost.cache_bytes == one[0].cost.cache_bytes + 4 * 4


def test_generation_that_does_not_fit_leaves_no_file(tmp_path):
    conditions = with_options(max_new_tokens=POSITIONS + 1)
    with pytest.raises(ValueError, match="questions 'id-0' to 'id-2': 51 new tokens do not fit"):
        run(tmp_path / "x.jsonl", conditions=conditions)
    assert not (tmp_path / "x.jsonl").exists()


def test_a_question_that_cannot_be_used_is_named_with_its_image():
    class Picky(Tiny):
        def prepare(self, images, prompts, begun):
            if "question 4?" in prompts:
                raise ValueError("prompt 1: cut off")
            return super().prepare(images, prompts, begun)

    with pytest.raises(ValueError, match=r"question 'id-4' about 'image-2.png': .*cut off"):
        run(model=Picky())


def test_nothing_is_timed_unless_it_is_asked_for():
    whole, *_ = run()
    assert whole.cost.cache_bytes == 4 * 4 * 10 + 4
    assert whole.cost.prefill_flops > 0
    assert (whole.cost.prefill_ms, whole.cost.token_ms, whole.milliseconds) == (None, None, None)


def test_times_can_be_asked_for_later(tmp_path):
    run(tmp_path / "x.jsonl", settings=SETTINGS[:1])
    later = run(tmp_path / "x.jsonl", settings=SETTINGS[:2], is_timed=True)
    assert all(result.cost.token_ms > 0 for result in later[2:])
    costs = Journal(tmp_path / "x.jsonl").all(SettingCost)
    assert [one.cost.prefill_ms is not None for one in costs] == [False, False, True, True, True]


@pytest.mark.skipif(not is_available(), reason="JAX's compiler for GPUs is not installed")
def test_what_a_gpu_would_move_can_be_asked_for_later(tmp_path):
    path = tmp_path / "x.jsonl"
    timed = run(path, settings=SETTINGS[:1], is_timed=True)
    assert all(result.cost.gpu is None for result in timed)
    later = run(path, settings=SETTINGS[:2], gpu="h100")
    whole, *pruned = (result.cost for result in later)
    assert whole.prefill_ms == timed[0].cost.prefill_ms  # what was known stays
    for cost in pruned:
        assert cost.gpu.name == "h100"
        assert cost.gpu.prefill_bytes > 0
        # a step reads a cache with fewer tokens
        assert 0 < cost.gpu.token_bytes < whole.gpu.token_bytes
    assert len(Journal(path).all(SettingCost)) == 2 + 3
    table = main_table(later, [])
    assert "token moved, H100" in table.head


def test_images_are_encoded_once_a_batch_whatever_the_settings():
    model = Tiny()
    run(model=model, settings=SETTINGS)
    first, *rest = model.encodings  # the first batch once more, to see that all settings run
    assert rest[0] == first
    assert len(rest) == len({tuple(prompts) for prompts in rest}) == 3


def test_every_batch_has_one_shape_and_a_lone_one_keeps_its_own():
    model = Tiny()
    run(model=model)
    assert {len(prompts) for prompts, _ in model.batches} == {3}
    model = Tiny()
    run(model=model, questions=QUESTIONS[:2], pictured=())
    assert {len(prompts) for prompts, _ in model.batches} == {2}


def test_the_model_is_asked_by_the_prompt():
    model = Tiny()
    conditions = dataclasses.replace(CONDITIONS, prompt="Question: {question} Short answer:")
    run(model=model, conditions=conditions)
    assert model.batches[0][0][0] == "Question: question 0? Short answer:"


def test_random_methods_draw_anew_for_each_question_and_seed():
    methods = [f"random:seed={seed}" for seed in range(4)]
    model = Tiny()
    drawn = run(model=model, settings=[Setting(method, 2) for method in methods])[1:]
    assert all(isinstance(p[0], Random) for _, p in model.batches if p)
    seeds = [seed for _, p in model.batches if p for seed in p[0].seed.tolist()]
    # eight questions and one that fills the last batch up: no question has another's draw
    assert len({*seeds}) == len(methods) * 9
    for some in itertools.combinations([result.answers for result in drawn], 2):
        assert [one.kept for one in some[0]] != [one.kept for one in some[1]]


def test_draws_do_not_depend_on_batches():
    settings = [Setting("random:seed=3", 2)]
    whole = run(settings=settings, conditions=dataclasses.replace(CONDITIONS, batch=8))[1]
    cut = run(settings=settings)[1]
    assert [one.kept for one in whole.answers] == [one.kept for one in cut.answers]


def test_seeds_of_a_method_are_one_program():
    heard = []
    settings = [Setting(f"random:seed={seed}", 2) for seed in range(4)]
    run(settings=settings, report=heard.append)
    assert [doing for doing in heard if "compiling" in doing] == ["compiling 2 programs"]


def test_every_shape_runs_once_before_it_is_timed():
    class TwoShapes(Tiny):
        def prepare(self, images, prompts, begun):
            packed = super().prepare(images, prompts, begun)
            if "question 6?" in prompts:
                packed.inputs = packed.inputs[:, :6]
                packed.available = (6,) * len(prompts)
            return packed

    model = TwoShapes()
    run(model=model, settings=[Setting("position", 4)], pictured=())
    calls = [(prompts[0][9], bool(pruners)) for prompts, pruners in model.batches]
    assert sorted(calls[:2]) == [("0", False), ("0", True)]
    assert calls[2:6] == [("0", False), ("0", True), ("3", False), ("3", True)]
    assert sorted(calls[6:8]) == [("6", False), ("6", True)]
    assert calls[8:] == [("6", False), ("6", True)]


def test_maps_and_pictures_are_of_the_questions_wanted(tmp_path):
    whole, first, *_ = run(tmp_path / "x.jsonl")
    assert whole.maps == {}
    assert set(first.maps) == {0, 4}
    np.testing.assert_array_equal(first.maps[4], [[1, 1, 1, 1], [0, 0, 0, 0]])
    pictures = Journal(tmp_path / "x.jsonl").all(Picture)
    assert [(picture.number, picture.question) for picture in pictures] == [
        (0, "question 0?"),
        (4, "question 4?"),
    ]


def test_progress_counts_answers():
    told = []
    run(progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 32)
    assert told[-1] == (32, 32)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_sweep_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path):
    path = tmp_path / "sweep.jsonl"
    results = run(path)
    whole = path.read_bytes()
    records = without_times(Journal(path).records)
    lines = whole.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    for number, end in enumerate(ends):
        path.write_bytes(whole[: end - len(lines[number]) // 2])  # in the middle of a line
        again = run(path)
        assert without_times(Journal(path).records) == records
        assert without_times(again) == without_times(results)
        assert path.read_bytes().startswith(whole[: end - len(lines[number])])


def test_a_finished_sweep_asks_nothing_again(tmp_path):
    results, model = run(tmp_path / "x.jsonl"), Tiny()
    before = (tmp_path / "x.jsonl").read_bytes()
    again = run(tmp_path / "x.jsonl", model=model)
    assert model.batches == []
    assert [r.figures() for r in again] == [r.figures() for r in results]
    assert (tmp_path / "x.jsonl").read_bytes() == before


def test_a_kill_costs_at_most_one_batch_under_one_setting(tmp_path):
    class Killed(Exception):
        pass

    class Mortal(Tiny):
        def generate_packed(self, packed, pruners, **options):
            if len(self.batches) == 9:
                raise Killed
            return super().generate_packed(packed, pruners, **options)

    path = tmp_path / "x.jsonl"
    with pytest.raises(Killed):
        run(path, model=Mortal())
    assert len(Journal(path).all(Answers)) == 5  # nine calls, four to warm up
    model = Tiny()
    run(path, model=model)
    # warming up and answering what batch 1 lacks and, for its logits, unpruned; then batch 2
    assert len(model.batches) == 4 + 4 + 4


def test_methods_and_budgets_can_be_added(tmp_path):
    path = tmp_path / "x.jsonl"
    run(path, settings=SETTINGS[:1])
    before = path.read_bytes()
    model = Tiny()
    added = run(path, settings=[Setting("position", 2), *SETTINGS], model=model)
    assert path.read_bytes().startswith(before)
    fresh = run(settings=[Setting("position", 2), *SETTINGS])
    assert without_times(added) == without_times(fresh)
    asked = {type(p[0]).__name__ + str(p[0].keep) for _, p in model.batches if p}
    assert asked == {"Position2", "L2Norm2", "Random2"}


def test_settings_named_twice_are_answered_once():
    assert len(run(settings=[*SETTINGS, *SETTINGS, Setting(UNPRUNED, None)])) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conditions": dataclasses.replace(CONDITIONS, batch=4)}, "conditions.batch: 3 → 4"),
        ({"conditions": dataclasses.replace(CONDITIONS, seed=6)}, "conditions.seed: 5 → 6"),
        (
            {"conditions": with_options(num_beams=5)},
            "conditions.options.num_beams: 1 → 5",
        ),
        (
            {"conditions": dataclasses.replace(CONDITIONS, prompt="Q: {question}")},
            'conditions.prompt: "{question}" → "Q: {question}"',
        ),
        ({"questions": QUESTIONS[:7]}, "data.questions: 8 → 7"),
        ({"questions": QUESTIONS[::-1]}, "data.digest"),
        ({"model": Tiny("other")}, 'model.kind: "tiny" → "other"'),
    ],
)
def test_another_sweeps_file_is_refused_with_the_difference(tmp_path, change, said):
    path = tmp_path / "x.jsonl"
    run(path, settings=SETTINGS[:1])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another sweep") as refusal:
        run(path, **change)
    assert said in str(refusal.value)
    assert path.read_bytes() == before


def test_a_budget_past_what_there_is_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="position: keep is 9, but there are only 8") as refusal:
        run(tmp_path / "x.jsonl", settings=[Setting("position", 9)])
    assert "give 1 to 8" in str(refusal.value)
    assert not (tmp_path / "x.jsonl").exists()


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="at least one question"):
        run(questions=[])


def test_the_file_is_json_lines_with_the_figures(tmp_path):
    results = run(tmp_path / "x.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert rows[0]["row"] == "header"
    figures = [row for row in rows if row["row"] == "result"]
    assert [row["accuracy"] for row in figures] == [r.accuracy for r in results]
    kept = [[one["kept"] for one in row["answers"]] for row in rows if row["row"] == "answers"]
    assert kept[1] == [[0, 1, 2, 3]] * 3


def test_methods_that_follow_each_other_each_keep_their_budget():
    both = run(settings=[Setting("l2,position", "50%,2")])[1]
    for example, answer in zip(QUESTIONS, both.answers, strict=True):
        norms = np.linalg.norm(visual_tokens(example.image, example.question), axis=1)
        assert answer.kept == tuple(sorted(np.argsort(-norms)[:4].tolist())[:2])
    assert [pruner["class"] for pruner in both.pruners] == ["L2Norm", "Position"]
    assert [pruner["keep"] for pruner in both.pruners] == ["50%", "2"]


def test_answers_are_drawn_with_the_seed_and_the_questions_number():
    class Seeded(Tiny):
        seeds = ()

        def generate_packed(self, packed, pruners, **options):
            self.seeds += (options["seed"],)
            return super().generate_packed(packed, pruners, **options)

    model = Seeded()
    run(model=model, settings=[], conditions=with_options(temperature=0.5), pictured=())
    assert model.seeds[-3:] == ((5, 6, 7), (8, 9, 10), (11, 12, 13))


def test_prompts_may_be_chats_and_answers_begun():
    class Chats(Tiny):
        def prepare(self, images, prompts, begun):
            assert begun == ["It is"] * len(prompts)
            texts = []
            for (message,) in prompts:
                image, text = message["content"]
                assert (message["role"], image) == ("user", {"type": "image"})
                texts.append(text["text"])
            return super().prepare(images, texts, begun)

    conditions = dataclasses.replace(CONDITIONS, is_chat=True, begun="It is")
    assert [r.accuracy for r in run(model=Chats(), conditions=conditions)] == [
        r.accuracy for r in run()
    ]


def test_a_smaller_image_is_a_setting_of_its_own_with_its_own_tokens_and_bytes(tmp_path):
    settings = [Setting("image_scale", "0.5"), Setting("tiles", "1"), Setting("l2", 4)]
    path = tmp_path / "sweep.jsonl"
    model = Tiny()
    whole, half, one, pruned = sweep(
        model, examples(6), settings, Conditions(batch=4), journal=Journal(path)
    )
    assert [r.visual_tokens for r in (whole, half, one, pruned)] == [8, 4, 2, 4]
    assert whole.cost.cache_bytes > half.cost.cache_bytes > one.cost.cache_bytes
    assert half.cost.cache_bytes == pruned.cost.cache_bytes
    assert half.pruners == ()
    for answer, example in zip(half.answers, examples(6), strict=True):
        votes = visual_tokens(example.image, example.question)[:4].sum(axis=0)
        assert answer.text == WORDS[int(votes.argmax())]
        assert (answer.kept, answer.available, answer.needed) == (None, 4, None)
    assert half.kl > 0
    # each batch is encoded once for all that see it alike
    assert len(model.encodings) == 2 * 3 + 3
    again = Tiny()
    assert list(sweep(again, examples(6), settings, Conditions(batch=4), journal=Journal(path)))
    assert again.encodings == []
