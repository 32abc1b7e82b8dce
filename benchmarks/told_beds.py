"""What docs/studies.md says of the scenes, and of both seed papers' tables there."""

import itertools

from benchmarks import testbed
from benchmarks.catp_table import rank_correlation
from benchmarks.tables import Figures, Row, only, plus_minus, points, read, table
from catp_jax.contract import BY_LAYER, Site
from catp_jax.pruning import BOUNDS, site_of
from catp_jax.study.records import UNPRUNED


def bed() -> str:
    """What is left of attributes, by method and budget."""
    found = only(read("testbed_mini")["models"].values())["families"]["attribute"]["kept"]
    by: dict[str, list[str]] = {}
    for setting, figures in found.items():
        by.setdefault(setting.split(", ")[0], []).append(plus_minus(figures["accuracy"]))
    kept = dict.fromkeys(setting.split(", ")[1] for setting in found)
    return table(["attribute, %", *kept], ([f"`{name}`", *row] for name, row in by.items()))


def bed_blip2() -> str:
    """What 8 of 32 queries are worth to both mini BLIP-2s."""
    models = read("testbed_mini_blip2")["models"]
    columns = [(name, family) for name in models for family in ("attribute", "reading")]
    head = [f"{family}, {name.rpartition('-')[2].upper()}" for name, family in columns]
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for name, family in columns:
        found = models[name]["families"][family]
        kept = {key.removesuffix(", 25%"): x for key, x in found["kept"].items() if "25%" in key}
        for method, figures in {"unpruned": found["unpruned"], **kept}.items():
            cells.setdefault(method, {})[name, family] = plus_minus(figures["accuracy"])
    rows = ([f"`{name}`", *(own.get(of, "") for of in columns)] for name, own in cells.items())
    return table(["8 of 32, %", *head], rows)


def catp_told(kind: str) -> str:
    """Where the CATP paper's findings hold on a mini BLIP-2."""
    return " ".join(read("catp_table_mini")["models"][f"scenes-blip2-{kind}"]["words"])


def trimmed_told() -> str:
    """Where the Trimmed Llama paper's findings hold."""
    return " ".join(read("trimmed_table_mini")["words"])


def bed_checks() -> str:
    """What a bed must show."""
    found = only(read("testbed_mini")["models"].values())["families"]
    head = ["points", *(column.replace("\n", " ") for column in testbed.CHECKS), "blind − guessed"]
    rows = []
    for family, figures in found.items():
        told = [points(pick(figures)) for pick in testbed.CHECKS.values()]
        apart = 100 * (figures["blind"]["accuracy"][0] - figures["guessed"])
        rows.append([family, *told, f"{apart:+.0f}"])
    return table(head, rows)


def bed_reversed() -> str:
    """What an oracle is worth where keeping what is needed does not help."""
    found = only(read("testbed_mini")["models"].values())["families"]

    def right(family: str, share: str) -> str:
        return f"{100 * found[family]['kept'][f'oracle, {share}']['accuracy'][0]:.0f} %"

    first, last = testbed.SHARES[0], testbed.CHECKED
    told = [f"on {f} {right(f, first)}, then {right(f, last)}" for f in ("existence", "count")]
    return f"With {first} and {last} of the tokens the oracle answers right {', '.join(told)}."


def _seeds() -> tuple[list[str], list[Row], dict[str, dict[str, list[Figures]]]]:
    """Attributes of models of several seeds: the seeds, figures of each, and accuracy by what is
    kept and method, of methods that prune before the prompt is read.
    """
    models = read("testbed_seeds_mini")["models"]
    attributes = [found["families"]["attribute"] for found in models.values()]
    by: dict[str, dict[str, list[Figures]]] = {}
    for setting in attributes[0]["kept"]:
        method, _, kept = setting.partition(", ")
        if site_of(method, frozenset({Site.CROSS, *BY_LAYER})) is Site.CROSS:
            found = [one["kept"][setting]["accuracy"] for one in attributes]
            by.setdefault(kept, {})[method] = found
    seeds = [name.rpartition("-seed-")[2] if "-seed-" in name else "0" for name in models]
    return seeds, attributes, by


def bed_seeds() -> str:
    """What methods are worth in models of several seeds."""
    seeds, attributes, by = _seeds()
    head = [f"{kept}, seed {seed}" for kept in by for seed in seeds]
    whole = [plus_minus(one["unpruned"]["accuracy"]) for one in attributes]
    rows = [[f"`{UNPRUNED}`", *whole * len(by)]]
    for method in next(iter(by.values())):
        cells = [plus_minus(one) for found in by.values() for one in found[method]]
        rows.append([f"`{method}`", *cells])
    return table(["attribute, %", *head], rows)


def bed_order() -> str:
    """Whether methods stand in the same order in models of several seeds."""
    seeds, attributes, by = _seeds()
    names = ", ".join(f"{one}–{other}" for one, other in itertools.combinations(seeds, 2))
    told = []
    for kept, found in by.items():
        methods = [some for name, some in found.items() if name not in BOUNDS]
        orders = [[some[seed][0] for some in methods] for seed in range(len(attributes))]
        alike = [rank_correlation(*pair) for pair in itertools.combinations(orders, 2)]
        told.append(f"{', '.join(f'{one:+.2f}' for one in alike)} with {kept}")
    return (
        f"The order of methods, without the bounds, correlates between seeds {names} by "
        f"{' and '.join(told)} of the tokens (Spearman)."
    )


AIM, AIMED = 75, "trimmed_llama"
"""Which share of attributes this method was to answer, at `testbed.CHECKED`."""


def bed_aim() -> str:
    """Whether a method answers as many attributes as it was meant to, and what it keeps of them."""
    models, kept = read("testbed_seeds_mini")["models"].values(), f"{AIMED}, {testbed.CHECKED}"
    right = [100 * one["families"]["attribute"]["kept"][kept]["accuracy"][0] for one in models]
    needed = ", ".join(f"{100 * one['needed, kept'][kept]:.0f}" for one in models)
    return (
        f"With {testbed.CHECKED} of the tokens `{AIMED}` was meant to answer {AIM} %; it does so "
        f"with {sum(share >= AIM for share in right)} of {len(right)} seeds. Of the needed tokens "
        f"it keeps {needed} % there: most of the object asked about is gone."
    )


def bed_filled() -> str:
    """What an oracle is worth among copies of a background token."""
    found = only(read("filled_up_mini")["models"].values())["families"]
    shares = [key.partition(", ")[2] for key in found["count"] if key.startswith("oracle")]
    head = ["oracle alone → with copies, %", "unpruned", *shares]
    rows = []
    for family, figures in found.items():
        cells = [
            f"{plus_minus(figures[f'oracle, {kept}']['accuracy'])} → "
            f"{plus_minus(figures[f'filled, {kept}']['accuracy'])}"
            for kept in shares
        ]
        rows.append([family, plus_minus(figures[UNPRUNED]["accuracy"]), *cells])
    return table(head, rows)
