"""What every reader refuses: tokens that the language model does not have."""

from dataclasses import replace
from pathlib import Path

import pytest

import catp_jax

ASSETS = Path(catp_jax.__file__).parent / "assets"


@pytest.mark.parametrize("folder", ["mini-llama-vision", "mini-blip2-opt"])
def test_a_tokenizer_of_more_words_than_the_model_knows_is_refused(folder: str):
    model = catp_jax.load(ASSETS / folder)
    small = replace(model.config, text=replace(model.config.text, vocab_size=5))
    other = replace(model, reader=replace(model.reader, config=small))
    with pytest.raises(ValueError, match="the language model has embeddings for 5"):
        other.generate([ASSETS / "blue-circle.png"], ["what color is the shape?"])
