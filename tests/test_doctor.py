"""What `catp-jax doctor` finds: known-bad versions, meshes, kernels, room; and its exit code."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packaging.requirements import Requirement

import convert
from catp_jax import doctor
from catp_jax.contract import Keep
from catp_jax.doctor import Checkpoint, examine, heads, processes, versions
from catp_jax.families import find_config
from catp_jax.plan import abstract_model
from catp_jax.sharding import distributed
from tests.command import catp_jax

MINI = Path(doctor.__file__).parent / "assets" / "mini-blip2-opt"
GOOD = {
    "python": "3.12.1",
    "jax": "0.12.0",
    "jaxlib": "0.12.0",
    "flax": "0.12.12",
    "orbax-checkpoint": "0.12.8",
    "transformers": "5.23.0",
    "numpy": "2.4.0",
    "jax-cuda12-plugin": "",
    "jax-cuda13-plugin": "",
}


def test_a_good_installation_is_one_line():
    (one,) = versions(GOOD)
    assert (one.level, "jax 0.12.0" in one.text) == ("ok", True)


@pytest.mark.parametrize(
    ("changed", "level", "says"),
    [
        ({"jaxlib": "0.11.0"}, "warn", "goes with jaxlib 0.12.0, not 0.11.0"),
        ({"flax": "0.12.8"}, "fail", "0.12.8"),
        (
            {"orbax-checkpoint": "0.13.0"},
            "fail",
            "orbax-checkpoint<0.13,>=0.12, not 0.13.0",
        ),
        ({"transformers": ""}, "fail", "transformers is missing"),
        ({"transformers": "6.0.1"}, "fail", "requires transformers<6,>=5.23, not 6.0.1"),
        ({"numpy": "1.26.4"}, "fail", "requires numpy>=2.0, not 1.26.4: pip install 'numpy>=2.0'"),
        ({"jax-cuda12-plugin": "0.11.0"}, "fail", "0.11.0 does not go with jaxlib 0.12.0"),
    ],
)
def test_pairs_that_are_known_to_be_bad(changed, level, says):
    found = list(versions(GOOD | changed))
    assert [one.level for one in found] == ["ok", level]
    assert says in found[1].text


def test_processes_that_are_not_connected_are_noticed():
    (one,) = processes({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})
    assert (one.level, "--distributed" in one.text) == ("warn", True)
    assert [one.level for one in processes({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"})] == ["ok"]
    (pod,) = processes({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"})
    assert (pod.level, "several pods" in pod.text) == ("warn", True)
    assert [one.level for one in processes({})] == ["ok"]


def test_every_subject_of_a_model_on_this_machine():
    found = list(examine(MINI))
    assert [one.subject for one in found if one.level == "fail"] == []
    subjects = {one.subject for one in found}
    assert subjects == {
        *("versions", "devices", "processes", "mesh", "attention", "top-k", "memory", "disk"),
        "weights",
    }
    text = {one.subject: one.text for one in found}
    assert text["mesh"].startswith("data=4,tensor=2 divides")  # 4 heads in the tower, 6 elsewhere
    assert "devices: 8" in text["top-k"]


def test_heads_of_every_part_are_tried():
    for name, sizes in {"Llama-3.2-11B-Vision": {80, 128}, "blip2-opt-2.7b": {80, 88}}.items():
        config = find_config(name)
        abstract = abstract_model(config, np.dtype("float16"))
        found = heads(Checkpoint(config, None, abstract))
        assert found == {(size, "float16") for size in sizes}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The mini in float16, as a Hugging Face folder, and converted."""
    folder = tmp_path_factory.mktemp("half")
    model, config = convert.load(MINI, "float16")
    convert.write_hf(model, convert.config_json(config), folder / "hf", side_files=MINI)
    convert.to_orbax(folder / "hf", folder / "orbax")
    return folder


def test_the_number_types_that_are_tried_are_those_of_a_load(half):
    config = find_config(MINI)
    folders = {MINI: "float32", half / "hf": "float16", half / "orbax": "float16"}
    for folder, stored in folders.items():
        for dtype in (None, "bfloat16", "float32"):
            abstract = convert.load_abstract(folder, dtype)
            assert {kind for _, kind in heads(Checkpoint(config, folder, abstract))} == {
                dtype or stored
            }
    loaded = convert.load(half / "hf")[0]
    planned = convert.load_abstract(half / "hf")
    types = [jax.tree.map(lambda leaf: str(leaf.dtype), nnx.state(x)) for x in (loaded, planned)]
    assert jax.tree.leaves(types[0]) == jax.tree.leaves(types[1])


