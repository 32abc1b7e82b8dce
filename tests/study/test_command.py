"""`catp-jax study`: what is refused before a model is loaded; the way from a task to a report."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

from catp_jax import api, cli_compared
from catp_jax.generation.options import Options
from catp_jax.pruning import METHODS, named
from catp_jax.study.journal import Journal
from catp_jax.study.records import Setting
from tests.study.answerer import Tiny, examples
from tests.study.command import MINI, Loaded, questions, refused, study

ROOT = Path(__file__).resolve().parents[2]


TWO = ["--prune", "l2", "--prune", "position"]


def test_a_study_runs_and_reports(tiny):
    data = questions(tiny)
    words = ["--prune", "position", "--prune", "l2", "--keep", "4", "--keep", "25%"]
    words += ["--out", "runs/x.jsonl", "--batch-size", 4]
    done = study("model", "--task", "jsonl", "--data", data, *words)
    assert done.exit_code == 0, done.output
    assert "model: 6 questions about 3 images" in done.output
    assert "catp-jax study report runs/x.jsonl" in done.output
    rows = [json.loads(line) for line in Path("runs/x.jsonl").read_text().splitlines()]
    header = rows[0]
    assert (header["name"], header["data"]["questions"]) == ("model", 6)
    conditions = header["conditions"]
    assert (conditions["task"], conditions["batch"]) == ("jsonl", 4)
    assert conditions["source"] == {"file": "mine.jsonl"}
    assert [row["setting"] for row in rows if row["row"] == "result"] == [
        {"method": "unpruned", "keep": None},
        {"method": "position", "keep": 4},
        {"method": "position", "keep": "25%"},
        {"method": "l2", "keep": 4},
        {"method": "l2", "keep": "25%"},
    ]
    assert len([row for row in rows if row["row"] == "picture"]) == 3

    done = study("report", "runs/x.jsonl", "--out", "report")
    assert done.exit_code == 0, done.output
    assert {p.name for p in Path("report").iterdir()} == {
        *("report.html", "report.md", "settings.csv", "figures.csv"),
        *("accuracy.png", "cache.png", "positions.png", "kept.png"),
    }


def test_run_may_be_said_or_left_out(tiny):
    data = questions(tiny)
    words = ["--task", "jsonl", "--data", data, "--prune", "l2", "--keep", "2"]
    assert study("run", "model", *words, "--out", "a.jsonl").exit_code == 0
    assert study(*words, "--out", "b.jsonl", "model").exit_code == 0
    settings = [
        [
            row["setting"]
            for line in Path(name).read_text().splitlines()
            if "setting" in (row := json.loads(line))
        ]
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert settings[0] == settings[1]


def test_all_that_can_be_left_out_is(tiny):
    done = study("model", "--task", "jsonl", "--data", questions(tiny))
    assert done.exit_code == 1  # self_attention and catp want evidence that the small model lacks
    done = study("model", "--task", "jsonl", "--data", questions(tiny), "--prune", "random")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("runs/model-jsonl.jsonl").read_text().splitlines()]
    kept = [row["setting"]["keep"] for row in rows if row["row"] == "result"]
    assert kept == [None, "50%", "25%", "12.5%"]


def test_a_study_goes_on_and_more_can_be_added(tiny):
    words = ["model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl"]
    assert study(*words, "--prune", "l2", "--keep", "2").exit_code == 0
    before = Path("x.jsonl").read_bytes()
    Path("x.jsonl").write_bytes(before[:-10])
    done = study(*words, *TWO, "--keep", "2", "--keep", "4")
    assert done.exit_code == 0, done.output
    assert "the last line was cut off" in done.output
    after = Path("x.jsonl").read_bytes()
    assert after.startswith(before[: before.rindex(b"\n", 0, -10) + 1])
    assert after.count(b'"row": "result"') == 5


def test_words_that_the_tokenizer_lacks_are_said_at_the_start(tiny):
    data = questions(tiny)
    words = ["model", "--task", "jsonl", "--data", data, "--prune", "l2", "--keep", "2"]
    assert "no tokens" not in study(*words, "--out", "a.jsonl").output
    data.write_text(data.read_text().replace("is it 1?", "is it an okapi or an okapi ?"))
    done = study(*words, "--out", "b.jsonl")
    assert done.exit_code == 0, done.output
    assert "no tokens for 1 of the words of jsonl" in done.output
    assert "okapi" in done.output


def test_all_that_fits_has_several_draws_of_random_and_the_bounds_of_a_task_that_knows():
    knowing = [dataclasses.replace(examples(1)[0], needed=((0.0, 0.0, 1.0, 1.0),))]
    plain = cli_compared.all_that_fit(Tiny(), ["2", "4"], examples(1))
    told = cli_compared.all_that_fit(Tiny(), ["2", "4"], knowing)
    methods = [setting.method for setting in plain]
    assert [methods.count(name) for name in ("l2", "random", "oracle", "anti")] == [2, 2, 0, 0]
    assert len([name for name in methods if name.startswith("random:seed=")]) == 2 * 4
    assert {*told} - {*plain} == {Setting(name, n) for name in ("oracle", "anti") for n in (2, 4)}


def test_auto_meets_what_has_learned_its_budget_and_percentages_what_takes_no_count(
    monkeypatch, capsys
):
    class ByBytes(METHODS["l2"]):
        keeps_all = is_by_bytes = True

    monkeypatch.setitem(METHODS, "l2", ByBytes)
    monkeypatch.setattr(named, "named", lambda method, keep: ())
    found = cli_compared.settings_of(["l2", "random"], ["auto", "50%"])
    assert found == [Setting("l2", "auto"), Setting("l2", "50%"), Setting("random", "50%")]
    with pytest.raises(typer.BadParameter, match="have learned their own"):
        cli_compared.settings_of(["random"], ["auto", "50%"])
    with pytest.raises(typer.BadParameter, match="have learned their own"):
        cli_compared.settings_of(["l2", "random"], ["auto"])

    fitting = cli_compared.all_that_fit(Tiny(), ["2"], examples(1))
    assert "l2" not in {setting.method for setting in fitting}
    assert "left out: l2" in capsys.readouterr().err


def test_an_interrupted_study_says_that_it_resumes(tiny, monkeypatch):
    class Impatient(Tiny):
        def generate_packed(self, packed, pruners, **options):
            if len(self.batches) == 4:
                raise KeyboardInterrupt
            return super().generate_packed(packed, pruners, **options)

    words = ["model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl"]
    words += ["--prune", "l2", "--keep", "2", "--batch-size", "2"]
    monkeypatch.setattr(api, "load", lambda *_, **__: Impatient())
    done = study(*words)
    assert done.exit_code != 0
    assert "x.jsonl has what was answered; the same command resumes" in done.output
    monkeypatch.setattr(api, "load", lambda *_, **__: Tiny())
    assert study(*words).exit_code == 0


def test_questions_that_do_not_fit_are_said_and_the_rest_is_asked(tiny):
    Image.new("RGB", (4, 4)).save(tiny / "COCO_val2014_000000000001.jpg")
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    asked = [{"question_id": n, "image_id": n, "question": "is it?"} for n in (1, 2)]
    given = [{"question_id": n, "image_id": n, "answers": answers} for n in (1, 2)]
    (tiny / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    (tiny / "a.json").write_text(json.dumps({"data_subtype": "val2014", "annotations": given}))
    files = ["--questions", "q.json", "--annotations", "a.json", "--images", "."]
    done = study("model", "--task", "vqav2", *files, "--prune", "l2", "--keep", "2")
    assert done.exit_code == 0, done.output
    assert "1 of 2 questions left out" in done.output
    header = json.loads(Path("runs/model-vqav2.jsonl").read_text().partition("\n")[0])
    assert header["conditions"]["prompt"] == "Question: {question} Short answer:"
    assert header["data"]["questions"] == 1


def test_a_study_of_pope_has_the_figures_of_its_authors(tiny):
    Image.new("RGB", (4, 4)).save(tiny / "a.jpg")
    asked = {"image": "a.jpg", "text": "Is there a dog in the image?"}
    lines = [{**asked, "question_id": n, "label": "yes" if n else "no"} for n in range(4)]
    (tiny / "q.json").write_text("\n".join(map(json.dumps, lines)))
    words = ["--questions", "q.json", "--images", ".", "--prune", "l2", "--keep", "2"]
    done = study("model", "--task", "pope", *words)
    assert done.exit_code == 0, done.output
    rows = list(map(json.loads, Path("runs/model-pope.jsonl").read_text().splitlines()))
    (first, *_) = [row for row in rows if row["row"] == "result"]
    texts = [one["text"] for row in rows if row["row"] == "answers" for one in row["answers"]][:4]
    said_yes = [not {"no", "No", "not"} & {*text.split(".")[0].split(" ")} for text in texts]
    assert first["measures"]["yes ratio"] == sum(said_yes) / 4
    assert first["measures"]["recall"] == sum(said_yes[1:]) / 3
    assert study("report", "runs/model-pope.jsonl", "--out", "out").exit_code == 0
    head = (tiny / "out/settings.csv").read_text().splitlines()[0]
    assert "precision,recall,F1,yes ratio" in head
    assert "| F1 |" in (tiny / "out/report.md").read_text()


def test_each_prune_meets_each_keep_of_as_many_budgets(tiny):
    words = ["model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl"]
    words += ["--prune", "l2", "--prune", "l2, position", "--prune", "position"]
    done = study(*words, "--keep", "50%,2", "--keep", "4", "--keep", "4, 1")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()]
    settings = [list(row["setting"].values()) for row in rows if row["row"] == "result"]
    assert settings == [
        ["unpruned", None],
        ["l2", 4],
        ["l2,position", "50%,2"],
        ["l2,position", "4,1"],
        ["position", 4],
    ]
    kept = [row["answers"][0]["kept"] for row in rows if row["row"] == "answers"]
    assert [None if some is None else len(some) for some in kept] == [None, 4, 2, 1, 4]


def test_a_study_generates_and_loads_as_it_is_told(no_model):
    path = no_model / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a": 1, "b": 2}))
    words = ["--bad-word", "a b", "--bad-word", "c", "--temperature", "0.5", "--top-k", "3"]
    words += ["--stop", "x", "--suppress-token", "5", "--chat", "--begun", "It is"]
    loading = ["--dtype", "bfloat16", "--weights", "int8", "--mesh", "data=8"]
    loading += ["--vision-mode", "hf"]
    done = study(*EASY, *words, *loading, "--ignore-config", "a", "--ignore-config", "b")
    (keywords,) = done.exception.args
    assert keywords == {
        **{"dtype": "bfloat16", "weights": "int8", "mesh": "data=8", "vision_mode": "hf"},
        **{"mask_mode": None, "adapter": None, "processor": None, "ignore_config": ("a", "b")},
        "generation_config": False,
    }


def test_conditions_hold_every_option_that_was_given(tiny):
    words = ["model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl"]
    words += ["--prune", "l2", "--keep", "2"]
    given = ["--bad-word", "a b", "--bad-word", "c", "--temperature", "0.5", "--stop", "x"]
    assert study(*words, *given, "--begun", "It is").exit_code == 0
    conditions = Journal(Path("x.jsonl")).header.conditions
    assert conditions.begun == "It is"
    expected = Options(
        max_new_tokens=10, bad_words=("a b", "c"), temperature=0.5, stop_strings=("x",)
    )
    assert conditions.options == expected
    other = study(*words, *given[2:], "--begun", "It is")
    refused(other, 'conditions.options.bad_words: ["a b", "c"] → ["c"]')


def test_a_checkpoints_own_options_are_taken_where_that_is_asked_for(tiny):
    content = {"do_sample": True, "temperature": 0.6, "suppress_tokens": [3]}
    (tiny / "model" / "generation_config.json").write_text(json.dumps(content))
    words = ["model", "--task", "jsonl", "--data", questions(tiny), "--prune", "l2", "--keep", "2"]
    aside = study(*words, "--out", "x.jsonl")
    assert "generation_config.json is left aside" in aside.output
    assert Journal(Path("x.jsonl")).header.conditions.options == Options(max_new_tokens=10)
    taken = study(*words, "--out", "y.jsonl", "--generation-config")
    assert taken.exit_code == 0
    assert "left aside" not in taken.output
    assert f"defaults from {Path('model/generation_config.json')}: " in taken.output
    assert "left aside" not in study(*words, "--out", "z.jsonl", "--num-beams", "2").stdout
    options = Journal(Path("y.jsonl")).header.conditions.options
    assert (options.temperature, options.suppress_tokens) == (0.6, (3,))


EASY = ["model", "--task", "easy-vqa", "--limit", "4"]


def test_the_model_is_loaded_once_all_else_is_right(no_model):
    done = study(*EASY, "--prune", "catp", "--prune", "catp:layers=1", "--keep", "4")
    assert isinstance(done.exception, Loaded)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prune", "catpp"], ["unknown pruning method 'catpp'", "catp"]),
        (["--prune", "catp:layer=1"], ["catp does not know the option 'layer=1'"]),
        (["--prune", ""], ["unknown pruning method ''"]),
        (["--prune", "l2,", "--keep", "4,2"], ["unknown pruning method ''"]),
        (["--prune", "catp,l2"], ["--prune catp,l2 meets nothing", "to compare, repeat --prune"]),
        (["--prune", "catp,l2", "--keep", "8"], ["--prune catp,l2 meets nothing"]),
        (["--prune", "catp", "--keep", "8,4"], ["--prune catp meets nothing"]),
        (["--prune", "catp", "--keep", "8,4", "--keep", "2"], ["--keep 8,4 meets nothing"]),
        (["--keep", "8,4"], ["--keep 8,4 meets nothing", "repeat --prune and --keep"]),
        (["--keep", "auto"], ["a study compares fixed budgets"]),
        (["--gpu", "h999"], ["a target is one of h100", "h999"]),
        (["--gpu", "h100", "--mesh", "data=2"], ["is that of one device"]),
        (["--methods", "catp"], ["--methods"]),
        (["--keep", "0"], ["keep takes a count of at least 1 or a percentage", "'0'"]),
        (["--keep", "150%"], ["at most 100%"]),
        (["--keep", "4,,2"], ["keep takes a count"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--suppress-token", "x"], ["--suppress-token"]),
        (["--repetition-penalty", "0"], ["repetition_penalty is above 0"]),
        (["--mesh", "data=x"], ["a mesh is sizes of"]),
        (["--prompt", "What is it?"], ["a prompt must have {question}"]),
        (["--limit", "0"], ["--limit"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--num-beams", "0"], ["num_beams is at least 1"]),
        (["--max-new-tokens", "0"], ["max_new_tokens is at least 1"]),
        (["--min-new-tokens", "11"], ["min_new_tokens is at most max_new_tokens (10), got 11"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", str(2**31 - 1)], ["--seed"]),
        (["--length-penalty", "nan"], ["length_penalty lies between -100 and 100"]),
        (["--early-stopping", "soon"], ["soon"]),
        (["--data", "x.jsonl"], ["--task easy-vqa does not take --data"]),
        (["--fraction", "0.1"], ["--task easy-vqa does not take --fraction"]),
        (["--task", "vqav2"], ["--task vqav2 requires --questions, --annotations, --images too"]),
        (["--task", "jsonl"], ["--task jsonl requires --data too"]),
        (["--task", "jsonl", "--data", "nothing.jsonl"], ["nothing.jsonl is not a file"]),
        (["--task", "pope"], ["--task pope requires --questions, --images too"]),
        (["--task", "gqa"], ["--task gqa requires --questions, --images too"]),
        (
            ["--task", "gqa", "--annotations", "a.json", "--questions", "q.json", "--images", "."],
            ["--task gqa does not take --annotations"],
        ),
        (["--task", "coco"], ["coco"]),
        (["--out", "model"], ["model is not a file"]),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(no_model, words, said):
    refused(study(*EASY, *words), *said)


def test_a_folder_that_is_none_is_refused(no_model):
    refused(study("nowhere", "--limit", "4"), "nowhere is not a folder")


def test_another_studys_file_is_refused_before_a_model_is_loaded(tiny, monkeypatch):
    data = questions(tiny)
    words = ["--task", "jsonl", "--data", data, "--prune", "l2", "--keep", "2"]
    assert study("model", *words, "--out", "x.jsonl", "--seed", 1).exit_code == 0
    monkeypatch.setattr(api, "load", None)
    other = study("model", *words, "--out", "x.jsonl", "--num-beams", 5)
    refused(other, "conditions.seed: 1 → 42", "conditions.options.num_beams: 1 → 5")
    Path("notes.txt").write_text("mine")
    refused(study("model", *words, "--out", "notes.txt"), "is not a sweep's file")
    assert Path("notes.txt").read_text() == "mine"


def test_budgets_and_methods_that_the_model_does_not_have_are_refused(tiny):
    words = ["model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl"]
    said = refused(study(*words, "--prune", "l2", "--keep", "9"), "there are only 8")
    assert "give 1 to 8" in said
    refused(study(*words, "--prune", "trimmed_llama", "--keep", "2"), "trimmed_llama prunes")
    assert not Path("x.jsonl").exists()


@pytest.mark.parametrize("words", [["--length-penalty", "nan"], ["--max-new-tokens", "51"]])
def test_a_number_that_does_not_fit_leaves_no_file(tiny, words):
    data = ["model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl"]
    refused(study(*data, "--prune", "l2", "--keep", "2", *words))
    assert not Path("x.jsonl").exists()


def test_a_report_wants_a_studys_file(tiny):
    refused(study("report", "nothing.jsonl"), "is not a file")
    Path("notes.txt").write_text("mine")
    refused(study("report", "notes.txt"), "is not a sweep's file")


def test_help_lists_both_commands_and_is_quick():
    done = study("--help")
    assert done.exit_code == 0
    assert "report" in done.output
    assert "--prune" in study("run", "--help").output
    # nothing heavy is imported for it
    script = "import sys; from catp_jax import cli_study; print('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"


def test_from_the_shell_with_a_trained_model(tmp_path):
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in conftest.py

    def catp_jax(*words):
        command = [sys.executable, "-m", "catp_jax", "study", *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, check=False, env=quick
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    words = ["--prune", "trimmed_llama", "--keep", "16", "--limit", "8", "--batch-size", "8"]
    done = catp_jax(MINI, *words, "--out", "x.jsonl")
    assert done.returncode == 0, done.stderr
    assert "mini-llama-vision: 8 questions about 8 images" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    whole, pruned = [row for row in rows if row["row"] == "result"]
    assert whole["accuracy"] >= 0.75
    assert pruned["visual_tokens"] == 16
    assert pruned["cost"]["cache_bytes"] < 0.5 * whole["cost"]["cache_bytes"]
    assert pruned["cost"]["prefill_flops"] < whole["cost"]["prefill_flops"]
    done = catp_jax("report", "x.jsonl", "--out", "report")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "report" / "kept.png") as picture:
        assert picture.size[0] > 400


def test_scenes_have_dials_families_and_bounds(tiny):
    words = ["model", "--task", "scenes:objects=8,size=small", "--limit", "6", "--keep", "2"]
    done = study(*words, "--prune", "oracle", "--prune", "anti", "--prune", "random")
    assert done.exit_code == 0, done.output
    path = Path("runs/model-scenes-objects=8,size=small.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["conditions"]["source"]["objects"] == 8
    families = {one["family"] for row in rows if row["row"] == "answers" for one in row["answers"]}
    assert families <= {"attribute", "existence", "count", "relation", "reading"}
    assert families
    done = study("report", str(path), "--out", "report")
    assert done.exit_code == 0, done.output
    text = Path("report/report.md").read_text()
    assert "### By family of questions" in text
    assert "### Against unpruned, paired" in text
    assert "### Against random at the same budget, paired" in text


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("scenes:objects=99", "16 cells, so 4 to 16 objects, got objects=99"),
        ("scenes:colour=red", "the dials objects or size or tiles"),
        ("easy-vqa:objects=3", "of these scenes alone takes dials"),
        ("pictures", "--task is scenes, easy-vqa, vqav2, pope, gqa, jsonl"),
    ],
)
def test_a_task_that_cannot_be_is_refused_before_a_model_is_loaded(tiny, task, says):
    done = study("model", "--task", task)
    assert done.exit_code == 2
    assert says in " ".join(done.output.replace("│", " ").split())


def test_a_bound_of_a_task_that_does_not_know_is_refused_before_a_model_is_loaded(no_model):
    words = ["model", "--task", "jsonl", "--data", questions(no_model), "--keep", "2"]
    said = refused(study(*words, "--prune", "l2", "--prune", "anti"), "anti must be told")
    assert "no question of jsonl says so" in said
