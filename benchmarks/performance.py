"""Fills the tables of the pages, and README's sentences, from benchmarks/results/, and draws the
pictures of docs/methods.md.

    python -m benchmarks.performance              # --check: only says whether they are up to date

A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import fidelity, fronts, testbed, trimmed_table
from benchmarks.catp_table import rank_correlation
from benchmarks.pairs import OVER
from benchmarks.programs import LLAMA, OPT
from benchmarks.testbed import plus_minus, points
from catp_jax.contract import BY_LAYER, Site
from catp_jax.plan import Plan, Work
from catp_jax.plan import table as plan_table
from catp_jax.pruning import BOUNDS, site_of
from catp_jax.study.records import UNPRUNED
from catp_jax.study.results import RANDOM
from catp_jax.targets import Floor

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "docs/performance.md",
    "docs/clusters.md",
    "docs/studies.md",
    "docs/methods.md",
    "docs/fidelity.md",
    "README.md",
)
FILES = tuple(ROOT / page for page in PAGES)
MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

FUSED = ", one kernel"
PLACES = (fidelity.AT_LAYER, fidelity.IN_CACHE)
PICTURES = {name: ROOT / "docs" / f"methods_{name}.png" for name in fidelity.MODELS}

Row = Mapping[str, Any]


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def programs() -> dict[str, Row]:
    """The compiled programs by name."""
    return {row["program"]: row for row in read("gpu_programs_h100")["programs"]}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, numbers to the right."""
    head = [*head]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.3g}" if number < 1e9 else f"{number / 1e9:.1f}"


def steps() -> str:
    """Decode steps beside their floor."""
    found = programs()
    rows = [row for row in found.values() if "floor" in row and not row["program"].endswith(FUSED)]
    head = (
        "step",
        "moved, GB",
        "floor, GB",
        "ratio",
        "whole sums",
        "one kernel",
        "temporaries, MB",
    )
    return table(
        head,
        (
            (
                row["program"].replace(" step", ""),
                gigabytes(row["moved"]),
                gigabytes(row["floor"]),
                f"{row['ratio']:.3f}",
                f"{row['ratio_whole_sums']:.3f}",
                f"{found[row['program'] + FUSED]['ratio_whole_sums']:.3f}",
                f"{row['temporaries'] / 1e6:.0f}",
            )
            for row in rows
        ),
    )


def whole() -> str:
    """Prefills and whole generations."""
    rows = [row for row in programs().values() if "matrix_flops" in row]
    head = (
        "program",
        "moved, GB",
        "bandwidth, s",
        "arithmetic, s",
        "temporaries, GB",
        "compiled, s",
    )
    return table(
        head,
        (
            (
                row["program"],
                gigabytes(row["moved"]),
                f"{row['moved'] / 3e12:.3f}",
                f"{row['matrix_flops'] / 8e14:.3f}",
                gigabytes(row["temporaries"]),
                f"{row['compile_cpu_s']:.0f}",
            )
            for row in rows
        ),
    )


def pruning() -> str:
    """What scoring and gathering cost beside the prefill that they are a part of."""
    found = programs()
    lines = []
    for model, batch in ((LLAMA, 8), (OPT, 16)):
        prefill = found[f"{model} prefill, batch {batch}"]
        for name, row in found.items():
            is_method = "floor" not in row and "matrix_flops" not in row
            if is_method and name.startswith(f"{model} "):
                moved, flops = (100 * row[key] / prefill[key] for key in ("moved", "flops"))
                lines.append((name, gigabytes(row["moved"]), f"{moved:.2f} %", f"{flops:.3f} %"))
    return table(("method", "moved, GB", "of the prefill's bytes", "of its FLOPs"), lines)


def saved() -> str:
    """README's sentences."""
    found = programs()
    half, quarter = (found[f"{LLAMA} step, batch 32, {part} % kept"] for part in (50, 25))
    all_, one = found[f"{LLAMA} step, batch 32"], found[f"{LLAMA} step, batch 1"]
    less = [100 * (1 - row["moved"] / all_["moved"]) for row in (half, quarter)]
    single = 100 * (1 - found[f"{LLAMA} step, batch 1, 50 % kept"]["moved"] / one["moved"])
    return (
        f"Compiled for an H100, a decode step of Llama 3.2 11B at batch 32, with images of four "
        f"tiles, goes through {gigabytes(all_['moved'])} GB of memory; with half of the visual "
        f"tokens it is {less[0]:.0f} % less, with a quarter {less[1]:.0f} %, and so is the time "
        f"that bandwidth takes. At batch 1 nearly all of it are weights, and half the tokens save "
        f"{single:.0f} %. The cache itself shrinks in proportion, so that larger batches fit."
    )


