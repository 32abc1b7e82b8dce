"""The mini Llama Vision that ships with the package."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import catp_jax
import convert
from catp_jax.models.mllama import Images, Inputs
from catp_jax.study.tasks import easy_vqa
from catp_jax.training.data import Text, evaluation_batches
from catp_jax.training.mini_llama_vision import evaluate, mini_config
from catp_jax.training.tokenizer import EOT, PAD, load_processor

FOLDER = Path(catp_jax.__file__).parent / "assets" / "mini-llama-vision"


@pytest.fixture(scope="module")
def model():
    return convert.load(FOLDER)[0]


@pytest.fixture(scope="module")
def processor():
    return load_processor(FOLDER)


def test_it_is_small_and_complete():
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
        *("training_log.jsonl", "README.md"),
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000


def test_it_is_the_model_that_the_command_trains(model):
    assert model.config == mini_config()


def test_every_gate_is_open(model):
    gates = [x for x in jax.tree.leaves(nnx.state(model)) if x.shape == (1,)]
    assert len(gates) == 9
    assert all(abs(float(gate[0])) > 1e-2 for gate in gates)


def test_it_answers_the_test_questions(model, processor):
    """The first 300 images' questions; the whole test set is in the training log."""
    text = Text(
        encode=processor.tokenizer.encode,
        end=processor.tokenizer.convert_tokens_to_ids(EOT),
        padding=processor.tokenizer.convert_tokens_to_ids(PAD),
    )
    examples = [e for e in easy_vqa("test") if e.image_id < 300]
    right = evaluate(model, evaluation_batches(examples, text, model.config.vision, size=50))
    assert len(right) == len(examples) > 2500
    assert np.mean(right) >= 0.97


def test_the_log_ends_with_the_whole_test_set():
    last = json.loads((FOLDER / "training_log.jsonl").read_text().splitlines()[-1])
    assert last["questions"] == 9673
    assert last["accuracy"] >= 0.97


def test_its_readme_says_what_the_log_says():
    last = json.loads((FOLDER / "training_log.jsonl").read_text().splitlines()[-1])
    readme = (FOLDER / "README.md").read_text()
    for name, key in {"all": "accuracy", "yes/no": "accuracy yes/no"}.items():
        assert f"| {name} | {last[key]:.2%} |".replace("%", " %") in readme
    for name in ("shape", "colour"):
        assert f"| {name} | {last[f'accuracy {name}']:.2%} |".replace("%", " %") in readme
    assert f"{last['accuracy blind']:.1%}".replace("%", " %") in readme
    for kept, accuracy in last["accuracy with random tokens kept"].items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {kept} |"))
        assert float(row.split("|")[2].strip(" %")) == pytest.approx(100 * accuracy, abs=0.051)
    assert f"{last['minutes of training']:.0f} minutes" in readme


def test_transformers_loads_it_and_gets_the_same_logits_and_answers(model, processor):
    import torch
    from transformers import AutoProcessor, MllamaForConditionalGeneration

    network, report = MllamaForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    network = network.eval()
    assert type(AutoProcessor.from_pretrained(FOLDER)) is type(processor)

    examples = list(easy_vqa("test", 4000))[::500]
    images = [[Image.open(e.image).convert("RGB")] for e in examples]
    prompts = [f"<|image|>{e.question}" for e in examples]
    found = processor(images=images, text=prompts, padding=True, return_tensors="np")
    torch_inputs = {name: torch.tensor(value) for name, value in found.items()}
    with torch.no_grad():
        wanted = network(**torch_inputs).logits.numpy()

    for example, image, prompt in zip(examples, images, prompts, strict=True):
        alone = processor(images=image, text=[prompt], return_tensors="pt")
        said = network.generate(**alone, max_new_tokens=4, do_sample=False)
        new = said[0, alone["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == example.answer

    got = np.asarray(model(inputs_from(found)))
    valid = found["attention_mask"].astype(bool)
    scale = np.abs(wanted[valid]).max()
    assert np.abs(got - wanted)[valid].max() <= 1e-4 * scale


def inputs_from(found) -> Inputs:
    """The processor's arrays, one image a prompt in front of the text, as our model takes them."""
    batch, length = found["input_ids"].shape
    mask = found["aspect_ratio_mask"][:, 0].astype(bool)
    return Inputs(
        tokens=jax.numpy.asarray(found["input_ids"], np.int32),
        token_valid=jax.numpy.asarray(found["attention_mask"].astype(bool)),
        images=Images(
            pixels=jax.numpy.asarray(found["pixel_values"][:, 0]),
            aspect_ratio_ids=jax.numpy.asarray(found["aspect_ratio_ids"][:, 0], np.int32),
            aspect_ratio_mask=jax.numpy.asarray(mask),
            tile_index=jax.numpy.arange(batch * 4, dtype=np.int32).reshape(batch, 4),
            tile_valid=jax.numpy.asarray(mask),
            tile_seen=jax.numpy.asarray(np.repeat(mask[:, None], length, axis=1)),
        ),
    )
