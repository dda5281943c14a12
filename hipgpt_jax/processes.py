"""Coordination of the processes of a distributed training job."""

import contextlib
import ctypes
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

from hipgpt_jax import devices

CONNECT_SECONDS = 300
# JAX's default is 100. A heartbeat comes from a thread of its own, however busy the process is.
HEARTBEAT_SECONDS = 30
# JAX's default is 300: for so long, a process that failed would wait at its exit for the others, which wait for it.
SHUTDOWN_SECONDS = 10

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_SILENT = "4"
_LOST = re.compile("Gloo|NCCL|RCCL|Connection closed by peer|Socket closed")
_JAX_LEVEL = "1"  # which JAX sets when it is imported, also for processes started from there
_handlers: list[Any] = []  # native code refers to them until the process ends


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    device: str,
    log: Callable[[str], None],
    report: Callable[[str], None],
) -> Iterator[None]:
    """Joins the other processes of a job, before JAX starts in this process, and waits for them at the end.

    If another process ends or no longer answers, JAX aborts this one; ``report`` gets the reason, and the exit code
    is 1.

    Args:
        coordinator: Address and port of process 0; with None, JAX finds all three in a Slurm, Open MPI or Kubernetes
            job.
        num_processes: Number of processes.
        process_id: Index of this process.
        device: As for ``devices.start``. Processes on CPUs communicate through gloo.
        log: Receives lines for the user.
        report: Receives the reason of an abort, on any thread.

    Raises:
        ValueError: There is no such job, or the address or a number is invalid.
    """
    # JAX's reason for an abort comes with a C++ stack trace; the handler below replaces both.
    if os.environ.get(_LOG_LEVEL, _JAX_LEVEL) == _JAX_LEVEL:
        os.environ[_LOG_LEVEL] = _SILENT
    devices.set_defaults(device, log, deterministic=False)  # no effect after JAX is imported

    import jax

    if device == "cpu" and "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        log("set jax_cpu_collectives_implementation=gloo")
    where = f"{coordinator or 'the address that the job gives'}"
    reasons = [
        f"the processes of the job did not all connect within {CONNECT_SECONDS} s: process 0 must be reachable at "
        f"{where}, and {num_processes or 'all'} processes must be started"
    ]
    _exit_on_abort(reasons, report)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of the job cannot connect: {devices.first_line(error)}. Give --coordinator, "
            f"--num_processes and --process_id, or start them through Slurm, Open MPI or Kubernetes"
        ) from error
    lost = (
        f"another process of the job ended or did not answer for {HEARTBEAT_SECONDS} s. The run is as it was at its "
        f"last saved state: start all processes again with --resume"
    )
    reasons[0] = f"JAX ended this process, because {lost} ({_LOG_LEVEL}=0 shows JAX's own message)"
    try:
        yield
        # Process 0 writes the last files alone, and JAX waits for it only for SHUTDOWN_SECONDS.
        wait_for_all("end")
    except BaseException as error:
        reasons.clear()  # this process has a reason of its own
        # An exchange that was under way may fail before the coordination service notices.
        if isinstance(error, Exception) and _LOST.search(str(error)):
            raise RuntimeError(f"{lost} ({devices.first_line(error)})") from error
        raise


def _exit_on_abort(reasons: list[str], report: Callable[[str], None]) -> None:
    """Makes an abort of native code report the reasons and exit with code 1.

    JAX's coordination service aborts in a native thread, out of reach of exceptions and of Python's signal handlers.
    """

    def handle(number: int) -> None:
        del number
        for reason in reasons:
            report(reason)
        os._exit(1)

    native = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _handlers.append(native)
    ctypes.CDLL(None).signal(signal.SIGABRT, native)


def wait_for_all(name: str) -> None:
    """Waits until all processes of the job have called it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def require_agreement(flags: dict[str, str]) -> None:
    """Raises ValueError in all processes if the flags of one differ from those of process 0."""
    first, *others = map(json.loads, _gather(json.dumps(flags, sort_keys=True)))
    for number, other in enumerate(others, 1):
        if differences := [
            f"{name} {value} and {other[name]}" for name, value in first.items() if other[name] != value
        ]:
            raise ValueError(f"the flags of processes 0 and {number} differ: {'; '.join(differences)}")


def of_first(text: str) -> str:
    """Returns process 0's text in all processes, after all have called it."""
    import jax

    return _gather(text)[0] if jax.process_count() > 1 else text


def _gather(text: str) -> list[str]:
    """Returns the text of each process, by index."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = text.encode()
    sizes = multihost_utils.process_allgather(np.asarray(len(data)))
    padded = np.frombuffer(data.ljust(int(np.max(sizes)), b" "), np.uint8)
    return [row.tobytes().decode().rstrip(" ") for row in np.asarray(multihost_utils.process_allgather(padded))]
