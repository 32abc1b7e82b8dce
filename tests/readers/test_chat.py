"""Chats: checked, their images in order, their templates within a limit of time."""

import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from PIL import Image

import catp_jax
from catp_jax.readers import templates
from catp_jax.readers.chat import check_text, take_images
from catp_jax.readers.templates import render

ASSETS = Path(catp_jax.__file__).parent / "assets"
RED, BLUE, GREY = (Image.new("RGB", (4, 4), name) for name in ("red", "blue", "grey"))
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}
    {{- "<|start|>" + message.role + "\\n" }}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == "image" %}<|image|>{% else %}{{ part.text | trim }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|answer|>{% endif %}"""


def user(*parts: object) -> dict:
    return {"role": "user", "content": [*parts]}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


# --- messages ---------------------------------------------------------------------------------


def test_images_come_out_in_the_order_of_their_parts():
    chat = [
        {"role": "system", "content": "be short"},
        user({"type": "image", "image": RED}, text("and"), {"type": "image"}),
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        user({"type": "image_url", "image_url": {"url": "https://a/b.png"}}, {"type": "image"}),
        user({"type": "image", "path": "c.png"}, {"type": "image", "base64": "QUJD"}),
        user({"type": "image_url", "image_url": "data:,x"}, text("what is this?")),
    ]
    before = repr(chat)
    messages, images = take_images(chat, [BLUE, GREY], folder=Path("/data"))
    encoded = "data:;base64,QUJD"
    own = [RED, BLUE, "https://a/b.png", GREY, Path("/data/c.png"), encoded, "data:,x"]
    assert images == own
    kinds = [p["type"] for m in messages if isinstance(m["content"], list) for p in m["content"]]
    assert kinds == ["image", "text", "image", "image", "image", "image", "image", "image", "text"]
    assert messages[2]["tool_calls"] == [{"name": "look"}]
    assert json.loads(json.dumps(messages)) == messages
    assert repr(chat) == before


def test_images_left_over_are_for_marks_in_the_text():
    messages, images = take_images([user(text("<|image|>what?"))], ["a.png"])
    assert (messages, images) == ([user(text("<|image|>what?"))], ["a.png"])


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([], "at least one message, got list"),
        ({}, "at least one message, got dict"),
        ("hello", "at least one message, got str 'hello'"),
        (None, "at least one message, got None"),
        (["hello"], "message 0 of the chat must be .* got str 'hello'"),
        ([[user(text("a"))]], "message 0 of the chat must be .* got list"),
        ([user(text("a")), None], "message 1 of the chat must be"),
        ([{"content": "a"}], "the role of message 0 of the chat must be text, got None"),
        ([{"role": 5, "content": "a"}], "the role of message 0 .* got int 5"),
        ([{"role": "user"}], "the content of message 0 .* got None"),
        ([{"role": "user", "content": 5}], "the content of message 0 .* got int 5"),
        ([{"role": "user", "content": {"type": "text"}}], "the content of message 0 .* got dict"),
        ([user("a")], "a part of message 0 .* got str 'a'"),
        ([user({"text": "a"})], "a part of message 0"),
        ([user({"type": "video"})], "a part of message 0"),
        ([user({"type": ["image"]})], "a part of message 0"),
        ([user({"type": "text"})], "a text of message 0 .* got None"),
        ([user({"type": "text", "text": ["a"]})], "a text of message 0 .* got list"),
        ([user({"type": "image"})], "an image of message 0 of the chat is missing"),
        ([user({"type": "image", "path": "a", "url": "b"})], "has path and url; give one"),
        ([{"role": "user", "content": "a", "image": "a.png"}], "'image', which is not read"),
        ([{"role": "user", "content": "a", "images": [], "x": 1}], "has 'images', 'x', which"),
        ([user({"type": "text", "text": "a", "image": "a.png"})], "a part of message 0 .*'image'"),
        ([user({"type": "image", "src": "a.png"})], "'src', which is not read"),
        ([user({"type": "image_url"})], "an image_url of message 0 of the chat names no url"),
        ([user({"type": "image_url", "image_url": {}})], "names no url"),
        ([user(text("a \ud800"))], r"a text of message 0 .* place 2 \('\\ud800', a lone surrogate"),
        ([{"role": "\udfff", "content": "a"}], "the role of message 0 .* lone surrogate"),
        ([{"role": "user", "content": "\ud83d"}], "the content of message 0 .* lone surrogate"),
    ],
)
def test_what_is_no_chat_is_refused_by_its_message(chat, says):
    with pytest.raises(ValueError, match=says):
        take_images(chat)


@pytest.mark.parametrize("value", [None, 5, b"a", ["a"], object()])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match="a prompt must be text, got"):
        check_text(value, "a prompt")
    assert check_text("\U0001f600 \0 \x1b", "a prompt") == "\U0001f600 \0 \x1b"


# --- templates --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> catp_jax.Model:
    """The shipped model, with a template."""
    model = catp_jax.load(ASSETS / "mini-llama-vision")
    model.reader.processor.chat_template = TEMPLATE
    return model


def test_a_chat_becomes_the_tokens_that_transformers_makes(llama):
    processor = llama.reader.processor
    chat = [
        {"role": "system", "content": "be short"},
        user({"type": "image"}, text("  what color? "), {"type": "image"}, text("and this?")),
    ]
    for template in (TEMPLATE, {"default": TEMPLATE, "other": "x"}):
        processor.chat_template = template
        expected = processor.apply_chat_template(chat, add_generation_prompt=True)
        expected = processor.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert llama.read([RED, BLUE], chat).tokens == expected
        own = [chat[0], user({"type": "image", "image": RED}, *chat[1]["content"][1:])]
        assert llama.read([BLUE], own).tokens == expected
    processor.chat_template = TEMPLATE


def test_images_in_messages_are_those_beside_them(llama):
    chat = [user({"type": "image"}, text("one"), {"type": "image"}, text("two"))]
    own = [
        user(
            {"type": "image", "image": RED},
            text("one"),
            {"type": "image", "url": "http://b"},
            text("two"),
        )
    ]
    fetched = []
    model = replace(llama, fetch=lambda address: fetched.append(address) or BLUE)
    beside = model.prepare([[RED, BLUE], [RED, BLUE]], [chat, chat])
    inside = model.prepare(None, [own, own])
    arrays = [jax.tree.leaves(packed.inputs) for packed in (beside, inside)]
    for a, b in zip(*arrays, strict=True):
        assert (a == b).all()
    assert fetched == ["http://b"]
    with pytest.raises(ValueError, match="prompt 1: image 'http://b' is a web address"):
        llama.prepare([[RED, BLUE], None], [chat, own])
    with pytest.raises(ValueError, match=r"1 <\|image\|> marks and 2 images"):
        llama.prepare([BLUE], [[user({"type": "image", "image": RED}, text("a"))]])


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power of variables": "{% set n = 9999999 %}{{ (n ** n) % 7 }}",
    "doubling": "{% set a = namespace(t='ab') %}{% for i in range(99) %}"
    "{% set a.t = a.t + a.t %}{% endfor %}{{ a.t }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_never_ends_is_stopped_and_the_next_chat_is_read(kind, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    templates._stop()  # another may be running, with more time
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"does not end within 0\.5 seconds|refuses this chat"):
        render(ENDLESS[kind], [user(text("a"))], {})
    assert time.monotonic() - started < 30  # with the start of a process, on a busy machine
    assert render("{{ messages[0].role }}", [user(text("a"))], {}) == "user"
    templates._stop()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ('{{ raise_exception("only two roles") }}', "only two roles"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 'a ' * 3000000 }}", "a text of 6000000 characters"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' * 9 ** 11 }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].content + 5 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(5) }}", "SecurityError"),
        ("{% include 'a' %}", "TypeError|TemplateNotFound|no loader"),
    ],
)
def test_a_template_that_fails_says_why(template, says):
    with pytest.raises(ValueError, match=rf"refuses this chat: .*({says})"):
        render(template, [user(text("a"))], {})


def test_what_a_template_says_is_its_answer_whatever_it_holds():
    for said in ("", "line\nline\r\n\u2028", '{"error": "x"}', "\x1b[31m", "ü\U0001f600"):
        message = {"role": "user", "content": said}
        assert render("{{ messages[0].content }}", [message], {}) == said
    assert render("{{ bos }}{{ x }}", [user()], {"bos": "<s>"}) == "<s>"
    with pytest.raises(ValueError, match="a chat holds text, numbers and lists"):
        render("", [{"role": "user", "content": "a", "more": RED}], {})


def test_bad_prompts_are_one_clear_error(llama):
    for prompt, says in [
        ("\ud800", "a prompt holds half a character"),
        (5, "a prompt must be text, got int 5"),
        (None, "a prompt must be text, got None"),
        ({"role": "user"}, "a prompt must be text, got dict"),
        ([{"role": "tool", "content": "a"}], "refuses this chat: .*no tools here"),
    ]:
        with pytest.raises(ValueError, match=says):
            llama.read(None, prompt)
    llama.reader.processor.chat_template = "{{ '\\ud800' }}"
    with pytest.raises(ValueError, match=r"template makes .* holds half a character"):
        llama.read(None, [user(text("a"))])
    llama.reader.processor.chat_template = {"other": TEMPLATE}
    with pytest.raises(ValueError, match="no chat template"):
        llama.read(None, [user(text("a"))])
    llama.reader.processor.chat_template = TEMPLATE
