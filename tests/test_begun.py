"""Going on with a begun answer, against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    MllamaForConditionalGeneration,
)

import catp_jax

ASSETS = Path(catp_jax.__file__).parent / "assets"
CIRCLE = ASSETS / "blue-circle.png"
PROMPTS = ["what color is the shape?", "is there a circle?", "what shape is present?"]
BEGUN = [" it is a dark", "", " a"]
NEW = 6
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{% for part in message.content %}{% if part.type == 'image' %}<|image|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt or message.role == 'user' %}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)


@pytest.fixture(scope="module", params=["mini-blip2-opt", "mini-blip2-t5", "mini-llama-vision"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ours(name: str) -> Any:
    return catp_jax.load(ASSETS / name, mask_mode="hf" if "llama" in name else None)


@pytest.fixture(scope="module")
def hf(name: str) -> Any:
    kind = MllamaForConditionalGeneration if "llama" in name else Blip2ForConditionalGeneration
    return kind.from_pretrained(ASSETS / name).eval()


def expected(name: str, hf: Any, prompt: str, begun: str, **options: Any) -> list[int]:
    """transformers' new tokens."""
    processor: Any = AutoProcessor.from_pretrained(ASSETS / name)
    text = prompt if "t5" in name else prompt + begun
    inputs = processor(
        images=Image.open(CIRCLE).convert("RGB"),
        text=f"<|image|>{text}" if "llama" in name else text,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    if "t5" in name:
        tokens = processor.tokenizer(begun, add_special_tokens=False)["input_ids"]
        options["decoder_input_ids"] = torch.tensor([[0, *tokens]])
        length = 1 + len(tokens)
    with torch.no_grad():
        out = hf.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    return out[0, length:].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "min_new_tokens": 4},
        {"num_beams": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=["greedy", "beams"],
)
def test_tokens_are_transformers_whatever_the_neighbours_have_begun(
    name: str, ours: Any, hf: Any, options: dict[str, Any]
):
    out = ours.generate([CIRCLE] * 3, PROMPTS, begun=BEGUN, max_new_tokens=NEW, **options)
    for tokens, prompt, begun in zip(out.tokens, PROMPTS, BEGUN, strict=True):
        assert tokens == expected(name, hf, prompt, begun, **options)[: len(tokens)]


def test_the_text_goes_on_where_the_answer_was_begun(name: str, ours: Any):
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": 4}
    out = ours.generate([CIRCLE] * 3, PROMPTS, begun=BEGUN, **options)
    tokenizer = ours.reader.tokenizer
    for text, tokens, begun in zip(out.text, out.tokens, BEGUN, strict=True):
        before = tokenizer(begun, add_special_tokens=False)["input_ids"]
        whole = tokenizer.decode([*before, *tokens], skip_special_tokens=True)
        assert (begun + text).strip() == whole.strip()
    streamed = "".join(ours.stream(CIRCLE, PROMPTS[0], begun=BEGUN[0], **options))
    assert streamed == out.text[0]


def test_nothing_begun_is_the_same_program(ours: Any):
    plain = ours.prepare([CIRCLE], PROMPTS[:1])
    assert plain.begun == ours.prepare([CIRCLE], PROMPTS[:1], [""]).begun == ()
    assert getattr(plain.inputs, "begun", None) is None


@pytest.mark.parametrize(
    ("begun", "says"),
    [("it is", "begun is a list"), (["a", "b"], "a text for each prompt"), (["\ud800"], "begun")],
)
def test_what_is_no_beginning_is_refused(ours: Any, begun: Any, says: str):
    with pytest.raises(ValueError, match=says):
        ours.generate([CIRCLE], PROMPTS[:1], begun=begun)


def test_a_chats_answer_is_begun_as_by_continue_final_message():
    model = catp_jax.load(ASSETS / "mini-llama-vision")
    model.reader.processor.chat_template = TEMPLATE
    chat: Any = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "It is a"}]}
    text = model.reader.processor.apply_chat_template(
        [*chat, answer], chat_template=TEMPLATE, continue_final_message=True
    )
    tokens = model.reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.read([CIRCLE], chat, begun="It is a").tokens == tokens
