"""What mirrors and trainers leave in a folder and changes no number passes, with a note; what is of
another kind is refused as what it is.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import catp_jax
import convert
from catp_jax.families import find_config
from catp_jax.leaves import named
from convert import configs
from convert.weights import SINGLE
from tests.command import catp_jax as command
from tests.convert.folders import edit_config, edit_tensors, hf_folder, tensors_of
from tests.convert.test_reader import assert_same
from tests.parity.tiny import tiny

MINI = Path(catp_jax.__file__).parent / "assets" / "mini-llama-vision"
INERT = {
    "unsloth": ("", {"unsloth_fixed": True, "unsloth_version": "2025.3", "model_name": "mine"}),
    "unsloth inside": ("text_config", {"unsloth_fixed": True}),
    "remote code": ("", {"auto_map": {"AutoModel": "x.Y"}}),
    "tokenizer": ("", {"tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096}),
    "for deepspeed": ("", {"hidden_size": 24, "num_attention_heads": 6}),
    "transformers.js": ("", {"transformers.js_config": {"dtype": "q4"}}),
    "a card": ("", {"license": "llama3.2", "pipeline_tag": "image-text-to-text", "tags": ["x"]}),
    "vision": ("vision_config", {"use_flash_attn": True, "auto_map": {}}),
}


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was said that is no error; each note comes once a process."""
    configs.note.cache_clear()
    caplog.set_level(logging.WARNING, "catp_jax")
    return lambda: [one.getMessage() for one in caplog.records if one.name == "catp_jax"]


@pytest.mark.parametrize(("part", "keys"), INERT.values(), ids=INERT)
def test_keys_that_change_no_number_pass_with_a_note(tmp_path: Path, notes, part: str, keys: dict):
    folder = hf_folder(tmp_path / "hf")
    edit_config(folder, part, **keys)
    assert convert.read_config(folder) == tiny("gqa")[2]
    said = notes()
    assert len(said) == len(keys)
    for key, line in zip(keys, said, strict=True):
        assert f"{part}.{key}".lstrip(".") in line


@pytest.mark.parametrize("stated", [True, False])
def test_a_key_repeats_the_text_part_only_if_the_model_has_that_value(tmp_path, notes, stated):
    """Whether the text part says so itself or transformers fills it in."""
    folder = hf_folder(tmp_path / "hf", name="opt")
    edit_config(folder, "text_config", max_position_embeddings=2048)
    raw = json.loads((folder / "config.json").read_text())
    if not stated:
        del raw["text_config"]["max_position_embeddings"]
    for value, passes in ((2048, True), (2047, False)):
        raw["max_position_embeddings"] = value
        (folder / "config.json").write_text(json.dumps(raw))
        configs.note.cache_clear()
        if passes:
            convert.read_config(folder)
            assert any("repeats text_config.max_position_embeddings" in line for line in notes())
        else:
            said = len(notes())
            with pytest.raises(ValueError, match=r"max_position_embeddings is unknown .it is 2047"):
                convert.read_config(folder)
            assert not any("repeats" in line for line in notes()[said:])


