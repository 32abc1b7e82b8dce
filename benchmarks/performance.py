"""Fills the tables of the pages, and README's sentences, from benchmarks/results/.

    python -m benchmarks.performance              # --check: only says whether they are up to date

A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import fidelity, guide, testbed
from benchmarks.pairs import OVER
from benchmarks.programs import LLAMA, OPT
from catp_jax.plan import Plan, Work
from catp_jax.plan import table as plan_table
from catp_jax.study.records import UNPRUNED
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
READS = ("attention_predictor",)
"""Methods that leave the cache as it is."""

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
        by.setdefault(setting.split(", ")[0], []).append(share(figures["accuracy"]))
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
            cells.setdefault(method, {})[name, family] = share(figures["accuracy"])
    rows = ([f"`{name}`", *(own.get(of, "") for of in columns)] for name, own in cells.items())
    return table(["8 of 32, %", *head], rows)


def catp_told(kind: str) -> str:
    """Where the CATP paper's findings hold on a mini BLIP-2."""
    return " ".join(read("catp_table_mini")["models"][f"scenes-blip2-{kind}"]["words"])


def trimmed_told() -> str:
    """Where the Trimmed Llama paper's findings hold."""
    return " ".join(read("trimmed_table_mini")["words"])


def share(figures: tuple[float, float, float]) -> str:
    """In %, with half its interval."""
    mean, low, high = figures
    return f"{100 * mean:.0f} ± {50 * (high - low):.0f}"


def bed_checks() -> str:
    """What a bed must show."""
    found = only(read("testbed_mini")["models"].values())["families"]
    head = ["points", *(column.replace("\n", " ") for column in testbed.CHECKS), "blind − guessed"]
    rows = []
    for family, figures in found.items():
        cells = [[100 * number for number in pick(figures)] for pick in testbed.CHECKS.values()]
        apart = 100 * (figures["blind"]["accuracy"][0] - figures["guessed"])
        told = [f"{mean:+.0f} [{low:+.0f}, {high:+.0f}]" for mean, low, high in cells]
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


def methods(name: str) -> str:
    """Right answers about attributes, by method and share of the bytes; a dash where a method takes
    more.
    """
    rows = only(read(f"methods_table_{name}")["models"].values())["rows"]
    by: dict[str, dict[str, str]] = {}
    for setting, figures in rows.items():
        if setting != UNPRUNED:
            method, _, kept = setting.rpartition(", ")
            fits = figures["cache"] <= OVER * rows[f"uniform, {kept}"]["cache"]
            cell = share(figures["accuracy, attribute"]) if fits or method in READS else "–"
            by.setdefault(method, {})[kept] = cell
    shares = list(dict.fromkeys(kept for own in by.values() for kept in own))
    whole = share(rows[UNPRUNED]["accuracy, attribute"])
    lines = [[f"`{UNPRUNED}`", *[whole] * len(shares)]]
    lines += [[f"`{method}`", *(own[kept] for kept in shares)] for method, own in by.items()]
    return table(["attribute, %", *shares], lines)


def methods_at(name: str, kept: str = "25%") -> str:
    """What a study says of each method at one budget."""
    rows = only(read(f"methods_table_{name}")["models"].values())["rows"]
    head = ("all questions", "right, %", "− random", "− unpruned", "KL, nats", "needed, %")
    lines = []
    for setting, figures in rows.items():
        method, _, own = setting.rpartition(", ")
        if own != kept:
            continue
        apart = [figures.get(f"against {other}") for other in ("random", UNPRUNED)]
        lines.append(
            (
                f"`{method}`",
                share(figures["accuracy"]),
                *("" if gain is None else points(gain) for gain in apart),
                f"{figures['KL, nats'][0]:.2f}",
                f"{100 * figures['needed, kept'][0]:.0f}" if "needed, kept" in figures else "",
                f"{100 * figures['cache']:.0f}",
                f"{100 * figures['prefill']:.0f}",
            )
        )
    return table((*head, "bytes, %", "prefill, %"), lines)


def claims() -> str:
    """What the papers say, and whether it holds."""
    head = ("method", "what its paper says", "model", "difference, points", "here")
    return table(head, fidelity.rows())


def foreseen() -> str:
    """What AttentionPredictor's network foresees."""
    head = ("blocks chosen", "hit by the network", "by the row before", "by chance")
    return table(head, fidelity.foreseen())


def guided(part: str) -> str:
    """What a guide's choice is worth, how far it is ahead, and what comes of early exit."""
    record = read("guide_mini")
    columns = [f"{what}, {kept}" for what in ("attribute", "all") for kept in guide.SHARES]
    if part == "worth":
        needed = (f"needed, {kept}" for kept in guide.SHARES)
        return table(["%", *columns, *needed], guide.told(record["rows"]))
    if part == "ahead":
        return table(["points ahead of", *columns], guide.told_apart(record["rows"]))
    head = ("threshold", "the guide answers, %", "right, %", "as many at random, %", "− no exit")
    return table(head, guide.told_exits(record["exits"][guide.SHARES[0]]))


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


def points(figures: tuple[float, float, float]) -> str:
    """A difference in points, with its interval."""
    mean, low, high = (f"{round(100 * figure):+d}" for figure in figures)
    return f"{mean} [{low}, {high}]"


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
    "bed_reversed": bed_reversed,
    "catp_told": partial(catp_told, "opt"),
    "catp_told_t5": partial(catp_told, "t5"),
    "trimmed_told": trimmed_told,
    "fidelity": claims,
    "foreseen": foreseen,
    "pairs_told": pairs_told,
    "guide_worth": partial(guided, "worth"),
    "guide_ahead": partial(guided, "ahead"),
    "guide_exits": partial(guided, "exits"),
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


if __name__ == "__main__":
    main()
