"""catp_jax.readers.token_text: the tokens of a word, wherever it stands."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import catp_jax
from catp_jax.readers.token_text import spellings

ASSETS = Path(catp_jax.__file__).parent / "assets"


def sentencepiece() -> Any:
    """As Vicuna's: every text begins with a space, which is part of the word behind it."""
    pieces = ["<unk>", "▁", "▁red", "red", "▁so", "so", ",", "(", "▁blue", "blue", "▁circle"]
    letters = sorted({letter for piece in pieces[1:] for letter in piece} - {*pieces})
    scored = [(piece, -float(number)) for number, piece in enumerate([*pieces, *letters])]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    "name", ["mini-llama-vision", "mini-blip2-opt", "mini-blip2-t5", "sentencepiece"]
)
@pytest.mark.parametrize("word", ["red", "blue circle"])
def test_a_words_tokens_are_found_wherever_it_stands(name: str, word: str):
    local = name == "sentencepiece"
    tokenizer: Any = sentencepiece() if local else AutoTokenizer.from_pretrained(ASSETS / name)
    found = spellings(tokenizer, word)
    assert len({*map(tuple, found)}) == len(found) > 1
    for text in (word, f"so {word}", f"so,{word}", f"({word}", f"so {word} so"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows = [tokens[i : i + len(ids)] for ids in found for i in range(len(tokens))]
        assert any(ids in windows for ids in found), text
    for ids in found:
        assert tokenizer.decode(ids).strip() == word