def plans() -> list[Plan]:
    """Those of 11B on an H100: of one batch, with the largest batch compiled for, and pruned."""
    names = {field.name for field in dataclasses.fields(Plan)}
    found = []
    for row in read("plan_11b_h100")["rows"]:
        known = {name: value for name, value in row.items() if name in names}
        for phase in ("prefill_work", "token_work"):
            work = row[phase]
            known[phase] = Work(**{**work, "floor": Floor(**work["floor"])})
        largest = row["largest_batch"] if row["largest_batch_is_compiled"] else None
        found.append(Plan(**known, found_batch=largest))
    return found


def plan() -> str:
    """What `catp-jax plan` prints, as a block of text."""
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(plan_table(plans()[0]))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    return "\n".join(["```text", *lines, "```"]).replace("\n\n```", "\n```")


def found() -> str:
    """How the largest batch by a line compares with the one that was compiled for."""
    by_a_line, compiled, _ = plans()
    return (
        f"`--largest-batch` compiles for several batches until one fits and the next does not, "
        f"which takes minutes; without it, the number comes from a line through one batch, often "
        f"too few: here {by_a_line.largest_batch}, and compiling found {compiled.largest_batch}."
    )


def hardware() -> str:
    """What 11B wants, in README's words."""
    one = next(row for row in read("plan_11b_h100")["rows"] if row["kept"] == row["visual_tokens"])
    prompt = one["cross_kv"] / one["batch"]
    eight = next(row for row in read("plan_90b_8xh100")["rows"])
    return (
        f"In bfloat16 its weights take {gigabytes(one['weights'])} GB, and the cache of an image "
        f"of four tiles {gigabytes(prompt)} GB: an H100, of {one['memory'] / 1e9:.0f} GB, answers "
        f"about {one['largest_batch']} prompts at a time. Of 90B, each of 8 cards holds "
        f"{gigabytes(eight['weights'])} GB. `catp-jax plan` says what fits elsewhere. No GPU has "
        "run this yet: programs were compiled for one and read."
    )


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


def _seeds() -> tuple[list[Row], dict[str, dict[str, list[tuple[float, float, float]]]]]:
    """Attributes of models of several seeds: figures of each, and accuracy by what is kept and
    method, of methods that prune before the prompt is read.
    """
    models = read("testbed_seeds_mini")["models"]
    attributes = [found["families"]["attribute"] for found in models.values()]
    by: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for setting in attributes[0]["kept"]:
        method, _, kept = setting.partition(", ")
        if site_of(method, frozenset({Site.CROSS, *BY_LAYER})) is Site.CROSS:
            found = [one["kept"][setting]["accuracy"] for one in attributes]
            by.setdefault(kept, {})[method] = found
    return attributes, by


def bed_seeds() -> str:
    """What methods are worth in models of several seeds."""
    attributes, by = _seeds()
    head = [f"{kept}, seed {seed}" for kept in by for seed in range(len(attributes))]
    whole = [plus_minus(one["unpruned"]["accuracy"]) for one in attributes]
    rows = [[f"`{UNPRUNED}`", *whole * len(by)]]
    for method in next(iter(by.values())):
        cells = [plus_minus(one) for found in by.values() for one in found[method]]
        rows.append([f"`{method}`", *cells])
    return table(["attribute, %", *head], rows)


