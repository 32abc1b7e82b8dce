"""What of the papers' claims holds here: the rows of docs/fidelity.md, from benchmarks/results/.

That one way beats another agrees if the whole 95 % interval of the paired difference lies above
zero, disagrees if it lies below, and is undecided else; "the same" means that no answer changed
between right and wrong. That nothing is lost agrees if no more than two points are within the
interval, disagrees if more are all through it, and is undecided else.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.tables import only, points, read
from catp_jax.study.records import UNPRUNED
from catp_jax.study.results import RANDOM

LITTLE = 0.02
"""What may be lost where a paper says that nothing is."""
LLAMA, OPT, T5 = "Llama mini", "BLIP-2 OPT mini", "BLIP-2 T5 mini"
AT_LAYER, IN_CACHE = (f"{RANDOM}:site={place}" for place in ("layer", "cache"))
MODELS = {"llama": LLAMA, "opt": OPT}
LAST = "catp:layers=6"
TRAINED, CENTROID = "vistog_grouping, language_model", "nearest_centroid"

Gain = tuple[float, float, float]
"""A paired difference and its interval."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says of a method, and where the results have the figure: how much better
    `setting` is than `other`, on the questions of a `family` (None: on all). `is_reversed`: the
    paper says that the other one is better; `is_kept`: that nothing is lost. `is_harsher`: less is
    left here than the paper speaks of, so that a loss says nothing against it. `model`: the one
    alone that it can be told of.
    """

    method: str
    says: str
    setting: str
    other: str
    family: str | None = None
    is_reversed: bool = False
    is_kept: bool = False
    is_harsher: bool = False
    model: str | None = None

    def found(self, rows: dict[str, Any]) -> Gain | None:
        """The figure; None if this model has none."""
        name = f"against {self.other}" + ("" if self.family is None else f", {self.family}")
        gain = rows.get(self.setting, {}).get(name)
        if gain is None:
            return None
        mean, low, high = gain
        return (-mean, -high, -low) if self.is_reversed else (mean, low, high)

    def verdict(self, gain: Gain) -> str:
        """Whether the figure agrees with the paper."""
        _, low, high = gain
        if low == high == 0 and not self.is_kept:
            return "the same"
        most = -LITTLE if self.is_kept else 0.0
        if low >= most and (self.is_kept or low > 0):
            return "agrees"
        return "disagrees" if high < most and not self.is_harsher else "undecided"


CLAIMS = (
    Claim("CATP", "better than self-attention", f"{LAST}, 1/4", "self_attention"),
    Claim("CATP", "better than L2", f"{LAST}, 1/4", "l2"),
    Claim("CATP", "the first layer votes better than the last", "catp:layers=1, 1/4", LAST),
    Claim(
        "CATP",
        "image tokens' votes are better weighted (its variant)",
        "catp:image_weights, 1/4",
        LAST,
    ),
    Claim(
        "Trimmed Llama",
        "half of the features do as well as all",
        "trimmed_llama, 50%",
        UNPRUNED,
        is_kept=True,
    ),
    Claim(
        "Trimmed Llama",
        "the same, attributes",
        "trimmed_llama, 50%",
        UNPRUNED,
        "attribute",
        is_kept=True,
    ),
    Claim("FastV", "better than random tokens", "fastv, 25%", RANDOM, model=LLAMA),
    Claim("FastV", "the same, attributes", "fastv, 25%", RANDOM, "attribute", model=LLAMA),
    Claim("FastV", "better than random tokens in front of the same layer", "fastv, 25%", AT_LAYER),
    Claim("FastV", "the same, attributes", "fastv, 25%", AT_LAYER, "attribute"),
    Claim(
        "FastV",
        "the last row's attention (the code) does as well as that of all rows (the text)",
        "fastv:rows=all, 25%",
        "fastv",
        is_reversed=True,
        is_kept=True,
    ),
    Claim("FastV", "half of the tokens do as well as all", "fastv, 50%", UNPRUNED, is_kept=True),
    Claim(
        "K-norm",
        "each head's short keys are better than random tokens of the same cache",
        "k_norm:site=cache, 25%",
        IN_CACHE,
    ),
    Claim("K-norm", "the same, attributes", "k_norm:site=cache, 25%", IN_CACHE, "attribute"),
    Claim(
        "CSP",
        "an even split (r = 0.5) is better than r = 0.1",
        "csp:ratio=0.1, 25%",
        "csp",
        is_reversed=True,
        model=OPT,
    ),
    Claim(
        "CSP",
        "an even split is better than r = 0.9",
        "csp:ratio=0.9, 25%",
        "csp",
        is_reversed=True,
        model=OPT,
    ),
    Claim(
        "Elastic Cache",
        "merging is better than evicting",
        "elastic_cache:evicts, 25%",
        "elastic_cache",
        is_reversed=True,
    ),
    Claim("ZipVL", "half of the tokens do as well as all", "zipvl, 50%", UNPRUNED, is_kept=True),
    Claim("ZipVL", "the same, attributes", "zipvl, 50%", UNPRUNED, "attribute", is_kept=True),
    Claim(
        "AirCache",
        "a tenth of the tokens loses next to nothing (here an eighth)",
        "aircache, 12.5%",
        UNPRUNED,
        is_kept=True,
    ),
    Claim(
        "ThinK",
        "40 % of the key channels can go (here half of 16)",
        "think, 75%",
        UNPRUNED,
        is_kept=True,
        is_harsher=True,
    ),
    Claim(
        "Eigen Attention",
        "40 % of the bytes can go (here half)",
        "eigen, 50%",
        UNPRUNED,
        is_kept=True,
        is_harsher=True,
    ),
    Claim("Eigen Attention", "the same, with a quarter gone", "eigen, 75%", UNPRUNED, is_kept=True),
    Claim(
        "SGL",
        "what a guide attends to in all layers is better than what the model does in one",
        "sgl, 6%",
        "fastv",
    ),
    Claim("SGL", "the same, attributes", "sgl, 6%", "fastv", "attribute"),
    Claim("SGL", "the same, all questions, a quarter kept", "sgl, 25%", "fastv"),
    Claim(
        "SGL",
        "nine tenths of the tokens can go (here seven eighths)",
        "sgl, 12.5%",
        UNPRUNED,
        is_kept=True,
    ),
    Claim(
        "SGL",
        "what the guide is sure of (above 0.9) it can answer itself",
        "sgl, above 0.9 the guide",
        "sgl",
        is_kept=True,
    ),
    Claim(
        "VisToG",
        "a ninth of the tokens does nearly as well as all (here a quarter)",
        f"{TRAINED}, 8",
        UNPRUNED,
        is_kept=True,
        model=T5,
    ),
    Claim("VisToG", "groups are better than pooling", f"{TRAINED}, 8", "pool", model=T5),
    Claim(
        "VisToG", "groups are better than nearest centroids", f"{TRAINED}, 8", CENTROID, model=T5
    ),
    Claim(
        "VisToG",
        "the same, with centroids that the model was trained along with, too",
        f"{TRAINED}, 8",
        f"{CENTROID}, language_model",
        model=T5,
    ),
)


def rows() -> Iterator[tuple[str, ...]]:
    """Method, claim, model, what was found, whether it agrees."""
    tables = {}
    for name, model in MODELS.items():
        tables[model] = only(read(f"methods_table_{name}")["models"].values())["rows"]
    guided = read("guide_mini")
    tables[LLAMA] |= {name: row for name, row in guided["rows"].items() if name[:5] == "sgl, "}
    exits = {f"sgl, above {row['threshold']:g} the guide": row for row in guided["exits"]["25%"]}
    tables[LLAMA] |= exits
    tables[T5] = read("vistog")["rows"]
    votes = read("catp_table_mini")["models"]
    for model, name in {OPT: "scenes-blip2-opt", T5: "scenes-blip2-t5"}.items():
        for pair, gains in votes[name]["paired"].items():
            own, _, other = pair.partition(" − ")
            tables[model].setdefault(f"{own}, 1/4", {})[f"against {other}"] = gains["1/4"]
    for claim in CLAIMS:
        for model, table in tables.items():
            gain = claim.found(table) if claim.model in (None, model) else None
            if gain is not None:
                yield claim.method, claim.says, model, points(gain), claim.verdict(gain)


def foreseen() -> Iterator[tuple[str, ...]]:
    """What AttentionPredictor's network foresees of the blocks with most attention, by share."""
    figures = read("attention_predictor_mini")["figures"]
    shares: dict[str, list[str]] = {}
    for name, rate in figures.items():
        share, _, _ = name.removeprefix("foreseen of ").partition(" of the blocks")
        shares.setdefault(share, []).append(f"{100 * rate:.0f} %")
    for share, rates in shares.items():
        yield share, *rates
