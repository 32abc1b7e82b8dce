"""What belongs to a processor and what does not: missing, damaged and foreign files, code, and what
transformers would make up.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import (
    AutoProcessor,
    BertTokenizer,
    GPT2Tokenizer,
    InstructBlipProcessor,
    LlamaTokenizer,
    T5Tokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import catp_jax
import convert
from catp_jax.readers.blip2 import Blip2Reader
from catp_jax.readers.generation_config import generation_defaults
from catp_jax.readers.mllama import MllamaReader
from catp_jax.readers.processor import load_processor
from catp_jax.readers.reading import special_tokens

ASSETS = Path(catp_jax.__file__).parent / "assets"
MINIS = ("mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision")
JSON = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
MARK = b"\xef\xbb\xbf"


@pytest.fixture(params=MINIS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A shipped model's folder without its weights, to be changed."""
    return copy_of(request.param, tmp_path)


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    return copy_of("mini-blip2-t5", tmp_path)


def copy_of(name: str, into: Path) -> Path:
    ignored = shutil.ignore_patterns("*.safetensors", "*.md", "*.jsonl")
    return Path(shutil.copytree(ASSETS / name, into / name, ignore=ignored))


def edit(path: Path, **values: object) -> None:
    """Changes keys of a JSON file; None takes a key out."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def read(folder: Path) -> MllamaReader | Blip2Reader:
    """The folder's reader, made as the model is loaded, but without weights."""
    config = convert.read_config(folder)
    if "llama" in folder.name:
        return MllamaReader.load(folder, config)
    return Blip2Reader.load(folder, config)


# --- no code of a folder runs -----------------------------------------------------------------

EVIL = """
from pathlib import Path
Path({trace!r}).write_text("here")
from transformers import *
class Evil(Blip2Processor): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilImages: pass
class EvilConfig(PretrainedConfig): pass
"""
CODE = {
    "AutoConfig": "evil.EvilConfig",
    "AutoProcessor": "evil.Evil",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    "AutoImageProcessor": "evil.EvilImages",
}


