"""Why does an oracle count badly? Kept tokens alone, and among copies of one background token.

    python -m benchmarks.filled_up MODEL --scenes 100

An oracle removes nothing that a question needs, and yet the mini Llama Vision that was trained on
scenes counts too high on what it leaves, and says "yes" too often. If that comes of objects getting
a larger share of the attention than among background, it must end once copies of one background
token stand where the removed tokens were: they show nothing new, and every layer attends to as many
tokens as before. If it comes of something seen that is missing, it must stay.

Prints accuracy by family, to which side answers lean (see `testbed`), and what the copies change,
in paired differences. The last line is one JSON object.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import names_of, print_record
from benchmarks.tables import plus_minus, points
from benchmarks.testbed import LEANINGS, Answers, figures, of
from catp_jax import api
from catp_jax.contract import Keep, Reduction, View
from catp_jax.pruning.oracle import Oracle
from catp_jax.struct import pytree, static
from catp_jax.study.batches import Batches
from catp_jax.study.records import UNPRUNED, Answer, Conditions, Setting
from catp_jax.study.results import families
from catp_jax.study.tasks import Task
from catp_jax.training.scene_questions import scenes_task

SHARES = ("50%", "25%", "6%")


@pytree
class Filled(Oracle):
    """As many tokens as there were: what an oracle of `kept` keeps, and copies of a background
    token in the place of all others.
    """

    kept: int = static(default=1)

    def __call__(self, view: View, state: Any) -> tuple[Reduction, Any]:
        best = jnp.argsort(-self.score(view), axis=1, stable=True).astype(jnp.int32)
        place = jnp.arange(best.shape[1], dtype=jnp.int32)[None]
        indices = jnp.where(place < self.kept, best, self._background(view))
        return Reduction(tokens=Keep(indices=indices, valid=view.valid)), state

    def _background(self, view: View) -> jax.Array:
        """The token nearest to the mean of what is not needed, of which most is background."""
        if view.tokens is None or self.needed is None:
            raise ValueError("copies are made of tokens of which some are known to be needed")
        is_other = (self.needed[:, : view.valid.shape[1]] == 0) & view.valid
        number = jnp.maximum(is_other.sum(axis=1, dtype=jnp.int32), 1)
        others = jnp.where(is_other[..., None], view.tokens, 0)
        mean = others.sum(axis=1) / number.astype(others.dtype)[:, None]
        away = ((view.tokens - mean[:, None]) ** 2).sum(axis=2)
        return jnp.where(is_other, away, jnp.inf).argmin(axis=1, keepdims=True).astype(jnp.int32)


def filled(pruner: Oracle, tokens: int) -> Filled:
    """An oracle that leaves none of `tokens` places empty. Raises ValueError if prompts have
    budgets of their own.
    """
    if pruner.limit is not None and (np.asarray(pruner.limit) != pruner.keep).any():
        raise ValueError("copies want prompts with as many visual tokens each")
    fields = {**vars(pruner), "keep": tokens, "limit": None}
    return Filled(**fields, kept=pruner.keep)


def answers_of(model: Any, task: Task, shares: Sequence[str]) -> dict[str, list[Answer]]:
    """The answers unpruned, with an oracle, and with an oracle filled up."""
    batches = Batches(model, task.examples, Conditions(prompt=task.prompt), False, lambda _: None)
    out: dict[str, list[Answer]] = {}
    for number in range(len(batches)):
        batch = batches.encode(number, Setting(UNPRUNED, None))
        asked: dict[str, tuple[Any, ...]] = {UNPRUNED: ()}
        for share in shares:
            (oracle,) = pruners = batches.pruners(Setting("oracle", share), batch)
            asked[f"oracle, {share}"] = pruners
            asked[f"filled, {share}"] = (filled(oracle, max(batch.packed.available)),)
        for name, pruners in asked.items():
            texts = batches.ask(pruners, batch)[0].text
            out.setdefault(name, []).extend(
                Answer(
                    id=example.id,
                    text=text,
                    score=task.score(text, example),
                    kl=0.0,
                    image=example.image_id,
                    available=max(batch.packed.available),
                    kept=None,
                    family=example.family,
                )
                for example, text in zip(batch.examples, texts, strict=False)
            )
    return out


def study(
    folder: Path, name: str, task: Task, shares: Sequence[str], console: Console
) -> dict[str, Any]:
    """Prints a model's tables and returns its figures."""
    model = api.load(folder, generation_config=False)
    answers = answers_of(model, task, shares)
    right = {one.id: one.answer for one in task.examples}
    found: dict[str, Any] = {}
    for family, numbers in families(answers[UNPRUNED]).items():
        own: dict[str, Answers] = {key: of(some, numbers) for key, some in answers.items()}
        table = Table("", "right, %", "against the oracle", "leans", title=f"{name}, {family}")
        found[family] = {}
        for key, some in own.items():
            bare = key.replace("filled", "oracle")
            others = {} if bare == key else {"oracle": own[bare]}
            found[family][key] = figures(some, **others)
            told = leaning = ""
            if (gain := found[family][key].get("to oracle")) is not None:
                told = points(gain)
            if family in LEANINGS:
                _, measure, form = LEANINGS[family]
                found[family][key]["leaning"] = side, _ = measure(some, right)
                leaning = "–" if side is None else format(side, form)
            table.add_row(key, plus_minus(found[family][key]["accuracy"]), told, leaning)
        console.print(table)
    return {"checksum": model.checksum, "families": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--shares", nargs="+", default=SHARES)
    options = parser.parse_args(arguments)
    task = scenes_task(split="test", scenes=options.scenes)
    models = {
        name: study(folder, name, task, options.shares, Console())
        for name, folder in names_of(options.model).items()
    }
    print_record("filled_up", task, models=models)


if __name__ == "__main__":
    main()
