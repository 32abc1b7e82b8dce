"""What pages say of compiled programs, their bytes and times."""

import dataclasses
import io

from rich.console import Console

from benchmarks.programs import LLAMA, OPT
from benchmarks.tables import Row, read, table
from catp_jax.plan import Plan, Work
from catp_jax.plan import table as plan_table
from catp_jax.targets import Floor

FUSED = ", one kernel"


def programs() -> dict[str, Row]:
    """The compiled programs by name."""
    return {row["program"]: row for row in read("gpu_programs_h100")["programs"]}


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
