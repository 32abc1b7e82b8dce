"""The command `catp-jax`, run in the test's own process: starting one takes longer than a test."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from catp_jax.__main__ import main


def catp_jax(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a user sees: exit code, and what is said to stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or "."),
        patch.object(sys, "argv", ["catp-jax", *map(str, words)]),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
            if isinstance(code, str):  # as Python does at a process's end
                print(code, file=sys.stderr)
                code = 1
    return subprocess.CompletedProcess([*words], code, out.getvalue(), err.getvalue())
