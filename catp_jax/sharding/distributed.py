"""Starts a program that runs on several hosts, and ends it when one of them is lost.

All processes run the same command on the same files. JAX finds the others by itself under Slurm,
Kubernetes (a JobSet or an indexed Job), Open MPI and on cloud TPUs; anywhere else they are told.
"""

import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

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
    to JAX to find out. Raises ValueError if they do not make sense, or process 0 does not answer
    within `patience` seconds; ends the process with a message if others do not come, or if JAX
    aborts it later because one was lost.
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
    if not 1 <= heartbeat <= 86_400:
        raise ValueError(f"the heartbeat is 1 second to a day, got {heartbeat}")
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"the coordinator is HOST:PORT of process 0, got {coordinator!r}")
        if not 0 <= process_id < num_processes < 2**20:
            raise ValueError(
                f"process_id counts from 0 to num_processes - 1, got {process_id} of "
                f"{num_processes} processes"
            )
        if process_id > 0:  # the first one listens; JAX aborts if nobody does
            _wait_for(host, int(port), patience)
    _end_aborts_with_a_message("this one" if process_id is None else f"process {process_id}")
    alarm = threading.Timer(patience, _give_up, [num_processes, patience])  # JAX would abort
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **{
                "coordinator_address": coordinator,
                "num_processes": num_processes,
                "process_id": process_id,
            },
            initialization_timeout=patience + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        raise ValueError(
            "no cluster was found that JAX knows (Slurm, Kubernetes, Open MPI); give the "
            f"coordinator's address, the number of processes and this one's ({_first(error)})"
        ) from None
    except RuntimeError as error:
        raise ValueError(
            f"the processes could not be connected; is the port free and open on all hosts, and "
            f"does every one run? ({_first(error)})"
        ) from None
    finally:
        alarm.cancel()


_handlers = []  # C calls them, which Python does not see


def _end_aborts_with_a_message(name: str) -> None:
    """JAX aborts a process whose coordinator is gone or says that a host is; this lets it end as
    one does that noticed by itself. C's handler, since abort() does not return to Python's.
    """
    if os.name != "posix":
        return
    message = (
        f"catp-jax: {name} was aborted, mostly since another one was lost; look above and into "
        "the others' output for the cause, then start all anew\n"
    ).encode()

    def handle(_: int) -> None:
        os.write(2, message)
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _handlers.append(handler)
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    install(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def _give_up(wanted: int | None, patience: int) -> None:
    """Ends this process, which waits for others within JAX, where no exception reaches it."""
    number = "all the" if wanted is None else f"all {wanted}"
    print(
        f"catp-jax: {number} processes did not come within {patience} seconds; check that every "
        "one was started and that their network lets them through",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(1)


def _wait_for(host: str, port: int, patience: int) -> None:
    """Returns when somebody listens there. Raises ValueError after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(patience, 1)):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"nobody answers at {host}:{port} within {patience} seconds ({error}); check "
                    "that process 0 runs there and that the port is open"
                ) from None
            time.sleep(0.2)


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def agreed(flags: Sequence[bool]) -> list[bool]:
    """Which of these are true in every process; each gives as many."""
    if not jax.distributed.is_initialized():
        return list(flags)
    every = multihost_utils.process_allgather(np.asarray(flags, bool))
    return every.reshape(-1, len(flags)).all(axis=0).tolist()


def gathered(text: str) -> list[str]:
    """What each process says, in order; all have to take part."""
    if not jax.distributed.is_initialized():
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(encoded.size)).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: encoded.size] = encoded
    every = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(every, sizes, strict=True)]


LOST = re.compile("gloo|nccl|heartbeat|coordination|connect|socket|peer|task", re.IGNORECASE)


def lost(error: Exception) -> str | None:
    """What to say when another process was lost; None for any other error."""
    if not jax.distributed.is_initialized() or not LOST.search(str(error)):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost another one and ends; look "
        f"into the others' output for the cause, then start all anew ({_first(error)})"
    )


def leave(code: int) -> NoReturn:
    """Ends this process: at once if there are others, which JAX would wait for at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
