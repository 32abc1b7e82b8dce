"""Texts that end an answer, as a machine that reads tokens: it runs inside the compiled loop.

A state is how much of a stop string the text ends with (Aho and Corasick, "Efficient String
Matching", 1975, by bytes); a token leads from each state to another. Wherever token borders lie,
and with characters behind it, a string is noticed with the token that completes it, as in
transformers' `StopStringCriteria`. The prompt is not part of the text.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def machine(strings: Sequence[str], tokens: Sequence[bytes]) -> Int[np.ndarray, "states vocab"]:
    """`table[state, token]` is the next state. It begins with state 0; the last state says that one
    of `strings`, which are not empty, has been written, and never goes on to another.

    The number of states is a power of two, so that other strings seldom compile anew.
    """
    by_byte = _by_byte([string.encode() for string in strings])
    states = by_byte.shape[0]
    lengths = np.asarray([len(token) for token in tokens])
    longest = int(lengths.max(initial=0))
    letters = np.zeros((len(tokens), longest), np.uint8)
    for number, token in enumerate(tokens):
        letters[number, : len(token)] = np.frombuffer(token, np.uint8)
    table = np.broadcast_to(np.arange(states, dtype=np.int32)[:, None], (states, len(tokens)))
    table = table.copy()
    for place in range(longest):
        (going,) = np.nonzero(lengths > place)
        table[:, going] = by_byte[table[:, going], letters[going, place]]
    return table


def _by_byte(strings: Sequence[bytes]) -> Int[np.ndarray, "states 256"]:
    """The machine for single bytes."""
    prefixes = sorted({string[:size] for string in strings for size in range(len(string))})
    room = 2 ** len(prefixes).bit_length()
    number = {prefix: place for place, prefix in enumerate(prefixes)}  # b"" comes first
    table = np.zeros((room, 256), np.int32)
    for prefix, place in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if any(text.endswith(string) for string in strings):
                table[place, byte] = room - 1
                continue
            while text not in number:
                text = text[1:]
            table[place, byte] = number[text]
    table[room - 1] = room - 1
    return table
