"""What every reader refuses: tokens that the language model does not have."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MllamaForConditionalGeneration

import catp_jax

ASSETS = Path(catp_jax.__file__).parent / "assets"


@pytest.mark.parametrize(("folder", "rows"), [("mini-llama-vision", 5 + 8), ("mini-blip2-opt", 5)])
def test_a_tokenizer_of_more_words_than_the_model_knows_is_refused(folder: str, rows: int):
    model = catp_jax.load(ASSETS / folder)
    small = replace(model.config, text=replace(model.config.text, vocab_size=5))
    other = replace(model, reader=replace(model.reader, config=small))
    with pytest.raises(ValueError, match=f"the language model has embeddings for {rows};"):
        other.generate([ASSETS / "blue-circle.png"], ["what color is the shape?"])


def test_tokens_added_in_the_spare_rows_of_llama_visions_embedding_are_read(tmp_path: Path):
    """Eight rows follow the vocabulary; the image mark is the first of them."""
    folder = Path(shutil.copytree(ASSETS / "mini-llama-vision", tmp_path / "mini"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    image = tokenizer["added_tokens"][-1]
    for number in (1, 2):
        added = {"id": image["id"] + number, "content": f"<|mine_{number}|>"}
        tokenizer["added_tokens"].append(image | added)
    path.write_text(json.dumps(tokenizer))
    prompt = "what <|mine_1|>color is <|mine_2|>the shape?"
    model = catp_jax.load(folder)
    tokens = model.read(None, prompt).tokens
    assert {image["id"] + 1, image["id"] + 2} <= {*tokens}
    answers = model.generate([None], [prompt], max_new_tokens=4)
    hf = MllamaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = hf(input_ids=torch.tensor([tokens])).logits[0, -1]
    np.testing.assert_allclose(answers.logits[0], wanted.numpy(), atol=2e-4)
