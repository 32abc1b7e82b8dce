"""The arrows between the rooms, kept by reading the imports of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room: the rooms it imports, besides itself. A room is a module or package of catp_jax, or
# `convert`; "catp_jax" is the package's own __init__, which everything else lies below.
ROOMS: dict[str, set[str]] = {
    room: set(below.split())
    for room, below in {
        "struct": "",
        "files": "",
        "leaves": "",
        "lines": "",
        "messages": "",
        "strict_json": "",
        "targets": "",
        "terminal": "",
        "reductions": "struct",
        "contract": "struct reductions",
        "models": "struct contract",
        "pruning": "struct contract",
        "sharding": "struct",
        "checkpoint": "leaves messages",
        "convert": "files leaves messages strict_json terminal models checkpoint",
        "generation": "struct contract",
        "readers": (
            "struct contract files messages strict_json terminal models pruning sharding generation"
        ),
        "study": (
            "struct contract lines messages strict_json terminal targets pruning generation readers"
        ),
        # it trains on the study's tasks, and writes what it trained in Hugging Face format
        "training": "struct contract models pruning readers study convert",
        "answers": "contract generation readers",
        "loaded": "contract models sharding generation readers",
        "model": "contract pruning sharding generation readers answers loaded",
        "guided": "contract pruning generation readers answers model",
        "families": "models generation readers convert",
        "api": "models sharding generation readers convert families model",
        "matching": "models sharding generation readers convert",
        "batch": "lines sharding generation readers answers model",
        # their models, as others' harnesses ask them
        "evaluation": "pruning generation readers study answers api batch",
        "plan": "leaves terminal targets models pruning sharding generation convert families",
        "doctor": "models pruning sharding convert families plan",
        "cli_options": "pruning generation readers",
        "cli_generate": (
            "terminal sharding generation readers convert families model api batch cli_options"
        ),
        "cli_sweep": "messages terminal sharding readers study model",
        "cli_compared": "pruning study cli_options terminal",
        "cli_study": (
            "terminal targets sharding readers study training convert families api "
            "cli_options cli_compared cli_sweep"
        ),
        "cli_calibrate": (
            "contract terminal pruning generation sharding study training model api cli_options"
        ),
        "cli_demo": "contract terminal readers study training model api cli_options cli_sweep",
        "cli_cluster": "terminal targets sharding families plan doctor cli_options",
        "cli": (
            "terminal sharding readers convert matching catp_jax cli_options cli_generate "
            "cli_sweep cli_study cli_cluster cli_calibrate cli_demo"
        ),
        "catp_jax": "answers model api matching",
        "__main__": "cli",
    }.items()
}

# package: the only modules that may import it.
GUESTS = {
    "torch": set(),
    "transformers": {
        "catp_jax.readers.processor",
        "catp_jax.readers.render",
        "catp_jax.readers.mllama",
        "convert.configs",
        "catp_jax.training.tokenizer",
    },
    "lmms_eval": {"catp_jax.evaluation", "catp_jax.evaluation.lmms_eval"},
    "vlmeval": {"catp_jax.evaluation.vlmevalkit"},
}

SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "base"}


def module_name(path: Path) -> str:
    """catp_jax/models/__init__.py -> catp_jax.models"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    path: module_name(path)
    for package in ("catp_jax", "convert")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def room_of(module: str) -> str | None:
    """The room a dotted name lies in; None for other people's packages."""
    top, _, rest = module.partition(".")
    if top == "catp_jax":
        return rest.partition(".")[0] or "catp_jax"
    return "convert" if top == "convert" else None


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported, wherever in the file it stands."""
    package = module if is_package else module.rpartition(".")[0]

    def absolute(name: str, level: int) -> str:
        if level == 0:
            return name
        parts = package.split(".")
        return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])

    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                # `from catp_jax import models` names a room; `from .attention import Block` does
                # not, but its longer name still lies in the right one.
                base = absolute(source or "", level)
                for alias in names:
                    is_room = base == "catp_jax" and alias.name in ROOMS
                    inside = base != "catp_jax" and alias.name != "*"
                    longer = is_room or inside
                    yield node.lineno, f"{base}.{alias.name}" if longer else base
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                bare = name.lstrip(".")
                yield node.lineno, absolute(bare, len(name) - len(bare))


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a file does that the house forbids, a line each."""
    tree = ast.parse(source)
    room = room_of(module)
    found = []
    if room not in ROOMS:
        return [f"{module}: no such room in the table of this test"]
    if SAYS_NOTHING & set(module.split(".")):
        found.append(f"{module}: a name that says nothing")

    for line, name in imports(tree, module, is_package):
        top = name.partition(".")[0]
        other = room_of(name)
        if other not in {None, room} and other not in ROOMS[room]:
            found.append(f"{module}:{line}: {room} may not import {name}")
        if top in GUESTS and module not in GUESTS[top]:
            found.append(f"{module}:{line}: {top} is imported here")
        if name in {"jax.nn.gelu", "flax.nnx.gelu", "flax.nnx.jit", "flax.nnx.Cache"}:
            found.append(f"{module}:{line}: {name} by its bare name")

    # gelu is fine where a call, its own or partial's, says which form is meant.
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(k.arg == "approximate" for k in node.keywords):
            named |= {id(part) for part in (node.func, *node.args)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value).rpartition(".")[2]
        if owner == "nnx" and node.attr in {"jit", "Cache"}:
            found.append(f"{module}:{node.lineno}: nnx.{node.attr}")
        if node.attr == "sow":
            found.append(f"{module}:{node.lineno}: sow")
        if owner in {"nn", "nnx"} and node.attr == "gelu" and id(node) not in named:
            found.append(f"{module}:{node.lineno}: gelu without approximate=")
    return found


