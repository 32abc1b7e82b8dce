"""What docs/methods.md and docs/fidelity.md say of methods: tables at equal bytes, and claims."""

from benchmarks import fidelity, fronts, trimmed_table
from benchmarks.pairs import OVER
from benchmarks.tables import Row, only, plus_minus, points, read, table
from benchmarks.testbed import SEEDS
from catp_jax.study.records import UNPRUNED
from catp_jax.study.results import RANDOM, together

PLACES = (fidelity.AT_LAYER, fidelity.IN_CACHE)


def methods_of(name: str) -> Row:
    """What `methods_table` found of a model."""
    return only(read(f"methods_table_{name}")["models"].values())


def methods(name: str, figure: str = "accuracy, attribute", what: str = "attribute, %") -> str:
    """Right answers, about attributes or others, by method and share of the bytes; a dash where a
    method takes more.
    """
    rows = methods_of(name)["rows"]
    by: dict[str, dict[str, str]] = {}
    for setting, figures in rows.items():
        if setting != UNPRUNED:
            method, _, kept = setting.rpartition(", ")
            fits = figures["cache"] <= OVER * rows[f"uniform, {kept}"]["cache"]
            cell = plus_minus(figures[figure]) if fits or method in fronts.READS else "–"
            by.setdefault(method, {})[kept] = cell
    shares = list(dict.fromkeys(kept for own in by.values() for kept in own))
    whole = plus_minus(rows[UNPRUNED][figure])
    lines = [[f"`{UNPRUNED}`", *[whole] * len(shares)]]
    lines += [[f"`{method}`", *(own[kept] for kept in shares)] for method, own in by.items()]
    return table([what, *shares], lines)


def methods_at(name: str, kept: str = "25%") -> str:
    """What a study says of each method at one budget; first what all are that keep everything, and
    last what a step moves on a GPU, where it was compiled for one.
    """
    found = methods_of(name)
    rows, whole = found["rows"], found["rows"][UNPRUNED].get("gpu")
    head = ("all questions", "right, %", "− random", "− random there", "− unpruned", "KL, nats")
    head += (
        "agree, %",
        "needed, %",
        "bytes, %",
        "prefill, %",
        *(() if whole is None else ("step, %",)),
    )
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
        taken = (
            figures["cache"] / rows[f"{together(there, SEEDS)}, {kept}"]["cache"] if there else 0.0
        )
        there = there if 1 / OVER <= taken <= OVER else ""  # at equal bytes alone
        apart = [figures.get(f"against {other}") for other in (RANDOM, there, UNPRUNED)]
        lines.append(
            (
                f"`{method}`",
                plus_minus(figures["accuracy"]),
                *("" if gain is None else points(gain) for gain in apart),
                f"{figures['KL, nats'][0]:.2f}",
                f"{100 * figures['agreement']:.0f}",
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
    """Where the projector adds nothing, and how the groups were trained."""
    found = read("vistog")
    own, scenes = found["settings"], found["task"]["scenes"]
    words = f"--keeps {' '.join(map(str, own['keeps']))} --seeds {own['seeds']}"
    return "".join(no_better(found["rows"], keep) for keep in own["keeps"]) + (
        f"Trainings of each kind: {own['seeds']}; intervals are over images, not over trainings. "
        f"The rate at which the model was trained, {own['model_peak']}, was the best of "
        f"{len(own['validation by rate'])} on validation scenes, for `vistog_grouping` with the "
        f"language model and {min(own['keeps'])} tokens; none was chosen for `nearest_centroid`, "
        f"whose model was trained at the same. From `python -m benchmarks.vistog "
        f"--work DIR {words} --steps {own['steps']} --batch {own['batch']} --train-scenes "
        f"{own['train_scenes']} --scenes {scenes}`; longer training was not tried."
    )


def no_better(rows: dict[str, Row], keep: int) -> str:
    """That to train the projector, too, makes no more answers right; nothing where it does."""
    alone, along = (
        rows[f"vistog_grouping, {trained}, {keep}"]["accuracy"]
        for trained in ("grouping", "projector")
    )
    if along[0] > alone[0]:
        return ""
    return (
        f"With {keep} tokens the projector's row is not above the grouping alone: "
        f"{plus_minus(along)} % against {plus_minus(alone)} %. "
    )