def test_a_folder_in_float16_is_examined_in_float16(half):
    found = list(examine(half / "hf"))
    assert [one for one in found if one.level == "fail"] == []
    (first, *rest) = [one.text for one in found if one.subject == "attention"]
    assert all("in float16: XLA's works" in text for text in (first, *rest))
    (memory,) = [one.text for one in found if one.subject == "memory"]
    assert "on each device in float16 and float32," in memory  # the Q-Former always is


def test_weights_that_do_not_do_are_said_once_and_the_rest_is_looked_at(tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(MINI, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = list(examine(folder))
    (failed,) = [one for one in found if one.level == "fail"]
    assert (failed.subject, "model.safetensors" in failed.text) == ("model", True)
    assert {one.subject for one in found} >= {"versions", "mesh", "attention", "memory"}


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    def broken(kinds):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(doctor, "backends", broken)
    found = list(examine())
    (failed,) = [one for one in found if one.level == "fail"]
    assert (failed.subject, failed.text) == ("attention", "no such kernel")
    assert found[-1].subject == "top-k"


def test_a_wrong_choice_of_tokens_is_noticed(monkeypatch):
    def first(keep, member, scores):
        return Keep(indices=jnp.zeros((scores.shape[0], keep), jnp.int32), valid=member[:, :keep])

    monkeypatch.setattr(doctor, "keep_best", first)
    (one,) = doctor.top_k()
    assert (one.level, "chose other tokens" in one.text) == ("fail", True)


def test_a_model_that_is_none_is_said_once_and_the_rest_is_looked_at():
    found = list(examine("nowhere"))
    (failed,) = [one for one in found if one.level == "fail"]
    assert (failed.subject, "nowhere" in failed.text) == ("model", True)
    assert {one.subject for one in found} >= {"versions", "devices", "mesh", "top-k"}


@pytest.mark.parametrize("mesh", ["", "tensor=3"])
def test_a_mesh_that_does_not_do_is_said_once(mesh):
    found = list(examine(MINI, mesh))
    assert [one.subject for one in found if one.level == "fail"] == ["mesh"]
    assert {one.subject for one in found} >= {"disk", "weights"}


def test_the_bounds_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {Requirement(text).name for text in project["dependencies"]}
    assert {one.name for one in doctor.required()} == declared & {*doctor.NEEDED}


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("jax", ["doctor"]),
        ("flax", ["doctor"]),
        ("orbax", ["convert", str(MINI), str(MINI / "never")]),
        ("transformers", ["generate", str(MINI), "--prompt", "is there a circle?"]),
    ],
)
def test_a_package_that_is_missing_is_named(package: str, words: list[str]):
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['catp-jax', *{words}]; "
        "from catp_jax.__main__ import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == f"catp-jax: the package {package} is missing: pip install catp-jax\n"


@pytest.mark.parametrize("words", [["doctor"], ["generate", str(MINI), "--prompt", "x"]])
def test_a_platform_that_is_not_there_is_said(words: list[str]):
    run = subprocess.run(
        [sys.executable, "-m", "catp_jax", *words],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "JAX finds no device (JAX_PLATFORMS=cuda)" in run.stdout + run.stderr


def test_memory_that_does_not_do_fails(monkeypatch):
    monkeypatch.setattr(doctor, "device_memory", lambda: 10**9)
    found = {one.subject: one for one in examine("Llama-3.2-90B-Vision", "tensor=8")}
    assert found["memory"].level == "fail"
    assert "but it has 1 GB" in found["memory"].text


def test_what_other_processes_warn_of_is_told_by_the_first(monkeypatch):
    others = [
        {"level": "ok", "subject": "top-k", "text": "fine"},
        {"level": "fail", "subject": "disk", "text": "full"},
    ]
    monkeypatch.setattr(distributed, "gathered", lambda own: [own, json.dumps(others)])
    done = catp_jax("doctor", "--json")
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[-1] == {"level": "fail", "subject": "disk", "text": "process 1: full"}
    assert [one["level"] for one in found].count("fail") == 1


def test_the_command_says_so_in_its_exit_code():
    def run(*words):
        return catp_jax("doctor", *words)

    good = run(str(MINI), "--json")
    assert good.returncode == 0, good.stdout
    assert {json.loads(line)["level"] for line in good.stdout.splitlines()} <= {"ok", "warn"}
    bad = run(str(MINI), "--mesh", "tensor=8")
    assert bad.returncode == 1
    assert "fail  mesh" in bad.stdout
    assert "axis vision_heads has 4 heads" in bad.stdout
    assert "Traceback" not in bad.stderr
