"""The command line as a user meets it: good input and bad."""

import dataclasses
import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image

import catp_jax as package
from catp_jax import api as catp_jax_api
from catp_jax import cli, cli_cluster, cli_demo, cli_generate, cli_options, cli_study
from catp_jax.generation.beam import EarlyStopping
from catp_jax.generation.options import Options
from catp_jax.matching import load_matcher
from catp_jax.models.cross_decoder import MaskMode
from catp_jax.models.narrow import Weights
from catp_jax.models.tiled_vit import VisionMode
from catp_jax.pruning import BOUNDS, METHODS, is_learned
from catp_jax.sharding.distributed import HEARTBEAT
from catp_jax.study.records import Conditions
from catp_jax.targets import GPUS
from convert.dtypes import READ as DTYPES
from tests.command import catp_jax
from tests.shallow import shallow

ROOT = Path(__file__).resolve().parents[1]
MINI = shallow("mini-llama-vision")
CIRCLE = ROOT / "catp_jax" / "assets" / "blue-circle.png"
ASK = ["--prompt", "what color is the shape?"]


def process(*words):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "catp_jax", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refused(done, *said):
    """One plain message, a non-zero exit, nothing on stdout."""
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    message = " ".join(done.stderr.replace("│", " ").split())  # typer frames its own
    for words in said:
        assert words in message


def test_generate_answers():
    done = process("generate", MINI, "--image", CIRCLE, *ASK)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "blue\n"
    assert not done.stderr


def test_a_process_that_refuses_says_why():
    refused(process("generate", MINI, *ASK, "--image", "nowhere.png"), "nowhere.png", "not a file")
    refused(process("generate", MINI, *ASK, "--top-p", "x"), "--top-p", "number")


