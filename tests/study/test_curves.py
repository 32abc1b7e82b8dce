"""What the curves show: which points, whose names, and what no other setting is better than."""

import dataclasses
import itertools

import numpy as np

from catp_jax.study.curves import (
    apart,
    cache_panel,
    draw_curves,
    front,
    kept_panel,
    looks_of,
)
from catp_jax.study.half_pixels import HALVED
from catp_jax.study.records import Conditions, Setting
from catp_jax.study.results import estimates, pooled
from catp_jax.study.sweep import sweep
from tests.study.answerer import Tiny
from tests.study.test_half_pixels import with_pixels

SETTINGS = [Setting(m, k) for m in ("l2", "random", "random:seed=9") for k in (4, 2)]


def swept():
    settings = [Setting(HALVED, None), *SETTINGS]
    return pooled(list(sweep(Tiny(), with_pixels(8), settings, Conditions(batch=8))))


def test_the_front_is_what_no_other_point_dominates():
    points = np.random.default_rng(0).integers(0, 9, (40, 2)).astype(float)
    found = front([tuple(point) for point in points])
    for cost, value in points:
        is_beaten = any(
            c <= cost and v >= value and (c, v) != (cost, value) for c, v in points.tolist()
        )
        assert ((cost, value) in found) == (not is_beaten)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(found))


def test_ticks_have_room():
    assert apart([1, 1.1, 2, 2.1, 8]) == (8, 2.1, 1.1)


def test_methods_are_lines_and_what_has_no_budget_is_a_rule(tmp_path):
    results = swept()
    figures = estimates(results)
    panel = kept_panel(results, figures, "a $\\frac{ title")
    assert [line.name for line in panel.lines] == ["l2", "random, 2 seeds"]
    assert [name for name, _ in panel.rules] == ["unpruned", HALVED]
    for line in panel.lines:
        for place, value in zip(line.places, line.values, strict=True):
            (mine,) = (
                r
                for r in results
                if r.setting.method == line.name and abs(place / r.visual_tokens - 1) < 0.1
            )
            assert (value.mean, value.low, value.high) == (mine.accuracy, mine.low, mine.high)
    draw_curves([panel], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_cache_curve_leaves_out_what_costs_as_much_as_unpruned_and_bounds():
    results = swept()
    bound = dataclasses.replace(results[-1], setting=Setting("oracle", 2))
    panel = cache_panel([*results, bound], "a")
    assert [line.name for line in panel.lines] == ["unpruned", "l2", "random, 2 seeds"]
    cached = {r.setting.method: [] for r in results}
    for r in results:
        cached[r.setting.method].append(r.cost.cache_bytes / 1000)
    for line in panel.lines:
        assert list(line.places) == sorted(cached[line.name])


def test_looks_differ_and_chance_and_bounds_are_grey():
    methods = [f"m{n}" for n in range(18)]
    looks = looks_of([*methods, "random, 5 seeds", "oracle", "anti"])
    assert len({tuple(looks[name].values()) for name in looks}) == len(looks)
    greys = {looks[name]["color"] for name in ("random, 5 seeds", "oracle", "anti")}
    assert len(greys) == 1
    assert not greys & {looks[name]["color"] for name in methods}
