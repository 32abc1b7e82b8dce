"""Going on with a begun answer, against transformers."""

from typing import Any

import pytest

import catp_jax
from tests.both import BEGUN, CIRCLE, NAMES, PROMPTS, Both, folder_of
from tests.shallow import shallow

NEW = 6
GREEDY: dict[str, Any] = {"repetition_penalty": 1.3, "min_new_tokens": 4}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{% for part in message.content %}{% if part.type == 'image' %}<|image|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt or message.role == 'user' %}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(folder_of(request.param, tmp_path_factory.mktemp("begun")))


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"num_beams": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=["greedy", "beams"],
)
def test_tokens_are_transformers_whatever_the_neighbours_have_begun(
    both: Both, options: dict[str, Any]
):
    expected = both.tokens(BEGUN, max_new_tokens=NEW, **options)
    assert both.answers(begun=BEGUN, max_new_tokens=NEW, **options).tokens == expected


def test_the_text_goes_on_where_the_answer_was_begun(both: Both):
    options: dict[str, Any] = {"max_new_tokens": NEW, **GREEDY}
    out = both.answers(begun=BEGUN, **options)
    tokenizer = both.ours.reader.tokenizer
    for text, tokens, begun in zip(out.text, out.tokens, BEGUN, strict=True):
        before = tokenizer(begun, add_special_tokens=False)["input_ids"]
        whole = tokenizer.decode([*before, *tokens], skip_special_tokens=True)
        assert (begun + text).strip() == whole.strip()
    streamed = "".join(both.ours.stream(CIRCLE, PROMPTS[0], begun=BEGUN[0], **options))
    assert streamed == out.text[0]


def test_nothing_begun_is_the_same_program(both: Both):
    plain = both.ours.prepare([CIRCLE], PROMPTS[:1])
    assert plain.begun == both.ours.prepare([CIRCLE], PROMPTS[:1], [""]).begun == ()
    assert getattr(plain.inputs, "begun", None) is None


@pytest.mark.parametrize(
    ("begun", "says"),
    [("it is", "begun is a list"), (["a", "b"], "a text for each prompt"), (["\ud800"], "begun")],
)
def test_what_is_no_beginning_is_refused(both: Both, begun: Any, says: str):
    with pytest.raises(ValueError, match=says):
        both.ours.generate([CIRCLE], PROMPTS[:1], begun=begun)


def test_a_chats_answer_is_begun_as_by_continue_final_message():
    model = catp_jax.load(shallow("mini-llama-vision"))
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
