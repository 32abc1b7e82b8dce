"""catp_jax.terminal: nothing that is shown steers the terminal."""

import unicodedata

import pytest

from catp_jax.terminal import one_line, printable

STEERING = {
    "colour": "\x1b[31mred\x1b[0m",
    "window title": "\x1b]0;mine\x07",
    "one-byte escape": "\x9b31m",
    "overwritten": "good\rbad",
    "erased": "bad\x08\x08\x08",
    "turned": "abc\u202edef",
    "half a character": "\ud800",
    "a byte that is no UTF-8": "\udcff",
}


@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_what_steers_a_terminal_is_written_out(text: str):
    shown = printable(text)
    assert {unicodedata.category(c) for c in shown}.isdisjoint({"Cc", "Cf", "Cs"})
    assert shown.encode("ascii").decode("unicode_escape") == text
    assert printable(shown) == shown


def test_other_text_stays():
    text = "one\n\ttwo: café, 画像, [b], \\x1b"
    assert printable(text) == text
    assert one_line(text) == text.replace("\n", "\\n").replace("\t", "\\t")
