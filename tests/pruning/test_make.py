"""Methods by name: what is refused, and that the message says what would do."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from catp_jax import pruning
from catp_jax.contract import Site
from catp_jax.pruning import (
    CATP,
    METHODS,
    FastV,
    KNorm,
    L2Norm,
    Position,
    Random,
    SelfAttention,
    TrimmedLlama,
    make,
    methods_for,
)
from catp_jax.pruning.named import named, pruners
from catp_jax.struct import pytree, static

CROSS = frozenset({Site.CROSS})
ENTRY = frozenset({Site.ENTRY})
BASELINES = ("random", "uniform", "nearest_centroid", "pool")


@pytest.mark.parametrize(
    ("spec", "keep", "method"),
    [
        ("trimmed_llama", 8, TrimmedLlama(keep=8)),
        ("trimmed_llama:per_head=3", 8, TrimmedLlama(keep=8, per_head=3)),
        ("trimmed_llama:k_ratio=0.25", None, TrimmedLlama(keep=None, k_ratio=0.25)),
        ("trimmed_llama:k_ratio=1", 8, TrimmedLlama(keep=8, k_ratio=1.0)),
        ("fastv", 8, FastV(keep=8, site=Site.CROSS)),
        ("k_norm", 8, KNorm(keep=8, site=Site.CROSS)),
        ("random", 8, Random(keep=8, site=Site.CROSS)),
        ("random:seed=5", 8, Random(keep=8, site=Site.CROSS, seed=5)),
    ],
)
def test_names_and_options_make_the_method(spec: str, keep: int | None, method):
    assert make(spec, keep, CROSS) == method


def test_options_have_the_type_of_their_field():
    # 1 and 1.0 are equal but not the same program
    assert isinstance(make("trimmed_llama:k_ratio=1", 8, CROSS).k_ratio, float)
    assert isinstance(make("trimmed_llama:per_head=3", 8, CROSS).per_head, int)
    assert isinstance(make("random:seed=3", 8, CROSS).seed, int)


OPT = frozenset({Site.ENTRY, Site.LAYER})


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("catp", CATP(keep=8)),
        ("catp:layers=first", CATP(keep=8, layers="first")),
        ("catp:layers=all:image_weights", CATP(keep=8, layers="all", image_weights=True)),
        ("catp:layers=3", CATP(keep=8, layers=3)),
        ("catp:image_weights=false", CATP(keep=8)),
        ("l2", L2Norm(keep=8)),
        ("self_attention", SelfAttention(keep=8)),
        ("position", Position(keep=8)),
        ("random:seed=4", Random(keep=8, site=Site.ENTRY, seed=4)),
        ("fastv", FastV(keep=8, site=Site.LAYER)),
        ("fastv:layer=5", FastV(keep=8, site=Site.LAYER, layer=5)),
        ("random:site=layer:layer=5", Random(keep=8, site=Site.LAYER, layer=5)),
    ],
)
def test_names_and_options_make_the_method_where_the_model_can_be_pruned(spec: str, method):
    assert make(spec, 8, OPT) == method


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1/0/0", [1.0, 0.0, 0.0]), ("0.5/1e-1/-2", [0.5, 0.1, -2.0]), ("3", [3.0])],
)
def test_slashes_separate_the_numbers_of_a_vector(text: str, numbers: list[float]):
    weights = make(f"catp:weights={text}", 8, ENTRY).weights
    assert weights.dtype == jnp.float32
    assert weights.tolist() == jnp.asarray(numbers, jnp.float32).tolist()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("catp:layers=middle", "catp:layers takes last, or first, or all, or a whole number"),
        ("catp:layers=1.5", "catp:layers takes last"),
        ("catp:layers=", "catp:layers takes last"),
        ("catp:weights=", "catp:weights takes numbers separated by slashes, got ''"),
        ("catp:weights=1/x", "catp:weights takes numbers separated by slashes, got '1/x'"),
        ("catp:weights=1,0", "catp:weights takes numbers separated by slashes"),
        ("catp:image_weights=maybe", "catp:image_weights takes true or false"),
        ("catp:layers", "it takes layers=…, weights=…, image_weights"),
        ("catp:weights", "it takes layers=…, weights=…, image_weights"),
        ("catp:layer=1", "it takes layers=…, weights=…, image_weights"),
        ("catp:keep=3", "it takes layers=…, weights=…, image_weights"),
        ("catp:limit=3", "it takes layers=…, weights=…, image_weights"),
        ("catp:site=cross", "catp:site takes entry, got 'cross'"),
        ("catp:layers=first:weights=1/0", "layers or weights, not both"),
        ("l2:layers=first", "no options"),
        ("fastv:layer=0", "number of a layer from 1 on, got 0"),
        ("fastv:layer=two", "fastv:layer takes a whole number"),
    ],
)
def test_bad_options_of_entry_and_layer_methods_are_refused(spec: str, says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        make(spec, 8, OPT)


def test_an_option_of_another_place_is_refused_where_it_would_be_ignored():
    with pytest.raises(ValueError, match="does not know the option"):
        make("fastv:layer=5", 8, CROSS)


def test_a_method_goes_to_the_first_of_its_places_that_the_model_has():
    assert make("random", 8, CROSS).site is Site.CROSS
    assert make("fastv", 8, CROSS).site is Site.CROSS
    assert make("fastv", 8, OPT | CROSS).site is Site.LAYER
    assert methods_for(ENTRY) == [*("catp", "l2", "self_attention", "position", *BASELINES)]
    assert methods_for(OPT) == [*("catp", "l2", "self_attention", "position", "fastv", *BASELINES)]


def test_a_method_goes_to_another_of_its_places_if_it_is_told():
    sites = CROSS | {Site.CACHE}
    assert make("k_norm", 8, sites).site is Site.CROSS
    assert make("k_norm:site=cache", 8, sites).site is Site.CACHE
    assert make("k_norm", 8, frozenset({Site.CACHE})).site is Site.CACHE
    with pytest.raises(ValueError, match="k_norm:site takes cross, or cache, got 'read'"):
        make("k_norm:site=read", 8, sites)
    assert make("k_norm:site=cache", 8, frozenset({Site.CACHE})).site is Site.CACHE
    with pytest.raises(ValueError, match="k_norm:site takes cross, got 'cache'"):
        make("k_norm:site=cache", 8, CROSS)
    with pytest.raises(ValueError, match="it takes no options"):
        make("k_norm:seed=1", 8, CROSS)  # there is no choice


def test_every_method_is_listed_once_and_has_its_own_file():
    for name, method in METHODS.items():
        assert dataclasses.is_dataclass(method)
        assert method.__module__ == f"catp_jax.pruning.{name}"
    assert methods_for(CROSS) == ["trimmed_llama", "fastv", "k_norm", *BASELINES]


def test_an_unknown_name_without_a_model_is_answered_with_all():
    every = ", ".join(methods_for(frozenset(Site)))
    with pytest.raises(ValueError, match=f"'nope'; there are {every}$"):
        named("nope", 4)


@pytest.mark.parametrize("keep", [True, [True]])
def test_a_truth_is_no_count(keep):
    with pytest.raises(ValueError, match="keep takes a count of at least 1"):
        named("l2", keep)


@pytest.mark.parametrize("spec", ["", "cat", "Trimmed_Llama", "trimmed-llama", "fastv,random"])
def test_an_unknown_name_is_answered_with_those_that_fit(spec: str):
    with pytest.raises(ValueError, match="unknown pruning method") as error:
        make(spec, 8, CROSS)
    for name in methods_for(CROSS):
        assert name in str(error.value)


def test_a_method_for_another_place_is_answered_with_those_that_fit(monkeypatch):
    @pytree
    class Entrance:
        sites = (Site.ENTRY,)
        site: Site = static()
        keep: int = static()

    monkeypatch.setitem(pruning.METHODS, "entrance", Entrance)
    assert make("entrance", 8, ENTRY) == Entrance(site=Site.ENTRY, keep=8)
    with pytest.raises(ValueError, match="does not have") as error:
        make("entrance", 8, CROSS)
    assert "it takes trimmed_llama, fastv, k_norm, random" in str(error.value)
    with pytest.raises(ValueError, match=r"it takes catp, l2, .*, entrance"):
        make("fastv", 8, ENTRY)


def test_a_model_that_no_method_fits_is_told_so():
    with pytest.raises(ValueError, match="no method") as error:
        make("fastv", 8, frozenset({Site.READ}))
    assert "fastv" in str(error.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("trimmed_llama:ratio=0.5", "per_head=…, k_ratio=…"),
        ("trimmed_llama:k_ratio", "per_head=…, k_ratio=…"),
        ("trimmed_llama:", "per_head=…, k_ratio=…"),
        ("trimmed_llama:keep=4", "per_head=…, k_ratio=…"),
        ("random:per_head=2", "seed=…"),
        ("fastv:k=2", "rows=…"),
        ("k_norm:seed=2", "no options"),
    ],
)
def test_an_unknown_option_is_answered_with_the_known_ones(spec: str, says: str):
    with pytest.raises(ValueError, match="does not know the option") as error:
        make(spec, 8, CROSS)
    assert says in str(error.value)


@pytest.mark.parametrize("value", ["", "abc", "half", "1/2", "0,5"])
def test_an_option_that_is_no_number_is_refused(value: str):
    with pytest.raises(ValueError, match="trimmed_llama:k_ratio takes a number"):
        make(f"trimmed_llama:k_ratio={value}", 8, CROSS)


@pytest.mark.parametrize(
    "spec",
    [
        "trimmed_llama:k_ratio=0",
        "trimmed_llama:k_ratio=1.5",
        "trimmed_llama:k_ratio=nan",
        "trimmed_llama:per_head=0",
        "trimmed_llama:per_head=2.5",
        "trimmed_llama:per_head=2:k_ratio=0.5",
        "random:seed=0.5",
        "random:seed=-1",
    ],
)
def test_options_out_of_range_are_refused(spec: str):
    with pytest.raises(ValueError, match=spec.split(":")[1].split("=")[0]):
        make(spec, 8, CROSS)


@pytest.mark.parametrize("spec", ["fastv", "k_norm", "random", "random:seed=3"])
def test_a_method_without_a_budget_is_asked_for_one(spec: str):
    with pytest.raises(ValueError, match="wants a number of visual tokens to keep"):
        make(spec, None, CROSS)


def test_trimmed_llama_without_a_budget_is_asked_for_what_its_heads_want():
    with pytest.raises(ValueError, match="per_head or k_ratio"):
        make("trimmed_llama", None, CROSS)


def test_a_limit_of_each_sample_is_handed_on():
    limit = jnp.asarray([3, 5])
    assert make("k_norm", 8, CROSS, limit=limit).limit is limit


def test_what_follows_a_method_that_keeps_all_tokens_has_all_of_them():
    """Half of the keys' bytes, and of the tokens a quarter: not a quarter of a half."""
    sites = CROSS | {Site.CACHE}
    for spec, budgets in (("think,csp", "50%,25%"), ("csp,think", "25%,50%")):
        found = {
            type(one).__name__: one
            for one in pruners(named(spec, budgets), [260, 130], 260, sites, 260)
        }
        assert found["CSP"].keep == 65
        assert found["CSP"].limit.tolist() == [65, 33]
        think = found["ThinK"]
        assert think.keep / think.of == 0.5


def test_counts_after_a_method_that_keeps_all_tokens_are_counts_of_them():
    sites = CROSS | {Site.CACHE}
    _, csp = pruners(named("think,csp", "50%,200"), [260], 260, sites, 260)
    assert csp.keep == 200
    with pytest.raises(ValueError, match="keep is 300, but there are only 260"):
        pruners(named("think,csp", "50%,300"), [260], 260, sites, 260)


def test_a_share_of_bytes_is_the_same_in_every_batch():
    sites, batches = CROSS | {Site.CACHE}, ([260], [260, 1040], [7])
    found = {pruners(named("think", "33%"), some, max(some), sites)[0] for some in batches}
    assert len(found) == 1


@pytest.mark.parametrize("keep", [8, "8"])
def test_a_count_where_a_share_of_bytes_is_wanted_is_refused(keep: int | str):
    """It would be another share where a neighbour has more tokens."""
    says = f"think leaves the same share .* give it a percentage such as 50%, got {keep!r}"
    with pytest.raises(ValueError, match=says):
        named("csp,think", ["50%", keep])
