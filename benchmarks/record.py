"""The last line of a benchmark on scenes: one JSON object that says what its figures come from."""

import datetime
import json
import platform
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
    print(json.dumps(record))
