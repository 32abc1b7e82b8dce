"""What a training run is judged by, and the folder it works in."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from catp_jax.study.tasks import Example
from catp_jax.training.loop import Figures
from catp_jax.training.photos import COLOURS, SHAPES


def is_answered(
    logits: Float[Array, "*rows s vocab"], targets: Int[Array, "*rows s"]
) -> Float[Array, "*rows"]:
    """1 where greedy decoding would give exactly the answer and then end."""
    is_right = (logits.argmax(axis=-1) == targets) | (targets < 0)
    return is_right.all(axis=-1).astype(jnp.float32)


def answer_loss(
    logits: Float[Array, "*rows s vocab"], targets: Int[Array, "*rows s"]
) -> tuple[Float[Array, ""], Figures]:
    """The answers' tokens and the ends after them."""
    is_said = (targets >= 0).astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    total = (losses * is_said).sum() / is_said.sum()
    return total, {"loss": total, "accuracy": is_answered(logits, targets).mean()}


def kind(answer: str) -> str:
    """The type of question an answer belongs to."""
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes/no"


def blind_accuracy(train_set: list[Example], test_set: list[Example]) -> float:
    """Accuracy of the commonest answer to each question's words, without any image."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in train_set:
        counts[example.question][example.answer] += 1
    best = {question: counter.most_common(1)[0][0] for question, counter in counts.items()}
    return float(np.mean([best.get(e.question) == e.answer for e in test_set]))


def minutes(log: Path) -> float:
    """How long the stages ran, interruptions left out."""
    total, before = 0.0, {}
    for line in map(json.loads, log.read_text().splitlines()):
        steps = line["step"] - before.get(line["stage"], 0)
        before[line["stage"]] = line["step"]
        total += steps * line["seconds_per_step"]
    return round(total / 60, 1)


def check_options(options: dict[str, Any], work: Path) -> None:
    """Raises ValueError if `work` holds checkpoints of a run with other options."""
    path = work / "options.json"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(options, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    other = [f"{k} {before.get(k)}, not {v}" for k, v in options.items() if before.get(k) != v]
    if other:
        raise ValueError(
            f"{work} holds a run with {', '.join(other)}; choose another --work or delete it"
        )
