"""Smaller images as baselines of `catp-jax study`."""

import dataclasses
import json
from pathlib import Path

import pytest

import convert
from catp_jax import cli_compared, cli_study
from catp_jax.study.records import Setting
from tests.study.command import MINI, questions, refused, study


@pytest.mark.parametrize(
    ("mini", "seen"), [("llama-vision", ([0.5], [1])), ("blip2-t5", ([0.5], []))]
)
def test_a_study_of_everything_has_fewer_pixels_and_where_there_are_any_fewer_tiles(mini, seen):
    config = convert.load_config(MINI.with_name(f"mini-{mini}"), ())
    assert cli_compared.baselines(None, None, config) == seen
    assert cli_compared.baselines([0.3], None, config) == ([0.3], seen[1])
    assert cli_compared.baselines(None, [2], config) == ([0.5], [2])


def test_a_model_of_one_tile_is_not_asked_with_one_tile_again():
    config = convert.load_config(MINI.with_name("mini-llama-vision"), ())
    vision = dataclasses.replace(config.vision, max_num_tiles=1)
    assert cli_compared.baselines(None, None, dataclasses.replace(config, vision=vision))[1] == []


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ([], ["image_scale", "tiles"]),
        (["--tiles", "2"], ["image_scale", "tiles"]),
        (["--prune", "l2"], []),
        (["--prune", "l2", "--image-scale", "0.7"], ["image_scale"]),
    ],
)
def test_smaller_images_are_in_a_study_of_everything_or_asked_for(tiny, monkeypatch, words, seen):
    monkeypatch.setattr(cli_study, "all_that_fit", lambda *_: [Setting("l2", 2)])
    done = study("model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl", *words)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()]
    methods = {row["setting"]["method"] for row in rows if row["row"] == "result"}
    assert methods == {"unpruned", "l2", *seen}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image-scale", "0"], "image_scale is above 0 and at most 1"),
        (["--image-scale", "1.5"], "image_scale is above 0 and at most 1"),
        (["--image-scale", "nan"], "image_scale is above 0 and at most 1"),
        (["--image-scale", "0.5", "--image-scale", "-1"], "image_scale is above 0"),
        (["--tiles", "0"], "tiles is a whole number of at least 1"),
        (["--tiles", "5"], "tiles is 1 to 4 for this model, got 5"),
    ],
)
def test_smaller_images_that_are_none_are_refused_before_a_model_is_loaded(words, said, no_model):
    refused(study("model", "--task", "easy-vqa", *words), said)


def test_a_study_compares_smaller_images_beside_methods(tiny):
    words = ["--prune", "l2", "--keep", "4", "--image-scale", 0.5, "--tiles", 1]
    done = study("model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl", *words)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()]
    found = [str(row) for row in rows]
    for method, keep in (("image_scale", "0.5"), ("tiles", "1"), ("l2", 4), ("unpruned", None)):
        assert any(repr({"method": method, "keep": keep})[1:-1] in row for row in found)


def test_a_study_asks_about_half_the_pixels_too(tiny):
    words = ["--prune", "l2", "--keep", "4", "--half-pixels"]
    done = study("model", "--task", "jsonl", "--data", questions(tiny), "--out", "x.jsonl", *words)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("x.jsonl").read_text().splitlines()]
    methods = {row["setting"]["method"] for row in rows if row["row"] == "result"}
    assert methods == {"unpruned", "half the pixels", "l2"}
