"""What a study compares: methods with budgets, and smaller images, as its options name them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from catp_jax import cli_options as opts
from catp_jax.terminal import say

if TYPE_CHECKING:  # at run time inside the functions, so that --help is quick
    from catp_jax.study.records import Setting
    from catp_jax.study.tasks import Example

LEVELS = ("50%", "25%", "12.5%")
DRAWS = 5  # seeds of random, where all methods are compared


def settings_of(prune: list[str] | None, keep: list[str] | None) -> "list[Setting]":
    """Each --prune with each --keep of as many budgets, checked as far as that goes without a
    model; none if that decides which methods there are.

    Raises BadParameter for one that meets no other, and for what is no method or budget.
    """
    from catp_jax.pruning.named import AUTO, named, split
    from catp_jax.study.records import Setting

    methods = {",".join(words): len(words) for words in map(split, prune or [])}
    with opts.wrong_call():
        budgets = {tuple(_budget(word) for word in split(text)): text for text in keep or LEVELS}
    not_fixed = (
        "a study compares fixed budgets: --keep auto is for generate, and for methods that have "
        "learned their own (eigen)"
    )
    if not methods and any(AUTO in some for some in budgets):
        raise typer.BadParameter(not_fixed)
    counted = {f"--prune {method}": count for method, count in methods.items()}
    counted |= {f"--keep {text}": len(some) for some, text in budgets.items() if keep}
    counts = {*methods.values()} if prune else {1}
    shared = counts & {len(some) for some in budgets}
    if alone := [words for words, count in counted.items() if count not in shared]:
        raise typer.BadParameter(
            f"{alone[0]} meets nothing: what commas separate applies in order, one budget for each "
            "method (--prune l2,fastv --keep 50%,8); to compare, repeat --prune and --keep"
        )
    settings = [
        Setting(method, some[0] if count == 1 else ",".join(map(str, some)))
        for method, count in methods.items()
        for some in budgets
        if len(some) == count
    ]
    fixed = [one for one in settings if _is_fixed(one)]
    for name in ("method", "keep"):  # auto meets those alone that take it
        if {getattr(one, name) for one in settings} - {getattr(one, name) for one in fixed}:
            raise typer.BadParameter(not_fixed)
    with opts.wrong_call():
        for one in fixed:
            named(one.method, one.keep)
    return fixed


def _is_fixed(setting: "Setting") -> bool:
    """Whether no budget depends on the data, as far as its methods are known."""
    from catp_jax.pruning import METHODS
    from catp_jax.pruning.named import is_fixed, split

    parts = zip(split(setting.method), split(str(setting.keep)), strict=True)
    return all(is_fixed(*part) for part in parts if part[0].partition(":")[0] in METHODS)


def _budget(text: str) -> int | str:
    """A count, a percentage in its plainest form, or auto."""
    from catp_jax.pruning import budget
    from catp_jax.pruning.named import AUTO

    if text == AUTO:
        return text
    parsed = budget.parse(text)
    return f"{parsed.percent:g}%" if parsed.number is None else parsed.number


def baselines(
    scales: list[float] | None, tiles: list[int] | None, config: Any
) -> tuple[list[float], list[int]]:
    """What stands beside all methods, where it is not given: half the pixels a side, and one tile
    where images have several.
    """
    most = getattr(config.vision, "max_num_tiles", 1)
    return scales or [0.5], tiles or ([1] if most > 1 else [])


def smaller_images(
    scales: list[float] | None, tiles: list[int] | None, config: Any
) -> "list[Setting]":
    """Settings of smaller images, for a model of this configuration. Raises BadParameter."""
    from catp_jax.study.records import Setting

    each: list[dict[str, Any]] = [{"image_scale": scale} for scale in scales or []]
    each += [{"tiles": number} for number in tiles or []]
    for seen in each:
        opts.Seeing(**seen).checked(config)
    return [Setting(name, str(value)) for seen in each for name, value in seen.items()]


def all_that_fit(
    model: Any, keep: list[str] | None, examples: "Sequence[Example]"
) -> "list[Setting]":
    """Every method with every budget that it takes, random with several seeds, and the bounds if
    the task knows what is needed.
    """
    from catp_jax.pruning import BOUNDS, methods_for
    from catp_jax.pruning.named import is_by_bytes

    methods = methods_for(model.sites)
    methods += [f"random:seed={seed}" for seed in range(1, DRAWS) if "random" in methods]
    methods += BOUNDS if any(example.needed for example in examples) else ()
    every = keep or [*LEVELS]
    shares = [text for text in every if text.strip().endswith("%")]
    if (left := [m for m in methods if is_by_bytes(m)]) and not shares:
        say(f"left out: {', '.join(left)}; give --keep a percentage, they take no count")
    settings: list[Setting] = []
    for method in methods:
        budgets = shares if is_by_bytes(method) else every
        settings += settings_of([method], budgets) if budgets else []
    return settings


def check_bounds(settings: "Sequence[Setting]", task: str, examples: "Sequence[Example]") -> None:
    """Raises BadParameter for a bound of a task that does not know what is needed."""
    from catp_jax.pruning import BOUNDS
    from catp_jax.pruning.named import split

    named = {spec.partition(":")[0] for one in settings for spec in split(one.method)}
    if (told := named & {*BOUNDS}) and not any(example.needed for example in examples):
        raise typer.BadParameter(
            f"{sorted(told)[0]} must be told which visual tokens are needed, and no question of "
            f"{task} says so (scenes do)"
        )


def check_fit(settings: "Sequence[Setting]", model: Any) -> None:
    """Raises ValueError for a method that prunes what the model does not have."""
    from catp_jax.pruning import make
    from catp_jax.pruning.named import split

    for spec in dict.fromkeys(spec for setting in settings for spec in split(setting.method)):
        make(spec, 1, model.sites)
