"""VQAv2's official score: how far an answer agrees with ten people's.

After the evaluation code of the VQA challenge (GT-Vision-Lab/VQA, PythonEvaluationTools,
vqaEval.py), rule by rule, its oddities included, so that figures compare with published ones:

- If all ten people gave the same answer, nothing is normalised on either side, not even case:
  "yes!" does not match ten times "yes" (issue 14 there confirms that this is meant). Otherwise both
  sides are normalised. Older versions normalised the prediction always, and of people's answers
  only the punctuation.
- Punctuation is dropped where it touches a space anywhere in the answer, or where a comma stands
  between digits anywhere in it; otherwise it becomes a space: "red/blue" is "red blue".
- A period is dropped unless a digit follows: "3." is "3", "3.5" stays, and so does ".5".
- Number words up to ten become digits, "none" becomes "0", articles go, and a contraction gets its
  lost apostrophe back: "dont" is "don't".
"""

import re
from collections.abc import Sequence
from itertools import chain

PEOPLE = 10  # who answered each question
ENOUGH = 3  # of the nine others, for a full score

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # the most that the official code takes out: it passes a flag where a count belongs
COMMA_IN_NUMBER = re.compile(r"\d,\d")

COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED)}

ARTICLES = {"a", "an", "the"}

# The official table, by what it makes: each word stands for all its forms that lack one apostrophe.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _contractions() -> dict[str, str]:
    """Each form that lacks an apostrophe, and what it stands for."""
    forms = {"somebody'd": "somebodyd"}  # the one entry that runs the other way
    for word in CONTRACTED.split():
        for place, letter in enumerate(word):
            if letter == "'":
                forms[word[:place] + word[place + 1 :]] = word
    return forms


CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """An answer as it is compared: "The red, round ball." is "red round ball"."""
    has_number = COMMA_IN_NUMBER.search(answer) is not None
    out = answer
    for mark in PUNCTUATION:
        touches_space = f"{mark} " in answer or f" {mark}" in answer
        out = out.replace(mark, "" if touches_space or has_number else " ")
    words = PERIOD.sub("", out, count=PERIODS).lower().split()
    words = [DIGITS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean over the people of min(how many of the *others* said the same / 3, 1).

    Of ten people: said by one 0.3, by two 0.6, by three 0.9, by four or more 1.0.
    """
    answer, *others = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in chain([prediction], answers)
    )
    if len(set(others)) > 1:
        answer, others = normalise(answer), [normalise(other) for other in others]
    same = others.count(answer)
    scores = [min((same - (other == answer)) / ENOUGH, 1.0) for other in others]
    return sum(scores) / len(scores)
