"""`catp-jax study --late`: the last token of each prompt is read from the pruned cache."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.command import catp_jax
from tests.shallow import shallow


def asked(folder: Path, model: str, *words: str) -> list[dict]:
    lines = []
    for number, question in enumerate(("what color is the shape?", "is there a circle?")):
        Image.new("RGB", (64, 64), (90 * number, 200, 90)).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": question, "answer": "no"})
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--task", "jsonl", "--data", "mine.jsonl", "--out", f"out{len(words)}.jsonl")
    done = catp_jax("study", shallow(model), *options, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    path = folder / f"out{len(words)}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("model", ["mini-llama-vision", "mini-blip2-opt"])
def test_the_first_word_depends_on_what_is_left_in_the_cache(model: str, tmp_path: Path):
    pruned = ("--prune", "csp", "--keep", "1")
    early, late = asked(tmp_path, model, *pruned), asked(tmp_path, model, *pruned, "--late")
    assert early[0]["conditions"]["is_late"] is False
    assert late[0]["conditions"]["is_late"] is True
    kl = [[row["kl"] for row in rows if row["row"] == "result"][1] for rows in (early, late)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-4
    report = catp_jax("study", "report", "out5.jsonl", "--out", "report", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "report" / "report.md").read_text()
    assert "the last token of each prompt read from the cache" in page


def test_a_model_that_prunes_nothing_in_its_cache_is_refused_and_leaves_no_file(tmp_path: Path):
    with pytest.raises(AssertionError, match="prunes nothing in its cache"):
        asked(tmp_path, "mini-blip2-t5", "--prune", "l2", "--keep", "8", "--late")
    assert not (tmp_path / "out5.jsonl").exists()
