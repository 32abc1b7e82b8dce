"""LoRA adapters: merged as peft merges them; every other kind is refused by name."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import catp_jax
import convert
from catp_jax.leaves import named
from tests.command import catp_jax as command
from tests.convert.folders import hf_folder
from tests.convert.test_reader import assert_same, on_mesh
from tests.parity.tiny import tiny
from tests.parity.tiny_blip2 import CONFIGS as BLIP2
from tests.parity.tiny_blip2 import tiny_hf

MINI = Path(catp_jax.__file__).parent / "assets" / "mini-llama-vision"
OPT = next(name for name in BLIP2 if "opt" in name)
T5 = next(name for name in BLIP2 if "t5" in name)
LINEAR = ["q_proj", "v_proj", "up_proj"]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("gqa", {"target_modules": LINEAR}),
    "all linear layers": ("gqa", {"target_modules": "all-linear"}),
    "rank-stabilised": ("gqa", {"target_modules": LINEAR, "use_rslora": True}),
    "ranks and alphas by pattern": (
        "gqa",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 5},
            "alpha_pattern": {"^model.language_model.layers.1.cross_attn.q_proj": 32, "v_proj": 3},
        },
    ),
    "whole modules": (
        "gqa",
        {"target_modules": ["v_proj"], "modules_to_save": ["multi_modal_projector", "lm_head"]},
    ),
    "the head": ("gqa", {"target_modules": ["lm_head", "multi_modal_projector"]}),
    "turned": ("gqa", {"target_modules": ["o_proj"], "fan_in_fan_out": True}),
    "OPT": (OPT, {"target_modules": ["q_proj", "k_proj", "qkv", "query"]}),
    "T5": (T5, {"target_modules": ["q", "wi_1"]}),
}


def base_of(name: str) -> torch.nn.Module:
    return copy.deepcopy(tiny_hf(name) if name in BLIP2 else tiny(name)[0])


def adapted(base: torch.nn.Module, **settings: Any) -> peft.PeftModel:
    """A model with an adapter all of whose numbers are drawn."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, **settings))
    rng = np.random.default_rng(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            drawn = rng.normal(size=tuple(parameter.shape)) * 0.3
            parameter.data = torch.from_numpy(drawn.astype(np.float32)).to(parameter.dtype)
    return model.eval()


@pytest.mark.parametrize(("name", "settings"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft, of fan_in_fan_out
def test_merged_weights_are_those_of_peft(tmp_path: Path, name: str, settings: dict[str, Any]):
    folder = hf_folder(tmp_path / "hf", name=name)
    model = adapted(base_of(name), **settings)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    wanted = named(convert.load(tmp_path / "merged")[0])
    plain = named(convert.load(folder)[0])
    got = named(convert.load(folder, adapter=tmp_path / "adapter")[0])
    assert got.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_allclose(got[key], array, atol=2e-6, err_msg=key)
    assert sum(not np.array_equal(got[key], plain[key]) for key in got) > 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder "hf", a folder "adapter", and "both", where one lies beside the other."""
    place = tmp_path_factory.mktemp("adapter")
    hf_folder(place / "hf")
    adapted(base_of("gqa"), target_modules=LINEAR).save_pretrained(place / "adapter")
    shutil.copytree(place / "hf", place / "both")
    shutil.copytree(place / "adapter", place / "both", dirs_exist_ok=True)
    return place


def test_an_adapter_beside_the_weights_is_merged_by_loading_and_converting(made, tmp_path: Path):
    elsewhere, _ = convert.load(made / "hf", adapter=made / "adapter")
    beside, _ = convert.load(made / "both")
    assert_same(beside, elsewhere)
    report = convert.to_orbax(made / "both", tmp_path / "out")
    merged = [row for row in report.rows if "adapter merged" in row.change]
    assert len(merged) == len(load_file(made / "adapter" / "adapter_model.safetensors")) / 2
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert_same(convert.load(tmp_path / "out")[0], elsewhere)
    convert.to_hf(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again" / "adapter_config.json").exists()
    assert_same(convert.load(tmp_path / "again")[0], elsewhere)


def test_a_merged_model_is_split_over_a_mesh_and_cast_like_any_other(made: Path):
    whole, _ = convert.load(made / "both")
    assert_same(convert.load(made / "both", place=on_mesh)[0], whole)
    narrow = named(convert.load(made / "both", dtype="bfloat16")[0])
    for key, array in named(whole).items():
        np.testing.assert_array_equal(narrow[key], array.astype(jnp.bfloat16))


def test_wider_modules_of_the_adapter_are_cast_to_the_base(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", "sharded", torch.bfloat16)
    model = adapted(base_of("gqa"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    merged, _ = convert.load(folder, adapter=tmp_path / "adapter")
    assert merged.lm_head.kernel.dtype == jnp.bfloat16
    convert.to_orbax(folder, tmp_path / "out", adapter=tmp_path / "adapter")
    convert.to_hf(tmp_path / "out", tmp_path / "again")
    assert_same(convert.load(tmp_path / "again")[0], merged)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    stored = [load_file(path) for path in sorted((tmp_path / "again").glob("*.safetensors"))]
    total = sum(t.numel() * t.element_size() for file in stored for t in file.values())
    assert index["metadata"]["total_size"] == total


def test_answers_are_those_of_transformers_with_peft(tmp_path: Path):
    hf = AutoModelForImageTextToText.from_pretrained(MINI)
    model = adapted(hf, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    ours = catp_jax.load(MINI, adapter=tmp_path / "adapter")
    tokens = ours.read(None, "is there a circle?").tokens
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([tokens])).logits[0, -1].numpy()
    ask = {"max_new_tokens": 1}
    got = ours.generate([None], ["is there a circle?"], **ask)
    np.testing.assert_allclose(got.logits[0], wanted, atol=1e-3)
    ask = ("generate", MINI, "--prompt", "is there a circle?", "--max-new-tokens", 1, "--json")
    said = command(*ask, "--adapter", tmp_path / "adapter")
    assert json.loads(said.stdout)["tokens"] == got.tokens[0], said.stderr


def test_an_adapter_alone_says_what_it_is(made: Path, tmp_path: Path):
    folder = Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "a/b"}))
    message = r"is an adapter for a/b, not a model; .*--adapter FOLDER"
    for step in (convert.load, lambda f: convert.to_orbax(f, tmp_path / "out"), catp_jax.load):
        with pytest.raises(ValueError, match=message):
            step(folder)


def test_two_adapters_and_a_converted_base_are_refused(made: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="has an adapter of its own"):
        convert.load(made / "both", adapter=made / "adapter")
    with pytest.raises(ValueError, match=r"hf is no adapter: it has no adapter_config\.json"):
        convert.load(made / "both" / ".." / "hf", adapter=made / "hf")
    convert.to_orbax(made / "hf", tmp_path / "out")
    with pytest.raises(ValueError, match=r"is converted; merge .* as you convert"):
        convert.load(tmp_path / "out", adapter=made / "adapter")


KINDS = {
    "DoRA": ({"use_dora": True}, "use_dora is True: DoRA"),
    "IA3": ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is merged"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING'"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "a bias of LoRA": ({"lora_bias": True}, "lora_bias is True"),
    "tokens": ({"trainable_token_indices": [1]}, "trained tokens"),
    "layers again": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base's weights"),
    "LoftQ": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "what is to come": ({"use_xlora2": True}, "use_xlora2"),
    "no rank": ({"r": 0}, "r is 0; a positive number"),
    "rank as text": ({"r": "8"}, "r is '8'"),
    "alpha": ({"lora_alpha": None}, "lora_alpha is None"),
    "a pattern that never ends": ({"rank_pattern": {"(a+)+": 3}}, "is no name of modules"),
    "a pattern that is none": ({"rank_pattern": {"*q_proj": 3}}, "is no name of modules"),
    "a pattern with an open bracket": ({"alpha_pattern": {"[q": 3}}, "is no name of modules"),
    "a pattern of many stars": ({"rank_pattern": {".*.*.*.*zz": 3}}, "is no name of modules"),
    "patterns": ({"alpha_pattern": [1]}, "alpha_pattern is not an object"),
    "saved modules": ({"modules_to_save": "lm_head"}, "a list of names is wanted"),
    "a saved module that is missing": ({"modules_to_save": ["lm_head"]}, "has no lm_head"),
    "another rank": ({"r": 4}, "linear layers of rank 4 are merged"),
}


@pytest.fixture
def both(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "both", tmp_path / "both"))


@pytest.mark.parametrize(("keys", "message"), KINDS.values(), ids=KINDS)
def test_adapters_of_another_kind_are_refused_by_name(both: Path, keys: dict, message: str):
    path = both / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(ValueError, match=message):
        convert.load(both)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def in_both_layouts(tensors: dict[str, Any]) -> dict[str, Any]:
    """A second pair for each, under the name that transformers 5 has for it."""
    names = {
        name: name.replace("model.language_model.", "language_model.model.") for name in tensors
    }
    return tensors | {names[name]: tensor.clone() for name, tensor in tensors.items()}


DAMAGE = {
    "two pairs for a tensor": (in_both_layouts, "is adapted twice, under two names"),
    "DoRA's tensors": (renamed("q_proj.lora_B.weight", "q_proj.lora_magnitude_vector"), "DoRA"),
    "an embedding": (renamed("q_proj.lora_A.weight", "q_proj.lora_embedding_A"), "an embedding"),
    "a half": (lambda t: {n: x for n, x in t.items() if "lora_A" in n}, "lora_A and lora_B"),
    "another model": (renamed("language_model", "tongue_model"), "there is no model.tongue_model"),
    "whole numbers": (
        lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(50, 24, dtype=torch.int64)},
        "weights of other types than",
    ),
    "other shapes": (lambda t: {n: x[:, :-1] for n, x in t.items()}, "linear layers of rank 3"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_an_adapter_that_does_not_fit_is_said(both: Path, change, message: str):
    path = both / "adapter_model.safetensors"
    tensors = {n: x.contiguous() for n, x in change(load_file(path)).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        convert.load(both)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_not_passed_over(both: Path, name: str):
    (both / name).unlink()
    with pytest.raises(ValueError, match=f"{name}"):
        convert.load(both)


def test_an_adapter_as_a_pickle_is_not_opened(both: Path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    (both / "adapter_model.safetensors").rename(both / "adapter_model.bin")
    with pytest.raises(ValueError, match="as a PyTorch pickle"):
        convert.load(both)


def test_a_head_that_is_the_embedding_is_not_changed_alone(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf", name=OPT)
    down, up = torch.ones(1, 1), torch.ones(1, 1)
    name = "base_model.model.language_model.lm_head"
    (tmp_path / "a").mkdir()
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    )
    with pytest.raises(ValueError, match="is one with another tensor"):
        convert.load(folder, adapter=tmp_path / "a")
