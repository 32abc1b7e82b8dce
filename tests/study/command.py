"""`catp-jax study`, in the test's own process."""

import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from catp_jax import cli_study

MINI = Path(__file__).resolve().parents[2] / "catp_jax" / "assets" / "mini-llama-vision"


class Loaded(Exception):
    """The model was loaded."""


def study(*words):
    return CliRunner().invoke(cli_study.app, [str(word) for word in words])


def refused(result, *said):
    """The message, whether typer shows it or the command line's entry point will."""
    assert result.exit_code != 0
    if isinstance(result.exception, ValueError | FileNotFoundError):
        message = str(result.exception)
    else:
        assert isinstance(result.exception, SystemExit), result.exception
        message = " ".join(result.output.replace("│", " ").split())
    for words in said:
        assert words in message
    return message


def questions(folder, number=6):
    lines = []
    for n in range(number):
        Image.new("RGB", (4, 4)).save(folder / f"{n // 2}.png")
        lines.append({"image": f"{n // 2}.png", "question": f"is it {n}?", "answer": "yes"})
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path
