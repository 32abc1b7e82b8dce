"""Fills the tables of the pages, and README's sentences, from benchmarks/results/, and draws the
pictures of docs/methods.md.

    python -m benchmarks.performance              # --check: only says whether they are up to date

A table stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import (
    fidelity,
    fronts,
    told_beds,
    told_guide,
    told_methods,
    told_programs,
)

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
PICTURES = {name: ROOT / "docs" / f"methods_{name}.png" for name in fidelity.MODELS}


PARTS: dict[str, Callable[[], str]] = {
    "steps": told_programs.steps,
    "whole": told_programs.whole,
    "pruning": told_programs.pruning,
    "saved": told_programs.saved,
    "hardware": told_programs.hardware,
    "plan": told_programs.plan,
    "found": told_programs.found,
    "bed": told_beds.bed,
    "bed_blip2": told_beds.bed_blip2,
    "bed_checks": told_beds.bed_checks,
    "bed_filled": told_beds.bed_filled,
    "bed_seeds": told_beds.bed_seeds,
    "bed_order": told_beds.bed_order,
    "bed_aim": told_beds.bed_aim,
    "bed_reversed": told_beds.bed_reversed,
    "catp_told": partial(told_beds.catp_told, "opt"),
    "catp_told_t5": partial(told_beds.catp_told, "t5"),
    "trimmed_told": told_beds.trimmed_told,
    "fidelity": told_methods.claims,
    "kept_told": told_methods.kept_told,
    "foreseen": told_methods.foreseen,
    "pairs_told": told_methods.pairs_told,
    "guide_worth": told_guide.worth,
    "guide_ahead": told_guide.ahead,
    "guide_exits": told_guide.exits,
    "vistog": told_methods.vistog,
    "vistog_told": told_methods.vistog_told,
    "methods_llama": partial(told_methods.methods, "llama"),
    "methods_llama_at": partial(told_methods.methods_at, "llama"),
    "methods_easy_llama": partial(told_methods.methods, "easy_llama", "accuracy", "right, %"),
    "methods_easy_opt": partial(told_methods.methods, "easy_opt", "accuracy", "right, %"),
    "methods_opt": partial(told_methods.methods, "opt"),
    "methods_opt_at": partial(told_methods.methods_at, "opt"),
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
        rows = told_methods.methods_of(name)["rows"]
        if fronts.is_current(rows, path):
            continue
        if chosen.check:
            sys.exit(f"{path.name} is not what the results say: python -m benchmarks.performance")
        fronts.draw(rows, path)


if __name__ == "__main__":
    main()
