"""Text that others wrote, made safe to show: a terminal obeys escape sequences, wherever they are.

Names of files and tensors, messages about them, answers of a model: all may hold such sequences.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.text import Text

UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of writing
    "\u2028\u2029\ud800-\udfff]"  # other ends of lines; halves of characters
)


def printable(text: object) -> str:
    """The text with every character that steers a terminal written out, as Python would: \\x1b."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """The same for a name, which has no lines."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def as_text(value: object) -> Text:
    """A name as rich takes it: without escape sequences, and markup in it is text."""
    return Text(one_line(value))


@contextmanager
def without_advice() -> Iterator[None]:
    """Inside, transformers does not advise to install PyTorch, which nothing here needs."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def say(line: object) -> None:
    """A message of the command, on stderr."""
    print(f"catp-jax: {printable(line)}", file=sys.stderr)
