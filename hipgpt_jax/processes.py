"""The processes of a training job that spans several: they find one another, wait and agree."""

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
    tell: Callable[[str], None],
) -> None:
    """Joins the other processes of a job; before JAX starts in this one.

    Args:
        coordinator: Address and port of process 0; None leaves all three to JAX, which knows Slurm,
            Open MPI and Kubernetes.
        num_processes: Processes in all.
        process_id: Number of this one.
        device: As for ``start``. Processes on CPUs talk through gloo.
        tell: Takes a line for the user.

    Raises:
        ValueError: The processes did not find one another.
    """
    devices.set_defaults(device, tell, exact=False)  # once JAX is imported it is too late

    import jax

    if device == "cpu" and "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        tell("set jax_cpu_collectives_implementation=gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of the job did not find one another: {devices.first_line(error)}. Give --coordinator, "
            f"--num_processes and --process_id, or start it through Slurm, Open MPI or Kubernetes"
        ) from error


def wait_for_all(name: str) -> None:
    """Returns when every process of the job has come here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def require_agreement(words: dict[str, str]) -> None:
    """Raises ValueError, in every process, where one was given other flags than process 0."""
    first, *others = map(json.loads, _gather(json.dumps(words, sort_keys=True)))
    for number, other in enumerate(others, 1):
        if differences := [
            f"{name} {value} and {other[name]}" for name, value in first.items() if other[name] != value
        ]:
            raise ValueError(f"processes 0 and {number} were given different flags: {'; '.join(differences)}")


def of_first(text: str) -> str:
    """Returns the text that process 0 gives, in every process, once all have come here."""
    import jax

    return _gather(text)[0] if jax.process_count() > 1 else text


def _gather(text: str) -> list[str]:
    """The text of each process, in the order of their numbers."""
    import numpy as np
    from jax.experimental import multihost_utils

    data = text.encode()
    sizes = multihost_utils.process_allgather(np.asarray(len(data)))
    padded = np.frombuffer(data.ljust(int(np.max(sizes)), b" "), np.uint8)
    return [row.tobytes().decode().rstrip(" ") for row in np.asarray(multihost_utils.process_allgather(padded))]