def test_generate_pruned_tells_as_json_what_was_kept():
    done = catp_jax(
        *("generate", MINI, "--image", CIRCLE, *ASK, "--json"),
        *("--prune", "trimmed_llama", "--keep", "50%"),
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["visual_tokens"] == 260
    assert len(answer["kept"]) == 130
    assert {place["tile"] for place in answer["kept"]} <= {0, 1, 2, 3}
    assert len({tuple(place.values()) for place in answer["kept"]}) == 130
    (report,) = answer["reports"]
    assert 0 < report["mass"] <= 1


def test_smaller_images_and_means_have_fewer_visual_tokens():
    def row(*words):
        done = catp_jax("generate", MINI, "--image", CIRCLE, *ASK, "--json", *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert row("--image-scale", "0.5")["visual_tokens"] == 65
    assert row("--tiles", "2")["visual_tokens"] == 65
    pooled = row("--prune", "pool", "--keep", "16")
    assert (pooled["visual_tokens"], len(pooled["kept"])) == (260, 16)
    assert all(place["row"] >= 0 for place in pooled["kept"])


def test_a_budget_found_by_the_data_and_sampling_with_a_seed():
    words = [
        *("generate", MINI, "--image", CIRCLE, *ASK, "--json", "--max-new-tokens", 5),
        *("--prune", "trimmed_llama:k_ratio=0.05", "--keep", "auto"),
        *("--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--seed", 3),
    ]
    first, second = catp_jax(*words), catp_jax(*words)
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert answer["reports"][0]["union"] == len(answer["kept"]) >= 13
    assert answer["reports"][0]["overflow"] == 0
    assert first.stdout == second.stdout


def test_a_file_of_requests_goes_on_past_bad_lines(tmp_path):
    rows = [
        {"prompt": "what color is the shape?", "images": [str(CIRCLE)]},
        {"prompt": "what shape is present?", "images": ["missing.png"]},
        "not json",
        {"images": []},
        {"prompt": "<|image|><|image|>is there a circle?", "images": [str(CIRCLE)]},
        {"prompt": "is there a circle?", "images": [str(CIRCLE), str(CIRCLE)]},
        {"prompt": "hello"},
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    done = catp_jax(
        "generate", MINI, "--batch", "rows.jsonl", "--batch-size", 2, "--json", cwd=tmp_path
    )
    assert done.returncode == 1
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["line"] for answer in answers] == [1, 6, 7]
    assert answers[0]["text"] == "blue"
    assert [answer["visual_tokens"] for answer in answers] == [260, 520, 0]
    assert len(done.stderr.splitlines()) == 4
    for line, words in {2: "missing.png", 3: "not JSON", 4: "either a prompt", 5: "2"}.items():
        assert any(f"line {line}" in s and words in s for s in done.stderr.splitlines())


def test_budgets_in_a_file_are_each_lines_own(tmp_path):
    small = tmp_path / "small.png"
    Image.open(CIRCLE).convert("RGB").crop((0, 0, 32, 32)).save(small)
    rows = [{"prompt": ASK[1], "images": [str(image)]} for image in (CIRCLE, small)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["generate", MINI, "--batch", tmp_path / "rows.jsonl", "--json", "--prune", "k_norm"]
    half = catp_jax(*words, "--keep", "50%")
    assert [len(json.loads(line)["kept"]) for line in half.stdout.splitlines()] == [130, 33]
    count = catp_jax(*words, "--keep", "100")  # the small one keeps what it has
    assert [len(json.loads(line)["kept"]) for line in count.stdout.splitlines()] == [100, 65]
    alone = catp_jax(
        *("generate", MINI, "--image", small, *ASK, "--json", "--prune", "k_norm", "--keep", "100")
    )
    assert len(json.loads(alone.stdout)["kept"]) == 65


@pytest.mark.parametrize(
    ("keep", "said"),
    {
        "0": "at least 1",
        "-3": "at least 1",
        "0%": "above 0%",
        "101%": "at most 100%",
        "abc": "'abc'",
    }.items(),
)
def test_a_budget_that_is_none_is_refused(keep, said):
    done = catp_jax(
        "generate", MINI, "--image", CIRCLE, *ASK, "--prune", "trimmed_llama", f"--keep={keep}"
    )
    refused(done, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prune", "nonesuch", "--keep", "4"], ["'nonesuch'; there are catp,", "trimmed_llama"]),
        (["--prune", "fastv:k_ratio=0.5", "--keep", "4"], ["k_ratio=0.5", "layer=…"]),
        (["--prune", "trimmed_llama:k_ratio=x", "--keep", "4"], ["k_ratio", "'x'"]),
        (["--prune", "trimmed_llama"], ["--prune and --keep go together"]),
        (["--keep", "4"], ["--prune and --keep go together"]),
        (["--prune", "k_norm,random", "--keep", "4"], ["got 2 methods and 1 budgets"]),
        (["--prune", "k_norm", "--keep", "50%,4"], ["got 1 methods and 2 budgets"]),
        (["--prune", "k_norm,", "--keep", "50%,4"], ["unknown pruning method ''"]),
        (
            ["--prune", "k_norm", "--prune", "random", "--keep", "4"],
            ["give --prune once, with commas", "--prune k_norm,random"],
        ),
        (["--prune", "k_norm", "--keep", "4", "--keep", "8"], ["give --keep once", "--keep 4,8"]),
        (["--prune", "random", "--keep", "auto"], ["random wants a number"]),
        (["--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--max-new-tokens", "100000"], ["positions"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "0"], ["top_p"]),
        (["--dtype", "int7"], ["int7"]),
        (["--num-beams", "2", "--temperature", "1"], ["num_beams or a temperature"]),
        (["--length-penalty", "0"], ["require num_beams of 2 or more"]),
        (["--min-new-tokens", "9", "--max-new-tokens", "8"], ["at most max_new_tokens (8), got 9"]),
        (["--repetition-penalty", "0"], ["repetition_penalty is above 0"]),
        (["--suppress-token", "9999"], ["suppress_tokens has token 9999"]),
        (["--stop", ""], ["stop_strings"]),
        (["--logprobs", "2"], ["--logprobs", "--json"]),
        (["--stream", "--json"], ["--stream is for one --prompt"]),
        (["--stream", "--num-beams", "2"], ["a stream has one answer"]),
        (["--prune", "oracle", "--keep", "8"], ["oracle must be told", "study --task scenes"]),
        (["--num-return-sequences", "2"], ["num_return_sequences is 2, but greedy answers"]),
        (["--num-return-sequences", "0"], ["at least 1"]),
        (["--forced-eos-token", "9999"], ["forced_eos_token_id has token 9999"]),
        (["--image-scale", "0"], ["image_scale is above 0 and at most 1"]),
        (["--image-scale", "nan"], ["image_scale is above 0 and at most 1"]),
        (["--tiles", "5"], ["tiles is 1 to 4 for this model, got 5"]),
        (["--chat"], ["no chat template"]),
        (["--image", "nowhere.png"], ["nowhere.png", "is not a file"]),
    ],
)
def test_bad_words_are_refused(words, said):
    refused(catp_jax("generate", MINI, "--image", CIRCLE, *ASK, *words), *said)


@pytest.mark.parametrize("command", ["generate", "study"])
@pytest.mark.parametrize(
    "words",
    [
        ["--prune", "nope", "--keep", "4"],
        ["--prune", "catp:nope=1", "--keep", "4"],
        ["--prune", "k_norm", "--keep", "many"],
        ["--temperature", "-1"],
        ["--num-beams", "2", "--top-k", "3"],
        ["--mesh", "rows=2"],
    ],
)
def test_a_wrong_call_ends_with_code_2(command, words, tmp_path):
    asked = ASK if command == "generate" else ["--out", tmp_path / "x.jsonl"]
    assert catp_jax(command, MINI, *asked, *words).returncode == 2


def test_an_answer_as_it_comes_is_the_answer():
    words = ["generate", MINI, "--image", CIRCLE, *ASK, "--min-new-tokens", 5]
    words += ["--repetition-penalty", 1.2, "--bad-word", "red", "--begun", " it is"]
    whole, streamed = catp_jax(*words), catp_jax(*words, "--stream")
    assert whole.returncode == streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.strip() == whole.stdout.strip()
    assert whole.stdout != "blue\n"


def test_log_probabilities_are_in_json_where_they_are_asked_for():
    words = ["generate", MINI, "--image", CIRCLE, *ASK, "--json"]
    row = json.loads(catp_jax(*words, "--logprobs", 2).stdout)
    assert len(row["logprobs"]) == len(row["alternatives"]) == len(row["tokens"])
    for token, own, likely in zip(row["tokens"], row["logprobs"], row["alternatives"], strict=True):
        assert likely[0] == {"token": token, "logprob": own}
        assert own <= 0
    assert "alternatives" not in json.loads(catp_jax(*words).stdout)


def test_a_checkpoints_own_options_are_told_and_can_be_left_aside(tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(MINI, folder)
    path = folder / "generation_config.json"
    (blue,) = json.loads(catp_jax("generate", MINI, "--image", CIRCLE, *ASK, "--json").stdout)[
        "tokens"
    ][:1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suppress_tokens": [blue]}))
    words = ["generate", folder, "--image", CIRCLE, *ASK]
    own, plain = catp_jax(*words), catp_jax(*words, "--no-generation-config")
    assert "blue" not in own.stdout
    assert own.stderr == f"catp-jax: defaults from {path}: suppress_tokens=[{blue}]\n"
    assert (plain.stdout, plain.stderr) == ("blue\n", "")
    other = catp_jax(*words, "--suppress-token", 0)
    assert other.stdout == "blue\n"


def test_several_methods_apply_in_order():
    words = ["generate", MINI, "--image", CIRCLE, *ASK, "--json"]
    both = catp_jax(*words, "--prune", "k_norm, random:seed=3", "--keep", "50%, 16")
    assert both.returncode == 0, both.stderr
    first = catp_jax(*words, "--prune", "k_norm", "--keep", "50%")
    kept, half = (
        {tuple(place.values()) for place in json.loads(done.stdout)["kept"]}
        for done in (both, first)
    )
    assert (len(kept), len(half)) == (16, 130)
    assert kept < half


def test_several_answers_are_numbered_and_a_list_in_json():
    words = ["generate", MINI, "--image", CIRCLE, *ASK, "--num-return-sequences", 2]
    words += ["--num-beams", 3, "--max-new-tokens", 3]
    shown, row = catp_jax(*words), json.loads(catp_jax(*words, "--json").stdout)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == f"1. {row['text'][0]}\n2. {row['text'][1]}\n"
    assert row["text"][0] == "blue" != row["text"][1]
    assert len(row["tokens"]) == 2


def parameters(command):
    return inspect.signature(command).parameters


def test_every_option_of_a_generation_can_be_given():
    names = {field.name for field in dataclasses.fields(Options)}
    assert names - {*parameters(cli_generate.generate)} == {"bad_words_ids"}  # for --bad-word
    # a study has a row for each question: one answer, and its KL divergence
    left = {"bad_words_ids", "num_return_sequences", "logprobs"}
    assert names - {*parameters(cli_study.run)} == left


def test_every_keyword_of_load_can_be_given():
    for command, load in [
        (cli_generate.generate, catp_jax_api.load),
        (cli_study.run, catp_jax_api.load),
        (cli.match, load_matcher),
    ]:
        keywords = {*parameters(load)} - {"folder", "fetch"}
        names = {name.removeprefix("no_") for name in parameters(command)}
        assert keywords <= names


def test_options_that_commands_share_say_the_same():
    commands = [cli_generate.generate, cli_study.run, cli.match, cli.convert, cli_demo.demo]
    commands += [cli_cluster.plan, cli_cluster.doctor]
    own = {"out", "seed", "prune", "keep", "prompt", "batch_size", "image", "mesh", "dtype"}
    own |= {"model", "image_scale", "tiles"}
    said = {}
    for command in commands:
        for name, parameter in parameters(command).items():
            (option,) = parameter.annotation.__metadata__
            said.setdefault(name, set()).add(option.help)
            assert option.help[0].isupper() or option.help.startswith(("vqav2", "jsonl: "))
            assert option.help.endswith("."), option.help
    assert {name for name, texts in said.items() if len(texts) > 1} <= own


def test_chat_puts_the_prompt_through_the_checkpoints_template(tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(MINI, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for part in messages[0].content %}"
        "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    )
    done = catp_jax("generate", folder, "--image", CIRCLE, *ASK, "--chat", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["prompt"], answer["visual_tokens"]) == (ASK[1], 260)
    assert answer["text"]


def test_a_damaged_image_is_refused_by_name(tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(CIRCLE.read_bytes()[:300])
    refused(catp_jax("generate", MINI, "--image", cut, *ASK), "cut.png", "damaged")


def test_bad_words_and_images_are_found_before_a_model_is_loaded(tmp_path):
    nowhere = tmp_path  # no weights in it
    shutil.copy(MINI / "config.json", nowhere)
    refused(catp_jax("generate", nowhere, "--image", "gone.png", *ASK), "gone.png")
    refused(catp_jax("generate", nowhere, *ASK, "--top-p", "0"), "top_p")
    refused(catp_jax("generate", nowhere, *ASK, "--prune", "random", "--keep", "x"), "'x'")
    refused(catp_jax("generate", nowhere, "--batch", "rows.jsonl"), "not a file")
    refused(catp_jax("generate", nowhere, *ASK, "--batch-size", "0"), "--batch-size")


@pytest.mark.parametrize("library", ["numpy", "libjax_common"])
def test_an_interrupt_ends_with_a_line_and_130(library):
    """While it imports, and later."""
    words = ["generate", MINI, "--image", CIRCLE, *ASK]
    command = [sys.executable, "-m", "catp_jax", *map(str, words)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while library not in Path(f"/proc/{run.pid}/maps").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (130, "", "catp-jax: interrupted\n")


@pytest.mark.parametrize(
    ("options", "name", "choices"),
    [
        (cli_options.Generation, "early_stopping", get_args(EarlyStopping)),
        (cli_options.Loading, "vision_mode", get_args(VisionMode)),
        (cli_options.Loading, "mask_mode", get_args(MaskMode)),
        (cli_options.Loading, "weights", get_args(Weights)),
        (cli_options.Loading, "dtype", [one.name for one in DTYPES]),
    ],
)
def test_choices_are_those_of_the_library(options, name, choices):
    listed, _none = get_args(get_type_hints(options)[name])
    assert {*get_args(listed)} == {*choices}


def test_a_study_has_the_same_defaults_from_the_command_line_and_in_python():
    plain, given = Conditions(), parameters(cli_study.run)
    assert (given["batch_size"].default, given["seed"].default) == (plain.batch, plain.seed)
    assert f"of at most {plain.options.max_new_tokens} new tokens" in cli_study.run.__doc__


def test_one_sentence_says_what_this_is():
    (said,) = {package.__doc__, cli.app.info.help}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["description"] == said
    assert said in (ROOT / "README.md").read_text().replace("`", "")


def test_help_names_every_method_and_gpu_and_imports_nothing_heavy():
    plain = [name for name in METHODS if name not in BOUNDS and not is_learned(name)]
    learned = [f"{name}:DIR" for name in METHODS if is_learned(name)]
    learned = f"{', '.join(learned[:-1])} and {learned[-1]}"
    told = f"{', '.join(plain)}; {learned}, see calibrate"
    assert told == cli_options.METHODS
    assert ", ".join(GPUS) == cli_cluster.GPUS
    assert inspect.signature(cli.start).parameters["heartbeat"].default == HEARTBEAT
    script = "import sys; from catp_jax import cli; print({'jax', 'numpy'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_marks_and_images_that_differ_in_number_are_refused():
    done = catp_jax("generate", MINI, "--image", CIRCLE, "--prompt", "<|image|>a <|image|>b")
    refused(done, "2 <|image|> marks and 1 images")


def test_no_prompt_no_model_and_wrong_folders_are_refused(tmp_path):
    refused(catp_jax("generate", MINI), "--prompt")
    refused(catp_jax("generate", MINI, *ASK, "--batch", "rows.jsonl"), "leave out --prompt")
    refused(catp_jax("generate", MINI, "--begun", "a", "--batch", "x"), "leave out --begun")
    refused(catp_jax("generate", MINI, *ASK, "--batch-size", 2), "--batch-size is for a --batch")
    both = ["--batch", "rows.jsonl", "--out", "answers.jsonl", "--json"]
    refused(catp_jax("generate", MINI, *both), "--out writes answers as JSON")
    refused(catp_jax("generate", MINI, "--batch", tmp_path / "none.jsonl"), "is not a file")
    refused(catp_jax("generate", tmp_path / "none", *ASK), "is not a folder")
    refused(catp_jax("generate", tmp_path, *ASK), "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(catp_jax("generate", tmp_path, *ASK), "llama", "mllama")


def test_images_of_odd_kinds_are_answered_about(tmp_path):
    circle = Image.open(CIRCLE).convert("RGB")
    circle.convert("RGBA").save(tmp_path / "rgba.png")
    circle.convert("P").save(tmp_path / "palette.png")
    circle.resize((1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (3000, 4), "red").save(tmp_path / "long.png")
    words = [w for p in sorted(tmp_path.glob("*.png")) for w in ("--image", p, *ASK)]
    done = catp_jax("generate", MINI, *words)
    assert done.returncode == 0, done.stderr
    answers = dict(zip(["dot", "long", "palette", "rgba"], done.stdout.splitlines(), strict=True))
    assert answers["palette"] == answers["rgba"] == "blue"
