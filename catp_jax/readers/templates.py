"""Chat templates with a limit of time. They run in a process of their own, which ends itself at the
limit: neither a thread nor a signal stops `9**9**9`. It starts with the first chat, in about a
second; a chat then takes less than a millisecond.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS = 10.0  # for one chat

_lock = threading.Lock()
_running: dict[int, subprocess.Popen[str]] = {}  # by our own process: one that forked has its own


def render(template: str, messages: Sequence[dict[str, Any]], tokens: dict[str, Any]) -> str:
    """The chat as one text, up to where the answer begins; `tokens` are special ones by their name.

    Raises ValueError if the template refuses the chat, fails, or takes longer than `SECONDS`.
    """
    request = {"template": template, "messages": messages, "tokens": tokens}
    try:
        line = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a chat holds text, numbers and lists of them ({error})") from None
    with _lock:
        process = _start()
        try:
            process.stdin.write(line + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answered = process.stdout.readline()  # type: ignore[union-attr]
        except OSError:
            answered = ""
        except BaseException:  # Ctrl-C: its answer must not be taken for the next one's
            _stop()
            raise
        if not answered:
            _stop()
            raise ValueError(
                f"the checkpoint's chat template does not end within {SECONDS:g} seconds, or needs "
                "too much memory; take another template, or give the prompt as plain text"
            )
    answer = json.loads(answered)
    if "error" in answer:
        raise ValueError(f"the checkpoint's chat template refuses this chat: {answer['error']}")
    return answer["text"]


def _start() -> subprocess.Popen[str]:
    process = _running.get(os.getpid())
    if process is None or process.poll() is not None:
        _stop()
        program = str(Path(__file__).with_name("render.py"))
        process = subprocess.Popen(
            [sys.executable, "-P", program, str(SECONDS)],  # -P: nothing of this folder is imported
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        _running[os.getpid()] = process
        if not process.stdout.readline():  # type: ignore[union-attr]
            _stop()
            raise ValueError("the process for chat templates did not start; is memory left?")
    return process


@atexit.register
def _stop() -> None:
    if process := _running.pop(os.getpid(), None):
        process.kill()
        process.communicate()