def test_there_is_something_to_check():
    assert {module.partition(".")[0] for module in SOURCES.values()} == {"catp_jax", "convert"}


@pytest.mark.parametrize("path", SOURCES, ids=SOURCES.values())
def test_file_keeps_the_arrows(path: Path):
    found = faults(path.read_text(), SOURCES[path], path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_arrows_have_no_cycle():
    """The table itself: following the arrows down never leads back."""
    order = list(TopologicalSorter(ROOMS).static_order())
    assert set(order) == set(ROOMS)
    assert "models" not in ROOMS["pruning"]
    assert "pruning" not in ROOMS["models"]


def test_every_arrow_is_used():
    """A row says what its room imports, and no more."""
    used = {room: set[str]() for room in ROOMS}
    for path, module in SOURCES.items():
        found = imports(ast.parse(path.read_text()), module, path.name == "__init__.py")
        used[room_of(module) or ""] |= {room_of(name) for _, name in found}
    unused = {room: below - used[room] for room, below in ROOMS.items()}
    assert {room: below for room, below in unused.items() if below} == {}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("catp_jax.models.vit", "from catp_jax.pruning import catp", "may not import"),
        ("catp_jax.models.vit", "from ..pruning.scores import votes", "may not import"),
        ("catp_jax.models.vit", "from .. import pruning", "may not import"),
        ("catp_jax.models.vit", "import catp_jax", "may not import"),
        ("catp_jax.models.vit", "from catp_jax import load", "may not import"),
        ("catp_jax.pruning.catp", "def f():\n    import catp_jax.models.vit", "may not import"),
        ("catp_jax.contract", "from .models import vit", "may not import"),
        ("catp_jax.struct", "from . import contract", "may not import"),
        ("catp_jax.study.sweep", "import convert.rules", "may not import"),
        ("catp_jax.api", "from .cli import main", "may not import"),
        ("catp_jax.generation.beam", "from catp_jax import models", "may not import"),
        ("convert.rules", "from catp_jax.pruning import catp", "may not import"),
        ("convert.rules", "import_module('catp_jax.generation')", "may not import"),
        ("convert.reader", "importlib.import_module('torch')", "torch is imported"),
        ("catp_jax.api", "import torch.nn as nn", "torch is imported"),
        ("convert.rules", "from transformers import AutoConfig", "transformers is imported"),
        ("catp_jax.models.vit", "@nnx.jit\ndef f(): ...", "nnx.jit"),
        ("catp_jax.models.vit", "from flax.nnx import jit", "flax.nnx.jit"),
        ("catp_jax.models.vit", "cache: nnx.Cache", "nnx.Cache"),
        ("catp_jax.models.vit", "self.sow('a', 'b', x)", "sow"),
        ("catp_jax.models.vit", "jax.nn.gelu(x)", "gelu without"),
        ("catp_jax.models.vit", "TABLE = {'gelu': nnx.gelu}", "gelu without"),
        ("catp_jax.models.vit", "from jax.nn import gelu", "bare name"),
        ("catp_jax.models.utils", "", "says nothing"),
        ("catp_jax.odds_and_ends", "", "no such room"),
    ],
)
def test_checker_finds(module: str, source: str, fault: str):
    assert any(fault in line for line in faults(source, module))


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("catp_jax.models.vit", "from ..contract import View\nfrom .layers import Norm", False),
        ("catp_jax.models", "from .vit import ViT\nfrom . import layers", True),
        ("catp_jax.models.vit", "TABLE = {'gelu': partial(jax.nn.gelu, approximate=False)}", False),
        ("catp_jax.models.vit", "y = jax.nn.gelu(x, approximate=True)", False),
        ("catp_jax.readers.chat", "from catp_jax import models, pruning", False),
        ("convert.mllama", "from catp_jax.models.mllama import MllamaConfig", False),
        ("convert.configs", "import transformers", False),
        ("catp_jax.api", "from convert import reader\nfrom . import readers", False),
        ("catp_jax", "from .api import load", True),
    ],
)
def test_checker_lets_pass(module: str, source: str, is_package: bool):
    assert faults(source, module, is_package) == []


@pytest.mark.usefixtures("with_torch")
def test_import_is_quiet_and_light(tmp_path: Path):
    """A fresh interpreter: nothing printed, no torch, no matplotlib, and no device started by any
    module.
    """
    script = """
import importlib, pkgutil, sys
import catp_jax, catp_jax.api, convert
heavy = {"torch", "matplotlib"} & set(sys.modules)
assert not heavy, f"the import brings in {heavy}"
for package in (catp_jax, convert):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        # a harness's adapter is imported by the harness alone, which is there then
        is_adapter = module.name.startswith("catp_jax.evaluation.")
        if not (is_adapter or module.name.endswith("__main__")):
            importlib.import_module(module.name)
import jax
jax.config.update("jax_num_cpu_devices", 2)  # raises once a backend has been started
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
