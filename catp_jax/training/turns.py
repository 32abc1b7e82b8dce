"""A row of text as training sees it: words, what is to be said after them, more words …"""

from collections.abc import Callable, Sequence

Turn = tuple[str, str]
"""Words, and what is to be said after them."""


def line(
    turns: Sequence[Turn],
    prompt: Callable[[str], list[int]],
    words: Callable[[str], list[int]],
    reply: Callable[[str], list[int]],
    end: int,
    length: int,
) -> tuple[list[int], list[int]]:
    """The tokens of as many turns as there is room for, and what each should be followed by (-1:
    anything). `prompt` gives the tokens of the first turn's words, `words` those of the others. The
    end comes after a question, which is a single turn: where a list stops means nothing.

    Raises ValueError if not even the first turn fits.
    """
    tokens: list[int] = []
    said: list[bool] = []
    for number, (asked, answer) in enumerate(turns):
        before = words(asked) if number else prompt(asked)
        after = reply(answer)
        if (needed := len(tokens) + len(before) + len(after) + (len(turns) == 1)) > length:
            if number:
                break
            text = f"{asked} {answer}".strip()
            raise ValueError(f"{text!r} takes {needed} tokens of {length}")
        tokens += before + after
        said += [False] * len(before) + [True] * len(after)
    if len(turns) == 1:
        tokens, said = [*tokens, end], [*said, True]
    targets = [token if is_said else -1 for token, is_said in zip(tokens, said, strict=True)]
    return tokens, [*targets[1:], -1]
