"""What README and docs/ tell a reader to type: every command runs, in the order of the page.

Blocks fenced `sh` and `python` are tested; output and commands that need other people's weights
stand in `text` blocks. All blocks share one folder that looks like a clone, since a reader's do.

What starts with `catp-jax` is run in the test's own process, but for the first: starting one takes
longer than most answers. The shipped models have their first layers alone, since only what a
command does is looked at; what the whole ones answer is tested in training/.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.command import catp_jax
from tests.shallow import ASSETS, CUT, shallow

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))

RUN = {"catp-jax", "python", "printf"}
PASSED_OVER = {"git", "cd", "source", "."}  # getting the code and entering it
MADE = {"build", "dist", "demo", "runs"}  # in a checkout, but in no clone


def blocks(text: str) -> list[tuple[int, str, str]]:
    """(line, language, body) of each fenced block marked `sh` or `python`."""
    fence = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in fence.finditer(text)]


def commands(body: str) -> list[str]:
    """The commands of a shell block: comments dropped, lines joined up to where one is whole."""
    found, held = [], ""
    for line in body.splitlines():
        held += line
        if held.endswith("\\"):
            held = held[:-1]
            continue
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # an open quote: the command goes on
            held += "\n"
            continue
        if words:
            found.append(held.strip())
        held = ""
    assert not held, f"a command of README does not end: {held}"
    return found


def words_of(command: str) -> list[str]:
    """The words of a command, after its `NAME=value` and without the path of the environment."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def unknown(command: str) -> str | None:
    """What a command that is not run names but the project lacks."""
    words = words_of(command)
    if words[:2] == ["python", "-m"] or words[:2] == ["python3", "-m"]:
        words = words[2:]
    match words:
        case ["make", *targets]:
            here = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            gone = [word for word in targets if "=" not in word and word not in here]
            return f"make target {gone}" if gone else None
        case ["pip", "install", *_]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            asked = {
                e for extras in re.findall(r"\[([\w,-]+)\]", command) for e in extras.split(",")
            }
            gone = asked - set(project["optional-dependencies"])
            return f"extra {sorted(gone)}" if gone else None
        case ["venv", *_]:
            return None
        case [word, *_] if word in PASSED_OVER:
            return None
    return f"command {words[0]!r}: neither run nor checked by tests/test_readme.py"


def is_run(command: str) -> bool:
    words = words_of(command)
    return words[0] in RUN and words[1:3] not in (["-m", "pip"], ["-m", "venv"])


STEPS = [
    pytest.param(language, step, id=f"{page.stem}-line-{line}-{number}")
    for page in PAGES
    for line, language, body in blocks(page.read_text())
    for number, step in enumerate(commands(body) if language == "sh" else [body], start=1)
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a clone holds, and whatever the steps before have made."""
    folder = tmp_path_factory.mktemp("clone")
    assets = folder / "catp_jax" / "assets"
    assets.mkdir(parents=True)
    for path in (*ROOT.iterdir(), *(ROOT / "catp_jax").iterdir(), *ASSETS.iterdir()):
        own = folder / path.relative_to(ROOT)
        if not (own.exists() or path.name.startswith(".") or path.name in MADE):
            own.symlink_to(shallow(path.name) if path.name in CUT else path)
    return folder


FIRST = next(step.values[1] for step in STEPS if step.values[1].startswith("catp-jax "))


@pytest.mark.parametrize(("language", "step"), STEPS)
def test_readme_step_works(language: str, step: str, clone: Path):
    if language == "sh" and not is_run(step):
        assert unknown(step) is None
        return
    if step.startswith("catp-jax ") and step != FIRST and not set(step) & set("|&;<>$`"):
        run = catp_jax(*shlex.split(step, comments=True)[1:], cwd=clone)
        assert run.returncode == 0, f"{step}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        return
    # As a reader's shell would be: the environment's commands first, as many devices as there are.
    # What makes the tests quick is as in conftest.py: how XLA compiles, where programs are kept,
    # and that no torch is found.
    bin_dir = str(Path(sys.executable).parent)
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    env = os.environ | {"XLA_FLAGS": flags.strip()}
    env["PATH"] = bin_dir + os.pathsep + env["PATH"]
    if language == "python":
        argv = [sys.executable, "-c", step]
    else:
        argv = ["bash", "-euo", "pipefail", "-c", step.replace(".venv/bin/", "")]
    run = subprocess.run(
        argv,
        cwd=clone,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{step}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


def test_readme_shows_both_kinds():
    languages = {language for _, language, _ in blocks(README.read_text())}
    assert languages == {"sh", "python"}


def test_blocks_and_commands_are_found():
    page = """
```text
catp-jax not-run
```
```sh
# a comment
make demo      # creates .venv
catp-jax generate MODEL \\
  --keep 50%   # half
python -c "a = 1
print(a)"
```
```python
import catp_jax
```
"""
    (_, _, shell), (line, language, code) = blocks(page)
    assert commands(shell) == [
        "make demo      # creates .venv",
        "catp-jax generate MODEL   --keep 50%   # half",
        'python -c "a = 1\nprint(a)"',
    ]
    assert (line, language, code) == (13, "python", "import catp_jax\n")


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        ("catp-jax --help", True),
        (".venv/bin/catp-jax --help", True),
        ("XLA_FLAGS=--a python x.py", True),
        ("python -m convert a b", True),
        ("python -m pip install .", False),
        ("make test", False),
        ("git clone x", False),
    ],
)
def test_which_commands_run(command: str, runs: bool):
    assert is_run(command) == runs


@pytest.mark.parametrize(
    "command", ["make test", "make PYTHON=python3.12 demo", "pip install -e '.[demo,cuda]'", "cd x"]
)
def test_known_names_pass(command: str):
    assert unknown(command) is None


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make tea", "make target ['tea']"),
        ("python -m pip install '.[tpu]'", "extra ['tpu']"),
        ("curl x", "command 'curl'"),
    ],
)
def test_unknown_names_are_found(command: str, fault: str):
    assert fault in str(unknown(command))
