"""From tokens to text: what each token writes, in bytes, and text in pieces as tokens come."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from catp_jax.generation.stop_strings import machine


@lru_cache(maxsize=8)
def stop_machine(tokenizer: Any, size: int, strings: tuple[str, ...]) -> np.ndarray:
    """What finds `strings` in the tokens of a model that has so many, see `stop_strings`."""
    return machine(strings, token_bytes(tokenizer, size))


def spellings(tokenizer: Any, word: str) -> list[list[int]]:
    """The tokens of a word wherever it may stand: first in a text, after a space, within a word."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = [tokens(word), tokens(f" {word}")]
    # a tokenizer that begins every text with a space shows the bare word behind another sign alone
    sign, behind = tokens(","), tokens(f",{word}")
    if behind[: len(sign)] == sign:
        found.append(behind[len(sign) :])
    return [one for place, one in enumerate(found) if one and one not in found[:place]]


def unknown_words(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """The words of texts that a tokenizer has no tokens for."""
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    if not words:
        return []
    rows = tokenizer(words, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    return [w for w, row in zip(words, rows, strict=True) if unknown in row or not len(row)]


def texts_of(tokenizer: Any, answers: Sequence[Sequence[int]], begun: Sequence[str]) -> list[str]:
    """The texts of answers, without special tokens; stripped, but where it goes on from what was
    `begun`, whose space it needs.
    """
    return [_Text(tokenizer, text)(tokens) for tokens, text in zip(answers, begun, strict=True)]


def pieces(tokenizer: Any, tokens: Iterable[int], begun: str = "") -> Iterator[str]:
    """What `texts_of` gives for one answer, in pieces as its tokens come."""
    text_of = _Text(tokenizer, begun)
    written: list[int] = []
    text = shown = ""
    for token in tokens:
        written.append(token)
        text = text_of(written)
        settled = _settled(text, tokenizer)
        if len(settled) > len(shown):
            yield settled[len(shown) :]
            shown = settled
    if len(text) > len(shown):
        yield text[len(shown) :]


class _Text:
    """Tokens to text, behind a text that was begun: some tokenizers write the first token of a text
    without its space.
    """

    def __init__(self, tokenizer: Any, begun: str):
        self.tokenizer, self.begun = tokenizer, begun
        self.before = tokenizer(begun, add_special_tokens=False)["input_ids"] if begun else []
        self.skipped = len(self._decode(self.before)) if begun else 0

    def __call__(self, tokens: Sequence[int]) -> str:
        text = self._decode([*self.before, *tokens])[self.skipped :].rstrip()
        return text if self.begun else text.lstrip()

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _settled(text: str, tokenizer: Any) -> str:
    """What no later token changes: not the beginning of a character, which is shown as U+FFFD,
    nor space in the end, which is stripped if nothing follows.
    """
    text = text.rstrip("\ufffd")
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        # takes the space out of " .", " n't" and the like
        space = text.find(" ", max(len(text) - 4, 0))
        text = text if space < 0 else text[:space]
    return text.rstrip()


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """What tokens 0 to `size` write, special ones their names, unknown ones nothing.

    Byte-level vocabularies spell each byte as a character, the others a space as "▁" and bytes that
    are no character of theirs as <0xNN>.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    kinds = set() if decoder is None else set(_kinds(json.loads(decoder.__getstate__())))
    is_byte_level = "ByteLevel" in kinds
    added = tokenizer.get_added_vocab()
    found = [b""] * size
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            continue
        if token in added:
            found[number] = token.encode()
        elif is_byte_level and all(letter in BYTES for letter in token):
            found[number] = bytes(BYTES[letter] for letter in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[number] = bytes([int(token[3:5], 16)])
        else:
            found[number] = token.replace("▁", " ").encode()
    return found


def _kinds(decoder: Any) -> list[str]:
    """The types of a decoder and of those that it is made of."""
    if not isinstance(decoder, dict):
        return []
    return [
        decoder["type"],
        *(kind for part in decoder.get("decoders", []) for kind in _kinds(part)),
    ]


def _spelled_bytes() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes: printable ones are themselves,
    the others follow each other from 256.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _spelled_bytes()
