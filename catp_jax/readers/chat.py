"""Chat messages: checked before a template sees them, and their images taken out in order.

A message is {"role": …, "content": …}; its content is text, or a list of parts:

    {"type": "text", "text": "what is this?"}
    {"type": "image", "path": "a.png"}       also "image", "url", "base64"; or none of them
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from catp_jax.messages import short
from catp_jax.readers.images import ImageLike, within

SOURCES = ("image", "path", "url", "base64")
MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id")
PARTS = {
    "text": ("type", "text"),
    "image": ("type", *SOURCES),
    "image_url": ("type", "image_url"),
}


def take_images(
    messages: Sequence[dict[str, Any]],
    images: Sequence[ImageLike] = (),
    folder: Path | None = None,
) -> tuple[list[dict[str, Any]], list[ImageLike]]:
    """The messages with bare image parts, and the images in the order of their parts.

    A part without an image of its own takes the next one of `images`. Paths are relative to
    `folder`, if there is one.

    Raises ValueError for what is no chat, and if `images` are too few.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"a chat must be a list of at least one message, got {_got(messages)}")
    others, found = list(images), []
    out = [
        _message(message, f"message {number} of the chat", others, found, folder)
        for number, message in enumerate(messages)
    ]
    return out, found + others  # those left over have a mark in a text, or one too few


def check_text(text: Any, name: str) -> str:
    """The text. Raises ValueError if it is none, or half a character stands alone in it."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {_got(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds half a character at place {error.start} "
            f"({text[error.start]!r}, a lone surrogate); decode the text again"
        ) from None
    return text


def _message(
    message: Any, where: str, others: list[ImageLike], found: list[ImageLike], folder: Path | None
) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f'{where} must be {{"role": …, "content": …}}, got {_got(message)}')
    check_text(message.get("role"), f"the role of {where}")
    _check_keys(message, MESSAGE, where)
    content = message.get("content")
    if isinstance(content, list | tuple):
        parts = [_part(part, where, others, found, folder) for part in content]
        return {**message, "content": parts}
    if content is not None or "tool_calls" not in message:
        check_text(content, f"the content of {where}")
    return dict(message)


def _part(
    part: Any, where: str, others: list[ImageLike], found: list[ImageLike], folder: Path | None
) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in PARTS:
        _check_keys(part, PARTS[kind], f"a part of {where}")
    if kind == "text":
        return {"type": "text", "text": check_text(part.get("text"), f"a text of {where}")}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f'a part of {where} must be {{"type": "text", "text": …}} or {{"type": "image", …}}, '
            f"got {_got(part)}"
        )
    if kind == "image_url":
        url = part.get("image_url")
        part = {"url": url.get("url") if isinstance(url, dict) else url}
        if part["url"] is None:
            raise ValueError(f"an image_url of {where} names no url")
    sources = [name for name in SOURCES if part.get(name) is not None]
    if len(sources) > 1:
        raise ValueError(f"an image of {where} has {' and '.join(sources)}; give one of them")
    if sources:
        found.append(_place(part[sources[0]], sources[0], folder))
    elif others:
        found.append(others.pop(0))
    else:
        raise ValueError(f"an image of {where} is missing; give it in the part, or in images")
    return {"type": "image"}


def _place(source: Any, kind: str, folder: Path | None) -> ImageLike:
    """The image of a part, where a path counts from `folder`."""
    if kind == "base64" and isinstance(source, str) and not source.startswith("data:"):
        return f"data:;base64,{source}"
    return source if folder is None else within(source, folder)


def _check_keys(found: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Raises ValueError for a key that nobody would read: a picture may be in it."""
    if unknown := [key for key in found if key not in known]:
        raise ValueError(
            f"{where} has {', '.join(map(repr, unknown))}, which is not read; it may have "
            f"{', '.join(known)}"
        )


def _got(value: Any) -> str:
    return "None" if value is None else short(f"{type(value).__name__} {value!r}")