def bed_order() -> str:
    """Whether methods stand in the same order in models of several seeds."""
    attributes, by = _seeds()
    told = []
    for kept, found in by.items():
        methods = [some for name, some in found.items() if name not in BOUNDS]
        orders = [[some[seed][0] for some in methods] for seed in range(len(attributes))]
        alike = [rank_correlation(*pair) for pair in itertools.combinations(orders, 2)]
        told.append(f"{', '.join(f'{one:+.2f}' for one in alike)} with {kept}")
    return (
        "The order of methods, without the bounds, correlates between each two seeds by "
        f"{' and '.join(told)} of the tokens (Spearman)."
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


def methods_of(name: str) -> Row:
    """What `methods_table` found of a model."""
    return only(read(f"methods_table_{name}")["models"].values())


def methods(name: str) -> str:
    """Right answers about attributes, by method and share of the bytes; a dash where a method takes
    more.
    """
    rows = methods_of(name)["rows"]
    by: dict[str, dict[str, str]] = {}
    for setting, figures in rows.items():
        if setting != UNPRUNED:
            method, _, kept = setting.rpartition(", ")
            fits = figures["cache"] <= OVER * rows[f"uniform, {kept}"]["cache"]
            cell = (
                plus_minus(figures["accuracy, attribute"])
                if fits or method in fronts.READS
                else "–"
            )
            by.setdefault(method, {})[kept] = cell
    shares = list(dict.fromkeys(kept for own in by.values() for kept in own))
    whole = plus_minus(rows[UNPRUNED]["accuracy, attribute"])
    lines = [[f"`{UNPRUNED}`", *[whole] * len(shares)]]
    lines += [[f"`{method}`", *(own[kept] for kept in shares)] for method, own in by.items()]
    return table(["attribute, %", *shares], lines)


def methods_at(name: str, kept: str = "25%") -> str:
    """What a study says of each method at one budget; first what all are that keep everything, and
    last what a step moves on a GPU, where it was compiled for one.
    """
    found = methods_of(name)
    rows, whole = found["rows"], found["rows"][UNPRUNED].get("gpu")
    head = ("all questions", "right, %", "− random", "− random there", "− unpruned", "KL, nats")
    head += ("needed, %", "bytes, %", "prefill, %", *(() if whole is None else ("step, %",)))
    lines = []
    full = found.get("full", {})
    same = [one for one in full.values() if not one["other answers"]]
    told = [(f"{len(same)} of {len(full)} methods, 100%", max(same, key=kl_of))] if same else []
    told += [(f"`{name}`, 100%", one) for name, one in full.items() if one["other answers"]]
    for words, one in told:
        apart, empty = points(one["against unpruned"]), [""] * (len(head) - 6)
        lines.append(
            (words, plus_minus(one["accuracy"]), "", "", apart, f"{kl_of(one):.2f}", *empty)
        )
    for setting, figures in rows.items():
        method, _, own = setting.rpartition(", ")
        if own != kept:
            continue
        there = next((one for one in PLACES if f"against {one}" in figures), "")
        apart = [figures.get(f"against {other}") for other in (RANDOM, there, UNPRUNED)]
        lines.append(
            (
                f"`{method}`",
                plus_minus(figures["accuracy"]),
                *("" if gain is None else points(gain) for gain in apart),
                f"{figures['KL, nats'][0]:.2f}",
                f"{100 * figures['needed, kept'][0]:.0f}" if "needed, kept" in figures else "",
                f"{100 * figures['cache']:.0f}",
                f"{100 * figures['prefill']:.0f}",
            )
        )
        if whole is not None:
            share_of_step = figures["gpu"]["token_bytes"] / whole["token_bytes"]
            lines[-1] += (f"{100 * share_of_step:.0f}",)
    return table(head, lines)


def kl_of(full: Row) -> float:
    return full["KL, nats"]


def kept_told() -> str:
    """Which share of the features K_ratio leaves, and the paper's."""
    settings, paper = read("trimmed_table_mini")["settings"], trimmed_table.PAPER
    lines = []
    for ratio in trimmed_table.RATIOS:
        here = settings[f"trimmed_llama:k_ratio={ratio}, keep auto"]["kept"]
        theirs = [f"{own[ratio][0]:.1f}" if ratio in own else "" for own in paper.values()]
        lines.append((f"{ratio}", f"{100 * here:.1f}", *theirs))
    return table(("K_ratio", "features kept here, %", *(f"{size}, %" for size in paper)), lines)


def claims() -> str:
    """What the papers say, and whether it holds."""
    head = ("method", "what its paper says", "model", "difference, points", "here")
    return table(head, fidelity.rows())


def foreseen() -> str:
    """What AttentionPredictor's network foresees."""
    head = ("blocks chosen", "hit by the network", "by the row before", "by chance")
    return table(head, fidelity.foreseen())


def pairs_told() -> str:
    """Whether the best pair of methods beats the best one alone."""
    told = []
    for budget, own in read("pairs_llama")["budgets"].items():
        best, rows = own["best"], own["rows"]
        pairs = sum(" and " in name for name in rows)
        _, low, high = gain = rows[best["pair"]]["to best"]
        verdict = "is better" if low > 0 else "is worse" if high < 0 else "cannot be told from it"
        out = sum(" and " in name for name in own["too large"])
        first, second = best["pair"].split(" and ")
        told.append(
            f"With {budget} of the bytes half of the images chose `{best['alone']}` of the single "
            f"methods, and of {pairs} pairs `{first}` with `{second}` ({out} more take too many "
            f"bytes). On the other half that pair {verdict}: {points(gain)} points."
        )
    return " ".join(told)


def vistog() -> str:
    """What is right of learned groups and of what learns nothing, with so many tokens."""
    rows = read("vistog")["rows"]
    of = {"unpruned": UNPRUNED, "nearest_centroid": fidelity.CENTROID}
    of["its model trained along"] = f"{fidelity.CENTROID}, language_model"
    lines = []
    for name, figures in rows.items():
        method, _, keep = name.rpartition(", ") if name != UNPRUNED else (name, "", "32")
        method, _, trained = method.partition(", ")
        apart = [figures.get(f"against {other}") for other in of.values()]
        lines.append(
            (
                f"`{method}`",
                trained.replace("_", " "),
                keep,
                plus_minus(figures["accuracy"]),
                plus_minus(figures["accuracy, attribute"]),
                *("" if gain is None else points(gain) for gain in apart),
            )
        )
    head = ("", "trained", "tokens", "right, %", "attribute, %", *(f"− {name}" for name in of))
    return table(head, lines)


def vistog_told() -> str:
    """How the groups were trained."""
    found = read("vistog")
    own, scenes = found["settings"], found["task"]["scenes"]
    words = f"--keeps {' '.join(map(str, own['keeps']))} --seeds {own['seeds']}"
    return (
        f"Trainings of each kind: {own['seeds']}; intervals are over images, not over trainings. "
        f"The rate at which the model was trained, {own['model_peak']}, was the best of "
        f"{len(own['validation by rate'])} on validation scenes. From `python -m benchmarks.vistog "
        f"--work DIR {words} --steps {own['steps']} --batch {own['batch']} --train-scenes "
        f"{own['train_scenes']} --scenes {scenes}`; longer training was not tried."
    )


def only(some: Iterable[Any]) -> Any:
    """The one there is."""
    (one,) = some
    return one


PARTS: dict[str, Callable[[], str]] = {
    "steps": steps,
    "whole": whole,
    "pruning": pruning,
    "saved": saved,
    "hardware": hardware,
    "plan": plan,
    "found": found,
    "bed": bed,
    "bed_blip2": bed_blip2,
    "bed_checks": bed_checks,
    "bed_filled": bed_filled,
    "bed_seeds": bed_seeds,
    "bed_order": bed_order,
    "bed_reversed": bed_reversed,
    "catp_told": partial(catp_told, "opt"),
    "catp_told_t5": partial(catp_told, "t5"),
    "trimmed_told": trimmed_told,
    "fidelity": claims,
    "kept_told": kept_told,
    "foreseen": foreseen,
    "pairs_told": pairs_told,
    "vistog": vistog,
    "vistog_told": vistog_told,
    "methods_llama": partial(methods, "llama"),
    "methods_llama_at": partial(methods_at, "llama"),
    "methods_opt": partial(methods, "opt"),
    "methods_opt_at": partial(methods_at, "opt"),
}


def wrapped(text: str) -> str:
    """Prose in lines of 100 characters; a table, or a block of text, as it is."""
    if text.startswith(("|", "```")):
        return text
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) + 1 > 100:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return MARKED.sub(lambda mark: f"{mark[1]}\n{wrapped(PARTS[mark[2]]())}\n\n{mark[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    chosen = parser.parse_args()
    for path in FILES:
        before = path.read_text()
        after = filled(before)
        if after == before:
            continue
        if chosen.check:
            sys.exit(f"{path.name} is not what the results say: python -m benchmarks.performance")
        path.write_text(after)
    for name, path in PICTURES.items():
        rows = methods_of(name)["rows"]
        if fronts.is_current(rows, path):
            continue
        if chosen.check:
            sys.exit(f"{path.name} is not what the results say: python -m benchmarks.performance")
        fronts.draw(rows, path)


if __name__ == "__main__":
    main()
