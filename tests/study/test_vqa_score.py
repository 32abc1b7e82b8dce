"""VQAv2's official score on cases worked by hand, rule by rule."""

import pytest

from catp_jax.study.vqa_score import CONTRACTIONS, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # articles, as words only
        ("the cat", "cat"),
        ("A cat on an apple", "cat on apple"),
        ("theater", "theater"),
        ("the", ""),
        # number words, "none" among them, as words only
        ("two dogs", "2 dogs"),
        ("Ten", "10"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        # contractions get their apostrophe back; one too many stays away
        ("dont know", "don't know"),
        ("Isnt", "isn't"),
        ("oclock", "o'clock"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("don't", "don't"),
        ("ill", "ill"),
        ("somebody'd", "somebodyd"),
        # case and space
        ("  Red   Ball ", "red ball"),
        # punctuation becomes a space, or goes where it touches one
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red, blue", "red blue"),
        ("black-and-white", "black and white"),
        ("well-known - not", "wellknown not"),
        ("yes!", "yes"),
        ("what?now", "what now"),
        ("it's 5:30", "it's 5:30"),
        # a comma between digits: all punctuation goes without leaving a space
        ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"),
        # a period goes unless a digit follows
        ("yes.", "yes"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("3.", "3"),
        ("u.s.a", "usa"),
        ("." * 32 + "a.b", "a.b"),
        ("." * 31 + "b.c", "bc"),
        # rules in their order: punctuation, digits, articles, contractions
        ("The one, the only!", "1 only"),
    ],
)
def test_answers_are_normalised(answer, expected):
    assert normalise(answer) == expected


def test_every_contraction_lacks_one_apostrophe_of_what_it_stands_for():
    assert len(CONTRACTIONS) == 114  # the official table's 120, less two that change nothing and
    # four in capitals, which no answer in lower case can meet
    odd = {form for form, word in CONTRACTIONS.items() if len(form) != len(word) - 1}
    assert odd == {"somebody'd"}  # the official table turns this one around


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_score_grows_with_how_many_people_agree(same, expected):
    answers = ["red"] * same + ["blue", "green", "grey"] + ["black"] * (7 - same)
    assert vqa_accuracy("red", answers) == pytest.approx(expected)


def test_ties_score_alike():
    answers = ["red"] * 5 + ["blue"] * 5
    assert vqa_accuracy("red", answers) == vqa_accuracy("blue", answers) == 1.0
    answers = ["red"] * 2 + ["blue"] * 2 + list("abcdef")
    assert vqa_accuracy("red", answers) == pytest.approx(0.6)


def test_where_people_differ_both_sides_are_normalised():
    answers = ["two"] * 3 + ["2"] * 3 + ["The 2!"] * 3 + ["3"]
    assert vqa_accuracy("Two.", answers) == 1.0


def test_where_all_people_agree_nothing_is_normalised_but_space():
    assert vqa_accuracy("yes", ["yes"] * 10) == 1.0
    assert vqa_accuracy("\tyes\n", ["yes "] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("yes!", ["yes"] * 10) == 0.0
    assert vqa_accuracy("the sign", ["the sign"] * 10) == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_line_breaks_within_an_answer_are_spaces():
    assert vqa_accuracy("red\nball", ["red\tball"] * 10) == 1.0
