"""Two processes of four devices each: the tokens of one process, and an end when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert
from catp_jax.sharding.distributed import agreed, gathered, start
from tests.command import catp_jax
from tests.shallow import shallow
from tests.sharding.ways import CIRCLE, answer

ROOT = Path(__file__).resolve().parents[2]
MINI = shallow("mini-blip2-opt")
HEARTBEAT = 10  # seconds
PRUNED = ["--prune", "catp", "--keep", "8", "--max-new-tokens", "4"]
PROMPTS = ["what color is the shape?", "is there a triangle?"]
SPREAD = ["--mesh", "fsdp=4,tensor=2"]


def environment(devices: int) -> dict[str, str]:
    """The tests' own, with as many devices."""
    count = "--xla_force_host_platform_device_count="
    flags = os.environ["XLA_FLAGS"].replace(f"{count}8", f"{count}{devices}")
    return dict(os.environ, XLA_FLAGS=flags)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_two(words: list[str], err: Path) -> list[subprocess.Popen]:
    """The same command in two processes; what they say besides answers goes to files."""
    coordinator = f"127.0.0.1:{free_port()}"
    processes = []
    for number in range(2):
        told = ["--coordinator", coordinator, "--num-processes", "2", "--process-id", f"{number}"]
        with (err / f"{number}.txt").open("w") as file:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "catp_jax",
                        *told,
                        "--heartbeat",
                        f"{HEARTBEAT}",
                        *words,
                    ],
                    env=environment(4),
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                )
            )
    return processes


def end(processes: list[subprocess.Popen]) -> None:
    """Whatever still runs would take the machine from the tests that follow."""
    for process in processes:
        process.kill()
        process.communicate()


def answers(text: str) -> list[dict]:
    """The JSON lines; the CPU's transport between processes prints lines of its own."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_two_processes_answer_as_one_and_the_first_one_speaks(tmp_path):
    words = ["generate", str(MINI), "--json", *PRUNED]
    for prompt in PROMPTS:
        words += ["--image", str(CIRCLE), "--prompt", prompt]
    alone = catp_jax(*words)
    assert alone.returncode == 0, alone.stderr
    first, second = start_two([*words, *SPREAD], tmp_path)
    try:
        said, silence = first.communicate(timeout=300)[0], second.communicate(timeout=300)[0]
    finally:
        end([first, second])
    assert (first.returncode, second.returncode) == (0, 0), (tmp_path / "0.txt").read_text()
    expected = answers(alone.stdout)
    assert len({row["text"] for row in expected}) == 2
    assert answers(said) == expected
    assert answers(silence) == []


def test_every_way_of_answering_is_the_same_in_two_processes(tmp_path):
    """Llama Vision and BLIP-2, pruned, beams, drawn, a study; a converted folder is read, too."""
    converted = tmp_path / "converted"
    convert.to_orbax(shallow("mini-llama-vision"), converted)
    coordinator, out = f"127.0.0.1:{free_port()}", tmp_path / "two"
    processes = []
    for number in range(2):
        told = [str(converted), str(MINI), str(out), coordinator, "2", str(number)]
        with (tmp_path / f"{number}.txt").open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.sharding.ways", *told],
                    env=environment(4),
                    cwd=ROOT,
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                )
            )
    try:
        expected = answer(converted, MINI, tmp_path / "one.jsonl", is_spread=False)
        for process in processes:
            process.wait(timeout=400)
    finally:
        end(processes)
    said = [(tmp_path / f"{number}.txt").read_text() for number in range(2)]
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (json.loads((tmp_path / f"two-{number}.json").read_text()) for number in (0, 1))
    assert first == second
    assert first.pop("gathered") == ["process 0 says ", "process 1 says é"]
    assert first.keys() == expected.keys()
    for name, value in json.loads(json.dumps(expected)).items():
        if name == "map":
            np.testing.assert_allclose(first[name], value, atol=1e-3, err_msg=name)
        else:
            assert first[name] == value, name
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [(row["row"], row.get("text")) for row in two] == [
        (row["row"], row.get("text")) for row in one
    ]


@pytest.mark.parametrize(
    ("number", "word"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
)
def test_a_lost_process_ends_the_others_with_a_message(tmp_path, number, word):
    """Killed or silent, the coordinator or another, and whether we or JAX notice first.

    They answer what the first test asks, by the program that it has compiled.
    """
    requests = tmp_path / "requests.jsonl"
    lines = [json.dumps({"prompt": prompt, "images": [str(CIRCLE)]}) + "\n" for prompt in PROMPTS]
    requests.write_text("".join(lines) * 10_000)
    words = ["generate", str(MINI), "--batch", str(requests), "--batch-size", "2", "--json"]
    words += PRUNED
    processes = start_two([*words, *SPREAD], tmp_path)
    speaker, victim, other = processes[0], processes[number], processes[1 - number]
    assert speaker.stdout is not None
    next(line for line in speaker.stdout if line.startswith("{"))
    victim.send_signal(word)
    try:
        other.communicate(timeout=4 * HEARTBEAT)
    finally:
        end(processes)
    said = (tmp_path / f"{1 - number}.txt").read_text()
    assert other.returncode == 1, said
    assert "Traceback" not in said
    assert (
        f"catp-jax: process {1 - number} of 2 lost another one and ends" in said
        or f"catp-jax: process {1 - number} was aborted, mostly since another one was lost" in said
    )


@pytest.mark.parametrize("word", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_ends_with_a_message_when_jax_aborts_it(tmp_path, number, word):
    """It computes nothing, so that no error can reach it in Python."""
    coordinator = f"127.0.0.1:{free_port()}"
    code = (
        "import sys, time; from catp_jax.sharding.distributed import start; "
        f"start('{coordinator}', 2, int(sys.argv[1]), heartbeat=3); "
        "print('ready', flush=True); time.sleep(300)"
    )
    processes = []
    for one in range(2):
        with (tmp_path / f"{one}.txt").open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(one)],
                    env=environment(1),
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                )
            )
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        processes[number].send_signal(word)
        processes[1 - number].communicate(timeout=60)
    finally:
        end(processes)
    said = (tmp_path / f"{1 - number}.txt").read_text()
    assert processes[1 - number].returncode == 1, said
    assert f"catp-jax: process {1 - number} was aborted, mostly since another one was lost" in said


def test_a_first_process_whose_partners_never_come_ends_with_a_message():
    code = (
        "from catp_jax.sharding.distributed import start; "
        f"start('127.0.0.1:{free_port()}', 2, 0, patience=2)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 1
    assert "all 2 processes did not come within 2 seconds" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"coordinator": "host:1"}, "missing: num_processes, process_id"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "host:99999", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "got 2 of 2 processes"),
        ({"heartbeat": 0}, "1 second to a day"),
        ({"heartbeat": 10**11}, "1 second to a day"),
        (
            {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 1, "patience": 1},
            "nobody answers at 127.0.0.1:1 within 1 seconds",
        ),
    ],
)
def test_words_that_make_no_sense_are_refused(told, says):
    with pytest.raises(ValueError, match=says):
        start(**told)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--distributed"], "no cluster was found"),
        (["--process-id", "0"], "missing: coordinator, num_processes"),
    ],
)
def test_the_command_says_so_too(words, says):
    run = subprocess.run(
        [sys.executable, "-m", "catp_jax", *words, "generate", str(MINI), "--prompt", "x"],
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert says in run.stderr
    assert "Traceback" not in run.stderr


def test_one_process_agrees_with_itself():
    assert agreed([True, False, True]) == [True, False, True]
    assert gathered("é") == ["é"]