@pytest.fixture
def trace(t5: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once code of the folder has run; and nobody may be asked."""
    trace = t5.parent / "trace"
    (t5 / "evil.py").write_text(EVIL.format(trace=str(trace)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    return trace


@pytest.mark.parametrize("name", [*JSON, "config.json", "all"])
def test_code_of_a_folder_never_runs_where_transformers_has_the_class(t5, trace, name):
    for file in [*JSON, "config.json"] if name == "all" else [name]:
        edit(t5 / file, auto_map=CODE)
    settings = json.loads((t5 / JSON[0]).read_text())
    edit(t5 / JSON[0], image_processor={**settings["image_processor"], "auto_map": CODE})
    processor, intact = load_processor(t5), load_processor(ASSETS / t5.name)
    assert type(processor).__name__ == "Blip2Processor"
    assert processor.tokenizer("a circle")["input_ids"] == intact.tokenizer("a circle")["input_ids"]
    assert not trace.exists()


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("processor_config.json", "processor_class"),
        ("preprocessor_config.json", "processor_class"),
        ("preprocessor_config.json", "image_processor_type"),
        ("tokenizer_config.json", "tokenizer_class"),
        ("tokenizer_config.json", "processor_class"),
    ],
)
def test_a_class_that_only_a_folder_has_is_refused(t5, trace, file, key):
    edit(t5 / file, auto_map=CODE, **{key: "Evil"})
    with pytest.raises(ValueError, match=f"{file} wants code of its own for {key} 'Evil'"):
        load_processor(t5)
    assert not trace.exists()


def test_without_the_name_of_a_class_it_is_the_models(t5, trace):
    for file in JSON:
        edit(t5 / file, processor_class=None, auto_map=CODE)
    assert type(load_processor(t5)).__name__ == "Blip2Processor"
    assert not trace.exists()


def test_a_class_of_another_package_is_not_made(t5, trace):
    edit(
        t5 / JSON[0],
        audio_tokenizer={
            "audio_tokenizer_class": "AutoTokenizer",
            "audio_tokenizer_name_or_path": str(t5),
        },
    )
    assert getattr(load_processor(t5), "audio_tokenizer", None) is None


# --- a tokenizer is the folder's --------------------------------------------------------------


def test_a_missing_tokenizer_is_refused_in_every_model(folder: Path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=rf"{folder.name}: the tokenizer is missing"):
        read(folder)


def test_a_missing_image_processor_or_first_token_is_refused(folder: Path):
    if folder.name == "mini-llama-vision":
        edit(folder / "tokenizer_config.json", bos_token=None)
        with pytest.raises(ValueError, match="the tokenizer has no bos_token"):
            read(folder)
    (folder / "preprocessor_config.json").unlink()
    assert load_processor(folder)  # the other file has it, too
    edit(folder / "processor_config.json", image_processor=None)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{folder.name}: the image processor is missing"):
            read(folder)
        (folder / "processor_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model": {}}, "has no vocabulary"),
        ({"model": None}, "has no vocabulary"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has no vocabulary"),
        ({"model": {"type": "Unigram", "vocab": [], "unk_id": 0}}, "has no vocabulary"),
        ({"model": {"vocab": 5}}, "has no vocabulary"),
        ({"model": {"vocab": [[1, 0.0]]}}, "has no vocabulary"),
        ({}, "has no vocabulary"),
    ],
)
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "T5Tokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_without_words_is_refused(t5: Path, content, says, kind):
    (t5 / "tokenizer.json").write_text(json.dumps(content))
    edit(t5 / "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(ValueError, match=says):
        load_processor(t5)


def test_a_vocabulary_wants_its_merges_and_is_then_read(t5: Path):
    tokenizer = Tokenizer.from_file(str(t5 / "tokenizer.json"))
    (t5 / "tokenizer.json").unlink()
    assert isinstance(tokenizer.model, models.BPE)
    tokenizer.model.save(str(t5))
    edit(t5 / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", bos_token="</s>")
    words = json.loads((t5 / "vocab.json").read_text()).keys()
    assert load_processor(t5).tokenizer.get_vocab().keys() >= words
    (t5 / "merges.txt").rename(t5 / "gone.txt")
    with pytest.raises(ValueError, match=r"vocab\.json but no merges\.txt"):
        load_processor(t5)


WORDS = ["<unk>", "<s>", "</s>", "<pad>", "▁a", "a", "b", "▁ab"]
TOKENIZERS = {  # of T5, OPT and Vicuna, which transformers builds anew from what a file holds
    "T5Tokenizer": lambda: T5Tokenizer(vocab=[(word, -1.0) for word in WORDS]),
    "GPT2Tokenizer": lambda: GPT2Tokenizer(
        vocab={word: n for n, word in enumerate([*WORDS, "ab"])}, merges=[("a", "b")]
    ),
    "LlamaTokenizer": lambda: LlamaTokenizer(
        vocab={word: n for n, word in enumerate(WORDS)}, merges=[("▁a", "b")]
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizers_of_the_large_models_pass(tmp_path: Path, kind: str):
    tokenizer = TOKENIZERS[kind]()
    other = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "ab": 4})
    images = BlipImageProcessorPil(size={"height": 4, "width": 4})
    InstructBlipProcessor(images, tokenizer, other, num_query_tokens=4).save_pretrained(tmp_path)
    found = load_processor(tmp_path, ("tokenizer", "qformer_tokenizer"))
    assert type(found.tokenizer).__name__ == kind
    assert found.tokenizer("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    assert found.qformer_tokenizer("ab")["input_ids"] == [2, 4, 3]


@pytest.mark.parametrize("kind", ["T5Tokenizer", "BertTokenizer", "NoSuchTokenizer"])
def test_files_that_the_tokenizers_class_does_not_read_are_refused(t5: Path, kind):
    # transformers makes up a vocabulary for each of these
    (t5 / "tokenizer.json").unlink()
    (t5 / "vocab.json").write_text(json.dumps({f"word{n}": n for n in range(300)}))
    (t5 / "merges.txt").write_text("#version: 0.2\n")
    edit(t5 / "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(ValueError, match=r"other tokens than its files|no processor that"):
        load_processor(t5)


@pytest.mark.parametrize(
    ("name", "content", "package"),
    [
        ("spiece.model", b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02\xff", "sentencepiece"),
        ("tokenizer.model", b"\x0a\x0e\x0a\x05<unk>\x15\x00\x80", "sentencepiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_what_reads_a_binary_tokenizer_is_named(folder, name, content, package, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    monkeypatch.setattr("catp_jax.readers.processor.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"only as {name}.*pip install {package}.*\.json"):
        read(folder)


# --- files as editors and networks leave them -------------------------------------------------


def test_byte_order_marks_change_nothing(folder: Path):
    before = read(folder), special_tokens(folder, {}, True, 1000)
    for path in folder.glob("*.json"):
        path.write_bytes(MARK + path.read_bytes())
    after = load_processor(folder), special_tokens(folder, {}, True, 1000)
    text = "what color is the shape?"
    assert after[0].tokenizer(text)["input_ids"] == before[0].tokenizer(text)["input_ids"]
    assert repr(after[0].image_processor) == repr(before[0].processor.image_processor)
    assert after[1] == before[1]


DAMAGE = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "list": b"[]",
    "text": b'"text"',
    "number": b"5",
    "cut off": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "file", [*JSON, "tokenizer.json", "special_tokens_map.json", "chat_template.json"]
)
def test_a_damaged_file_is_refused_by_its_name(t5: Path, file: str, damage: str):
    (t5 / file).write_bytes(DAMAGE[damage])
    with pytest.raises(ValueError, match=f"{t5.name}/{file}"):
        load_processor(t5)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_config_of_special_tokens_is_refused_by_its_name(t5, file, damage):
    (t5 / file).write_bytes(DAMAGE[damage])
    with pytest.raises(ValueError, match=f"{t5.name}/{file}"):
        special_tokens(t5, {}, True, 1000)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("processor_config.json", {"image_processor": 5}),
        ("processor_config.json", {"image_processor": []}),
        ("processor_config.json", {"processor_class": 5}),
        ("processor_config.json", {"processor_class": "LlavaProcessor"}),
        ("processor_config.json", {"processor_class": "T5Tokenizer"}),
        ("processor_config.json", {"num_query_tokens": "many"}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": ["a"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": "b"}}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer.json", {"pre_tokenizer": 5}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"version": "9"}),
    ],
)
def test_values_of_a_wrong_type_are_one_clear_error_or_change_nothing(t5, file, values):
    expected = read(t5).tokenizer("what color?")["input_ids"]
    edit(t5 / file, **values)
    found, said = None, str(t5)
    try:
        found = read(t5).tokenizer("what color?")["input_ids"]
    except ValueError as error:
        said = str(error)
    assert found in (None, expected)
    assert str(t5) in said
    assert "catp-jax-processor" not in said


@pytest.mark.parametrize(
    "values",
    [
        {"size": 5},
        {"size": "big"},
        {"size": {"shortest_edge": 64}},
        {"size": {"height": -1, "width": -1}},
        {"image_mean": "grey"},
        {"image_mean": [0.5]},
        {"image_mean": [float("nan")] * 3},
        {"image_std": [0, 0, 0]},
        {"image_std": []},
        {"rescale_factor": "small"},
        {"rescale_factor": 1e300},
        {"resample": "best"},
        {"do_resize": False},
        {"image_processor_type": "ViTFeatureExtractor"},
        {"image_processor_type": 7},
        {"max_image_tiles": "four"},
        {"max_image_tiles": 10**9},
    ],
)
@pytest.mark.parametrize("name", ["mini-blip2-t5", "mini-llama-vision"])
def test_an_image_processor_that_cannot_work_is_refused_as_the_model_loads(tmp_path, name, values):
    folder = copy_of(name, tmp_path)
    own = json.loads((folder / JSON[0]).read_text())["image_processor"]
    edit(folder / JSON[0], image_processor={**own, **values})
    edit(folder / JSON[1], **values)
    if ("max_image_tiles" in values and name == "mini-blip2-t5") or (
        "do_resize" in values and name == "mini-llama-vision"
    ):
        return  # the other model's
    with pytest.raises(ValueError, match=name):
        read(folder)


def test_a_processor_that_cannot_be_used_is_told_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr("convert.load", lambda *_: pytest.fail("the weights were read"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="the tokenizer is missing"):
        catp_jax.load(folder)
    with pytest.raises(ValueError, match="holds no model"):
        catp_jax.load(folder.parent)


# --- what is there and cannot be read is not absent ----------------------------------------------

SIDE_FILES = (
    *JSON,
    *("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "chat_template.jinja", "generation_config.json"),
)


def link(path: Path) -> None:
    path.symlink_to("../../blobs/gone")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("file", SIDE_FILES)
@pytest.mark.parametrize("make", [link, loop, os.mkfifo, Path.mkdir])
def test_a_file_that_is_there_and_cannot_be_read_is_refused_by_its_name(t5: Path, file, make):
    if file in ("vocab.json", "merges.txt"):
        (t5 / "tokenizer.json").unlink()
    if file == "merges.txt":
        (t5 / "vocab.json").write_text('{"a": 0}')
    (t5 / file).unlink(missing_ok=True)
    make(t5 / file)
    said = rf"{file} is not a file but (a link to nothing \(.*\)|a folder|a pipe.*); download"
    by = {
        "generation_config.json": [
            lambda: generation_defaults(t5, is_used=True),
            lambda: special_tokens(t5, {}, True, 1000),
        ]
    }
    for reading in by.get(file, [lambda: read(t5)]):
        with pytest.raises(ValueError, match=said):
            reading()


def test_a_processor_is_transformers_own(folder: Path):
    theirs, ours = AutoProcessor.from_pretrained(folder), load_processor(folder)
    text, image = "what shape is present?", [[np.zeros((9, 7, 3), np.uint8)]]
    assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    if "llama" not in folder.name:
        image = image[0]
    pixels = [p.image_processor(image)["pixel_values"] for p in (ours, theirs)]
    np.testing.assert_array_equal(*map(np.asarray, pixels))
