"""Folders and paths as every command takes them: names in the Hugging Face cache, `~`, and config
keys that are passed over.
"""

import inspect
import json
import shutil
from pathlib import Path

import pytest

from catp_jax import cli, cli_study
from catp_jax.families import find_config
from tests.command import catp_jax

ASSETS = Path(cli.__file__).parent / "assets"
MINI = ASSETS / "mini-llama-vision"
CIRCLE = ASSETS / "blue-circle.png"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = ["--prompt", "what color is the shape?"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a cache of one model, org/mini, whose config.json has a key that is not known."""
    model = tmp_path / "hub" / "models--org--mini"
    snapshot = model / "snapshots" / COMMIT
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(MINI, snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"sparkle": 1}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(CIRCLE, tmp_path / "circle.png")
    return tmp_path


COMMANDS = {
    "generate": ["generate", "MODEL", *ASK],
    "match": ["match", "MODEL", "--image", str(CIRCLE), "--text", "a"],
    "study": ["study", "MODEL", "--limit", "1", "--out=~/study.jsonl"],
    "convert": ["convert", "MODEL", "~/converted"],
    "plan": ["plan", "MODEL"],
    "doctor": ["doctor", "MODEL"],
    "calibrate": ["calibrate", "MODEL", "--method", "eigen", "--samples", "4", "--out=~/learned"],
    "demo": ["demo", "--model", "MODEL", "--out=~/figures"],
}


def run(name, model, *words):
    done = catp_jax(*(model if word == "MODEL" else word for word in COMMANDS[name]), *words)
    assert "Traceback" not in done.stderr
    return done


def test_every_command_is_here():
    names = {*COMMANDS} - {"study"}
    assert {command.callback.__name__ for command in cli.app.registered_commands} == names


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_is_not_in_the_cache_is_refused_with_what_to_do(home, name):
    done = run(name, "org/other")
    assert done.returncode == 1
    assert "download it with `hf download org/other`" in done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_key_that_is_not_known_is_refused_with_an_option_that_the_command_has(home, name):
    done = run(name, "org/mini")  # it is found
    assert done.returncode == 1
    assert "--ignore-config sparkle" in done.stdout + done.stderr
    other = run(name, "org/mini", "--ignore-config", "nothing")
    assert other.returncode == 1
    assert "sparkle" in other.stdout + other.stderr


@pytest.mark.parametrize("name", ["match", "convert", "plan", "doctor"])
def test_a_key_is_passed_over_where_it_is_asked_for(home, name, monkeypatch):
    def make_plan(model, mesh, *, ignore_config, **_):
        raise ValueError(f"planned {find_config(model, ignore_config).text.vocab_size}")

    monkeypatch.setattr("catp_jax.plan.force_devices", lambda number: None)  # JAX has started
    monkeypatch.setattr("catp_jax.plan.make_plan", make_plan)
    done = run(name, "org/mini", "--ignore-config", "sparkle")
    text = done.stdout + done.stderr
    if name == "match":  # it is another kind of model
        assert "generates text" in text
    elif name == "plan":
        assert "planned" in text
    else:
        assert done.returncode == 0, text
    assert (home / "converted").is_dir() == (name == "convert")


def test_a_study_of_a_name_goes_by_it_and_paths_may_be_at_home(home):
    line = {"image": "circle.png", "question": "what color is the shape?", "answer": "blue"}
    (home / "mine.jsonl").write_text(json.dumps(line))
    words = ["--task", "jsonl", "--data=~/mine.jsonl", "--prune", "k_norm", "--keep", "16"]
    options = ["--ignore-config", "sparkle", "--processor=~/other", "--mask-mode", "hf"]
    shutil.copytree(MINI, home / "other")
    done = catp_jax("study", "org/mini", *words, *options)
    assert done.returncode == 0, done.stderr
    written = home / "runs" / "mini-jsonl.jsonl"
    header = json.loads(written.read_text().partition("\n")[0])
    assert header["name"] == "mini"
    loading = {"ignore_config": ["sparkle"], "processor": "other", "mask_mode": "hf"}
    assert header["conditions"]["loading"] == loading
    other = catp_jax("study", "org/mini", *words, *options[:3])
    assert other.returncode == 1
    assert 'conditions.loading.mask_mode: "hf" → nothing' in other.stderr
    report = catp_jax("study", "report", "~/runs/mini-jsonl.jsonl", "--out=~/deep/report")
    assert report.returncode == 0, report.stderr
    assert (home / "deep" / "report" / "report.md").is_file()


def test_generates_paths_may_be_at_home(home):
    row = {"prompt": "what color is the shape?", "image": "circle.png"}
    (home / "rows.jsonl").write_text(json.dumps(row))
    words = ["--batch=~/rows.jsonl", "--out=~/answers.jsonl", "--adapter=~/none"]
    done = catp_jax("generate", MINI, *words)
    assert done.returncode == 1
    assert "~/none is not a folder" in done.stderr
    done = catp_jax("generate", MINI, *words[:2])
    assert done.returncode == 0, done.stderr
    assert json.loads((home / "answers.jsonl").read_text())["text"] == "blue"


def test_all_options_that_name_a_file_take_a_home():
    """No option is a bare Path, whose `~` would be a folder of that name."""
    for command in [*cli.app.registered_commands, *cli_study.app.registered_commands]:
        for name, parameter in inspect.signature(command.callback).parameters.items():
            if Path.__name__ in str(parameter.annotation):
                (option,) = parameter.annotation.__metadata__
                assert option.parser is not None, f"{command.callback.__name__} {name}"


def test_convert_there_and_back_is_byte_equal_and_refuses_to_overwrite(tmp_path):
    there = catp_jax("convert", MINI, tmp_path / "orbax")
    assert there.returncode == 0, there.stderr
    assert "vision_model.patch_embedding.kernel" in there.stdout
    back = catp_jax("convert", tmp_path / "orbax", tmp_path / "hf", "--to-hf")
    assert back.returncode == 0, back.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (MINI / name).read_bytes()
    answer = catp_jax("generate", tmp_path / "orbax", "--image", CIRCLE, *ASK)
    assert answer.stdout == "blue\n"
    again = catp_jax("convert", MINI, tmp_path / "orbax")
    assert again.returncode == 1
    assert "exists already" in again.stderr
