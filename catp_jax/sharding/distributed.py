"""Starts a program that runs on several hosts, and ends it when one of them is lost.

All processes run the same command on the same files. JAX finds the others by itself under Slurm,
Kubernetes (a JobSet or an indexed Job), Open MPI and on cloud TPUs; anywhere else they are told.
"""

import os
import sys
from typing import NoReturn

import jax

HEARTBEAT = 100
"""Seconds without a sign of life after which a process counts as dead; JAX's own default."""


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = HEARTBEAT,
    patience: int = 300,
) -> None:
    """Connects this process with the others; before anything is computed.

    `coordinator` is HOST:PORT of process 0, `process_id` counts from 0; None of the three leaves it
    to JAX to find out. Raises ValueError if they do not make sense, or the others do not come
    within `patience` seconds.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"coordinator, num_processes and process_id go together; missing: {', '.join(missing)}"
        )
    if heartbeat < 1:
        raise ValueError(f"the heartbeat is at least 1 second, got {heartbeat}")
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"the coordinator is HOST:PORT of process 0, got {coordinator!r}")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id counts from 0 to num_processes - 1, got {process_id} of "
                f"{num_processes} processes"
            )
    try:
        jax.distributed.initialize(
            **{
                "coordinator_address": coordinator,
                "num_processes": num_processes,
                "process_id": process_id,
            },
            initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if missing:
            raise ValueError(
                f"no cluster was found that JAX knows (Slurm, Kubernetes, Open MPI); give the "
                f"coordinator's address, the number of processes and this one's ({reason})"
            ) from None
        raise ValueError(
            f"process {process_id} of {num_processes} found no partners at {coordinator} within "
            f"{patience} seconds; check that process 0 runs there and that the port is open "
            f"({reason})"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def give_up(error: Exception) -> NoReturn:
    """Ends this process when it lost another one: without waiting for it, as JAX would at exit."""
    reason = str(error).strip().splitlines()[0]
    print(
        f"catp-jax: process {jax.process_index()} of {jax.process_count()} lost another one and "
        f"ends; look into the others' output for the cause, then start all anew ({reason})",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
