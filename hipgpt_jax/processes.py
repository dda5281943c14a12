"""Coordination of the processes of a distributed training job."""

import json
import os
from collections.abc import Callable

from hipgpt_jax import devices


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    device: str,
    log: Callable[[str], None],
) -> None:
    """Joins the other processes of a job; before JAX starts in this process.

    Args:
        coordinator: Address and port of process 0; with None, JAX finds all three in a Slurm, Open MPI or Kubernetes
            job.
        num_processes: Number of processes.
        process_id: Index of this process.
        device: As for ``devices.start``. Processes on CPUs communicate through gloo.
        log: Receives lines for the user.

    Raises:
        ValueError: The processes cannot connect.
    """
    devices.set_defaults(device, log, deterministic=False)  # no effect after JAX is imported

    import jax

    if device == "cpu" and "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        log("set jax_cpu_collectives_implementation=gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of the job cannot connect: {devices.first_line(error)}. Give --coordinator, "
            f"--num_processes and --process_id, or start them through Slurm, Open MPI or Kubernetes"
        ) from error


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
