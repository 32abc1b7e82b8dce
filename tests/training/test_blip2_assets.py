"""The mini BLIP-2s that ship with the package."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import catp_jax
import convert
from catp_jax.models.blip2 import Blip2Inputs
from catp_jax.study.tasks import easy_vqa
from catp_jax.training.blip2_card import card
from catp_jax.training.blip2_data import PAPERS_PROMPT, evaluation_batches
from catp_jax.training.blip2_start import QUERIES, mini_config
from catp_jax.training.mini_blip2 import QUESTIONS, evaluate, make_text, without_queries
from catp_jax.training.scoring import blind_accuracy
from catp_jax.training.tokenizer import load_processor

ASSETS = Path(catp_jax.__file__).parent / "assets"


@pytest.fixture(scope="module", params=["opt", "t5"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind):
    return ASSETS / f"mini-blip2-{kind}"


@pytest.fixture(scope="module")
def model(folder):
    return convert.load(folder)[0]


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def log(folder):
    return [json.loads(x) for x in (folder / "training_log.jsonl").read_text().splitlines()]


def inputs_from(found):
    """What the processor found, as the model takes it."""
    return Blip2Inputs(
        pixels=jnp.asarray(found["pixel_values"]),
        image_index=jnp.arange(len(found["pixel_values"]), dtype=jnp.int32),
        tokens=jnp.asarray(found["input_ids"][:, QUERIES:], jnp.int32),
        token_valid=jnp.asarray(found["attention_mask"][:, QUERIES:].astype(bool)),
    )


def test_it_is_small_and_complete(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
        *("training_log.jsonl", "README.md"),
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000


def test_it_is_the_model_that_the_command_trains(model, kind):
    assert model.config == mini_config(kind)


def test_it_answers_the_test_questions_and_not_without_its_queries(model, processor):
    """The first 36 images' questions; the whole test set is in the training log."""
    text = make_text(processor.tokenizer, model.config)
    examples = [e for e in easy_vqa("test") if e.image_id < 36]
    batches = evaluation_batches(examples, text, size=12)
    right, zeroed = evaluate(model, batches), evaluate(without_queries(model), batches)
    assert len(right) == len(examples) > 300
    assert np.mean(right) >= 0.95
    assert np.mean(zeroed) <= blind_accuracy(list(easy_vqa("train")), examples) + 0.05
    worded = evaluation_batches(examples[:100], text, size=12, wording=PAPERS_PROMPT)
    assert np.mean(evaluate(model, worded)) >= 0.95


def test_the_log_ends_with_the_whole_test_set(log):
    last = log[-1]
    assert last["questions"] == len(list(easy_vqa("test")))
    assert last["accuracy"] >= 0.95
    assert last["accuracy with the queries zeroed"] <= last["accuracy blind"] + 0.02
    assert last["accuracy blind"] < 0.7


def test_both_kinds_come_from_the_same_first_stages():
    lines = [
        [x for x in path.read_text().splitlines() if '"tower"' in x or '"qformer"' in x]
        for path in (ASSETS / f"mini-blip2-{kind}" / "training_log.jsonl" for kind in ("opt", "t5"))
    ]
    assert lines[0] == lines[1] != []


def test_its_readme_says_what_the_log_says(folder, model, log):
    """It is written by code, from the log's last line and the steps that its lines count."""
    steps = {f"{line['stage']}_steps": line["step"] for line in log[:-1]}
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    options = {"seed": 0, "batch": 128, **steps}
    text = card(model.config, log[-1], options, parameters, PAPERS_PROMPT, QUESTIONS)
    assert (folder / "README.md").read_text() == text


def test_transformers_loads_it_and_gets_the_same_logits_and_answers(folder, model, processor, kind):
    import torch
    from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2Processor

    network, report = Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    network = network.eval()
    assert type(AutoProcessor.from_pretrained(folder)) is Blip2Processor

    examples = list(easy_vqa("test", 4000))[::500]
    images = [Image.open(e.image).convert("RGB") for e in examples]
    found = processor(
        images=images, text=[e.question for e in examples], padding=True, return_tensors="np"
    )
    torch_inputs = {name: torch.tensor(value) for name, value in found.items()}
    decoder = None
    if kind == "t5":
        decoder = np.array([[0, 300 + row] for row in range(len(examples))], np.int32)
        torch_inputs["decoder_input_ids"] = torch.tensor(decoder)
    with torch.no_grad():
        wanted = network(**torch_inputs).logits.numpy()

    for example, image in zip(examples, images, strict=True):
        alone = processor(images=[image], text=[example.question], return_tensors="pt")
        said = network.generate(**alone, max_new_tokens=4, do_sample=False)
        new = said[0] if kind == "t5" else said[0, alone["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == example.answer

    got = np.asarray(
        model(inputs_from(found), None, None if decoder is None else jnp.asarray(decoder))
    )
    rows = np.ones(got.shape[:2], bool) if kind == "t5" else found["attention_mask"].astype(bool)
    assert np.abs(got - wanted)[rows].max() <= 1e-4 * np.abs(wanted[rows]).max()
