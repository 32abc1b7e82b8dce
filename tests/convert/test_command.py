"""`catp-jax convert`: a table on success; on bad input one message, exit code 1, no traceback."""

from pathlib import Path

from tests.command import catp_jax
from tests.convert.folders import hf_folder, tensors_of


def test_there_and_back(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    there = catp_jax("convert", folder, tmp_path / "converted")
    assert there.returncode == 0, there.stderr
    for name in tensors_of(folder):
        assert name in there.stdout
    back = catp_jax("convert", tmp_path / "converted", tmp_path / "again", "--to-hf")
    assert back.returncode == 0, back.stderr
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_verified_run_says_what_it_removed(tmp_path: Path):
    folder = hf_folder(tmp_path / "hf")
    left = tmp_path / "out.unfinished-0123abcd"
    left.mkdir()
    done = catp_jax("convert", folder, tmp_path / "out", "--verify")
    assert done.returncode == 0, done.stderr
    assert "removed out.unfinished-0123abcd, which an interrupted run left" in done.stderr
    assert not left.exists()
    back = catp_jax("convert", tmp_path / "out", tmp_path / "again", "--to-hf", "--verify")
    assert back.returncode == 1
    assert "--dtype, --verify, --ignore-config and --adapter go with" in back.stderr


def test_bad_input_is_one_message(tmp_path: Path):
    failed = catp_jax("convert", hf_folder(tmp_path / "hf") / "original", tmp_path / "out")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("catp-jax: ")
    assert "has no config.json" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_usage_is_code_two(tmp_path: Path):
    assert catp_jax("convert", tmp_path).returncode == 2
