"""End and padding tokens are those that transformers finds, or refused."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import Blip2ForConditionalGeneration

import convert
from catp_jax.readers.blip2 import Blip2Reader
from catp_jax.readers.reading import special_tokens
from tests.readers.test_processor import ASSETS, copy_of, edit


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    return copy_of("mini-blip2-t5", tmp_path)


@pytest.mark.parametrize("name", ["mini-blip2-opt", "mini-blip2-t5"])
def test_blip2_ends_where_its_text_config_says_as_in_transformers(tmp_path, name):
    folder = Path(shutil.copytree(ASSETS / name, tmp_path / name))
    for own, elsewhere in [({"eos_token_id": 7, "pad_token_id": 5}, 9), ({}, 9)]:
        config = json.loads((folder / "config.json").read_text())
        text = {k: v for k, v in config["text_config"].items() if k[3:] != "_token_id"}
        edit(folder / "config.json", text_config={**text, **own}, eos_token_id=elsewhere)
        edit(folder / "generation_config.json", eos_token_id=elsewhere, pad_token_id=elsewhere)
        hf = Blip2ForConditionalGeneration.from_pretrained(folder).language_model.generation_config
        reader = Blip2Reader.load(folder, convert.read_config(folder))
        ends, pad = special_tokens(folder, reader.tokens, reader.has_generation_config, 1000)
        assert (ends, pad) == ((hf.eos_token_id,), hf.pad_token_id)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"eos_token_id": "</s>"}, "must be a token's number or a list of them, got '</s>'"),
        ({"eos_token_id": []}, "must be a token's number or a list of them"),
        ({"eos_token_id": [1, "2"]}, "must be a token's number or a list of them"),
        ({"eos_token_id": -1}, "must be a token's number or a list of them"),
        ({"eos_token_id": True}, "must be a token's number or a list of them"),
        ({"eos_token_id": 1.5}, "must be a token's number or a list of them"),
        ({"pad_token_id": "<pad>"}, "pad_token_id must be a token's number"),
        ({"pad_token_id": [1]}, "pad_token_id must be a token's number"),
        ({"eos_token_id": 10**9}, "eos_token_id has token 1000000000; this model has 1000 tokens"),
        ({"eos_token_id": [1, 1000]}, "eos_token_id has token 1000; this model has 1000 tokens"),
        ({"pad_token_id": 10**12}, "pad_token_id is token 1000000000000; this model has 1000"),
    ],
)
def test_special_tokens_of_a_wrong_type_are_refused(t5: Path, values, says):
    edit(t5 / "generation_config.json", **values)
    with pytest.raises(ValueError, match=says):
        special_tokens(t5, {}, True, 1000)


def test_vicunas_padding_of_minus_one_is_none(t5: Path):
    edit(t5 / "generation_config.json", pad_token_id=-1, eos_token_id=[3, 4])
    assert special_tokens(t5, {}, True, 1000) == ((3, 4), None)


def test_padding_may_be_in_the_rows_behind_llama_visions_vocabulary(t5: Path):
    edit(t5 / "generation_config.json", pad_token_id=1001, eos_token_id=999)
    assert special_tokens(t5, {}, True, 1000) == ((999,), 1001)