def test_no_text_part_is_repeated_where_the_model_has_none(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", name="retrieval")
    edit_config(folder, "", architectures=["Blip2ForImageTextRetrieval"], num_key_value_heads=2)
    with pytest.raises(ValueError, match="num_key_value_heads is unknown"):
        convert.read_config(folder)


CHANGING = {
    "a scale": ("", {"logit_scale": 2.0}),
    "another size at the top": ("", {"hidden_size": 25}),
    "a size in a part": ("vision_config", {"vocab_size": 3}),
    "LoRA": ("", {"lora_alpha": 16}),
    "a name that begins otherwise": ("text_config", {"my_unsloth_fixed": True}),
    "attention": ("text_config", {"sliding_window": 128}),
}


@pytest.mark.parametrize(("part", "keys"), CHANGING.values(), ids=CHANGING)
def test_keys_that_may_change_numbers_are_refused_and_can_be_ignored(tmp_path, part, keys):
    folder = hf_folder(tmp_path / "hf")
    edit_config(folder, part, **keys)
    name = f"{part}.{next(iter(keys))}".lstrip(".")
    with pytest.raises(ValueError, match=rf"{name} is unknown .*--ignore-config {name}"):
        convert.read_config(folder)
    assert convert.read_config(folder, (name,)) == tiny("gqa")[2]
    assert find_config(folder, (name,)) == tiny("gqa")[2]


def test_a_key_that_was_ignored_once_is_ignored_in_the_converted_folder(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    edit_config(folder, "text_config", sparkle=3)
    ignore = ("text_config.sparkle",)
    model, _ = convert.load(folder, ignore_config=ignore)
    assert_same(model, tiny("gqa")[1])
    with pytest.raises(ValueError, match="sparkle is unknown"):
        convert.to_orbax(folder, tmp_path / "out")
    convert.to_orbax(folder, tmp_path / "out", ignore_config=ignore)
    assert_same(convert.load(tmp_path / "out")[0], tiny("gqa")[1])
    convert.to_hf(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("key", ["sparkle", "text_config.sparkle", "text_config.", "x.y", ""])
def test_a_key_to_ignore_that_is_not_there_is_said(tmp_path: Path, key: str):
    with pytest.raises(ValueError, match=rf"config\.json has no key '{key}' to ignore"):
        convert.load(hf_folder(tmp_path / "hf"), ignore_config=[key])


def test_commands_take_keys_to_ignore(tmp_path: Path):
    folder = Path(shutil.copytree(MINI, tmp_path / "mini"))
    edit_config(folder, "", sparkle=3)
    ask = ("generate", folder, "--prompt", "is there a circle?", "--max-new-tokens", 1)
    refused = command(*ask)
    assert (refused.returncode, "--ignore-config sparkle" in refused.stderr) == (1, True)
    assert command(*ask, "--ignore-config", "sparkle").returncode == 0
    done = command("convert", folder, tmp_path / "out", "--ignore-config", "sparkle")
    assert done.returncode == 0, done.stderr
    found = command("doctor", folder, "--json", "--ignore-config", "sparkle").stdout.splitlines()
    assert {json.loads(line)["subject"] for line in found if '"fail"' in line} == set()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "model.module."]
)
@pytest.mark.parametrize("kind", ["hub", "transformers 5"])
def test_a_prefix_that_all_names_have_is_no_part_of_them(tmp_path: Path, prefix: str, kind: str):
    folder = hf_folder(tmp_path / "hf", kind)
    tensors = {prefix + name: tensor for name, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    model, _ = convert.load(folder)
    assert_same(model, tiny("gqa")[1])
    convert.to_orbax(folder, tmp_path / "out")
    convert.to_hf(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()


def test_a_prefix_that_some_names_have_is_refused(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    tensors = load_file(folder / SINGLE)
    first = sorted(tensors)[0]
    tensors["module." + first] = tensors.pop(first)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(ValueError, match=f"unknown .*module.{first}"):
        convert.load(folder)


def edited(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, "", **changes)


def only(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_bytes(b"GGUF")

    return change


def of_type(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        name = "language_model.model.norm.weight"
        edit_tensors(folder, **{name: tensors_of(folder)[name].to(dtype)})

    return change


def ending(end: str, dtype: torch.dtype) -> Callable[[Path], None]:
    name = f"language_model.model.layers.0.mlp.up_proj{end}"
    return lambda folder: edit_tensors(folder, **{name: torch.zeros(2, dtype=dtype)})


OTHERS = {
    "GPTQ": (edited(quantization_config={"quant_method": "gptq", "bits": 4}), 'quantised ."gptq"'),
    "AWQ": (edited(quantization_config={"quant_method": "awq"}), 'quantised ."awq"'),
    "bitsandbytes": (edited(quantization_config={"load_in_4bit": True}), "load_in_4bit"),
    "FP8": (of_type(torch.float8_e4m3fn), r"F8_E4M3 \(FP8: only F32, F16, BF16"),
    "FP8, the other": (of_type(torch.float8_e5m2), "F8_E5M2"),
    "eight bits": (of_type(torch.int8), "of type I8"),
    "GPTQ's tensors": (ending(".qweight", torch.int32), "quantised .GPTQ or AWQ"),
    "bitsandbytes' tensors": (ending(".weight.absmax", torch.float32), "quantised .bitsandbytes"),
    "FP8's scales": (ending(".weight_scale_inv", torch.float32), "quantised .FP8"),
    "an adapter inside": (ending(".lora_A.weight", torch.float32), "merge_and_unload"),
    "GGUF": (only("model-Q4_K_M.gguf"), "only as GGUF"),
    "pickles": (only("pytorch_model.bin", "training_args.bin"), "only as PyTorch pickles"),
    "a pickle of Meta": (only("consolidated.00.pth"), "only as PyTorch pickles"),
    "Flax": (only("flax_model.msgpack"), "files of Flax"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_weights_of_another_kind_are_refused_as_what_they_are(
    tmp_path: Path, monkeypatch, change: Callable[[Path], None], message: str
):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    folder = hf_folder(tmp_path / "hf")
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        convert.load(folder)
    assert "corrupt" not in str(error.value)
    assert any(way in str(error.value) for way in ("take the checkpoint", "save_pretrained"))


def test_a_gguf_file_is_no_folder(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="GGUF files are not read"):
        convert.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("stays", ["norms in float32", "matrices in float32", "none says so"])
def test_weights_of_several_types_are_read_as_transformers_does(tmp_path: Path, notes, stays: str):
    folder = hf_folder(tmp_path / "hf", dtype=torch.bfloat16)
    whole = tensors_of(hf_folder(tmp_path / "whole"))
    pick = {
        "norms in float32": lambda name: "norm" in name,
        "matrices in float32": lambda name: "proj" in name,
        "none says so": lambda name: "norm" in name,
    }[stays]
    edit_tensors(folder, **{name: tensor for name, tensor in whole.items() if pick(name)})
    if stays == "none says so":
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    convert.to_orbax(folder, tmp_path / "out")
    for place in (folder, tmp_path / "out"):
        model, _ = convert.load(place)
        arrays = named(model)
        assert {array.dtype for array in arrays.values()} == {jnp.dtype(jnp.bfloat16)}
        norm = theirs.model.language_model.norm.weight
        assert norm.dtype == torch.bfloat16
        np.testing.assert_array_equal(
            arrays["language_model.norm.scale"].astype(jnp.float32), norm.float().detach().numpy()
        )
    assert any("are read as bfloat16" in line for line in notes())
    convert.to_hf(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()


def test_a_model_whose_norms_are_wider_than_its_matrices_answers(tmp_path: Path):
    folder = Path(shutil.copytree(MINI, tmp_path / "mini"))
    tensors = load_file(folder / SINGLE)
    save_file(
        {n: t.float() if "norm" in n else t.bfloat16() for n, t in tensors.items()}, folder / SINGLE
    )
    answers = catp_jax.load(folder).generate([None], ["is there a circle?"], max_new_tokens=2)
    assert np.isfinite(answers.logits).all()


def test_other_chat_templates_come_along_there_and_back(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    (folder / "additional_chat_templates").mkdir()
    template = folder / "additional_chat_templates" / "tool_use.jinja"
    template.write_text("{{ tools }}\r\n")
    convert.to_orbax(folder, tmp_path / "out")
    convert.to_hf(tmp_path / "out", tmp_path / "again")
    again = tmp_path / "again" / "additional_chat_templates" / "tool_use.jinja"
    assert again.read_bytes() == template.read_bytes()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_read_as_float32_where_config_says_so(
    tmp_path: Path, notes, stored: torch.dtype
):
    folder = hf_folder(tmp_path / "hf", dtype=stored)
    assert {array.dtype.name for array in named(convert.load(folder)[0]).values()} == {
        str(stored).removeprefix("torch.")
    }
    edit_config(folder, "", dtype="float32")
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    convert.to_orbax(folder, tmp_path / "out")
    for place in (folder, tmp_path / "out"):
        arrays = named(convert.load(place)[0])
        assert {array.dtype for array in arrays.values()} == {jnp.dtype(jnp.float32)}
        norm = theirs.model.language_model.norm.weight
        assert norm.dtype == torch.float32
        np.testing.assert_array_equal(arrays["language_model.norm.scale"], norm.detach().numpy())
        asked = named(convert.load(place, "bfloat16")[0])
        assert asked["language_model.norm.scale"].dtype == jnp.bfloat16
    assert notes() == []
    convert.to_hf(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()


@pytest.mark.parametrize(("first", "read"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_of_two_number_types_in_config_the_newer_key_counts(tmp_path: Path, first: str, read: str):
    folder = hf_folder(tmp_path / "hf", dtype=torch.bfloat16)
    other = "float32" if first == "bfloat16" else "bfloat16"
    edit_config(folder, "", dtype=first, torch_dtype=other)
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    assert {x.dtype for x in theirs.parameters()} == {getattr(torch, read)}
    arrays = named(convert.load(folder)[0])
    assert {array.dtype.name for array in arrays.values()} == {read}


def test_a_t5_stored_in_float16_is_read_as_float32_without_a_note(tmp_path: Path, notes):
    """Its second matrices are float32 in the folder, as transformers saves them."""
    folder = hf_folder(tmp_path / "hf", dtype=torch.float16, name="t5")
    wide = {name: x.float() for name, x in tensors_of(folder).items() if name.endswith("wo.weight")}
    edit_tensors(folder, **wide)
    edit_config(folder, "", dtype="float32")
    assert {array.dtype.name for array in named(convert.load(folder)[0]).values()} == {"float32"}
    assert notes() == []
