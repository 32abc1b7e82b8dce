"""What benchmarks on scenes share: models by name, and a last line, one JSON object that says what
its figures come from.
"""

import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from catp_jax.study.tasks import Task


def print_record(benchmark: str, task: Task, **figures: Any) -> None:
    """Prints the figures with the day, the device, the versions and the questions."""
    record = {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "task": task.source,
        **figures,
    }
    print(json.dumps(_rounded(record), allow_nan=False))


def _rounded(value: Any) -> Any:
    """To five decimals, as many as such figures have."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """The models by what they are called in tables and journals. Raises SystemExit for two of one
    name.
    """
    names: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in names:
            raise SystemExit(
                f"error: {names[name]} and {folder} are both called {name}; rename one"
            )
        names[name] = folder
    return names
