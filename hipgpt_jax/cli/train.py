"""``hipgpt-train``: trains a model on a text."""

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import absl.flags

from hipgpt_jax import config, devices, processes, training_config
from hipgpt_jax.cli import arguments, flags, program, streams, train_flags, train_init, train_report, train_start
from hipgpt_jax.runs import initial
from hipgpt_jax.text import dataset, manifest

if TYPE_CHECKING:
    from hipgpt_jax.model import mesh
    from hipgpt_jax.training import loop

_Line = dict[str, Any]

SUMMARY = """Train a GPT-2-style model on a text and save it in checkpoints/[run-name]/. Log lines go to stdout. Ctrl-C,
SIGTERM or SIGHUP finishes the step, saves, and prints the command that resumes. Examples:

  hipgpt-train --data-path data/data.txt --run-name my_run
  hipgpt-train --flagfile=configs/shakespeare.flags
  hipgpt-train --data-path data/data.txt --run-name my_run --seeds 0,1,2"""


def main() -> None:
    """Runs ``hipgpt-train``."""
    for name in ("absl", "asyncio"):  # Orbax logs a traceback there of what it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = functools.partial(_show_unraisable, sys.unraisablehook)
    program.run("train", SUMMARY, train_flags.FLAGS, _train_all)


def train(*, on_metrics: Callable[[_Line], None] | None = None, **settings: Any) -> str:
    """Trains a run from Python, as ``hipgpt-train`` does.

    Args:
        on_metrics: Called with each line of ``metrics.jsonl``, once it is written: the step and its numbers.
        **settings: Flags of ``hipgpt-train`` with ``_`` for ``-``, or fields of the configs; a list for a flag that may
            be repeated. None is the default.

    Returns:
        Name of the run, for ``load_run``.

    Raises:
        ValueError: A flag is unknown or invalid, or the run cannot be trained.
        OSError: A file cannot be read or written.
        FloatingPointError: A loss or a gradient is not finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM stopped training; the run is saved and can be resumed.
    """
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no'}{name}")
        elif value is not None:
            words += [f"--{name}={one}" for one in (value if isinstance(value, (list, tuple)) else [value])]
    try:
        values = train_flags.FLAGS
        arguments.parse(values, words, aliases=flags.aliases(values), synonyms=flags.synonyms(values))
    except absl.flags.Error as error:
        raise ValueError(str(error)) from error
    if train_flags.SEEDS.value:
        raise ValueError("seeds is an option of the command line: call train once per seed, with names of their own")
    trained = _train(on_metrics)
    if not trained.result.completed:
        raise KeyboardInterrupt(f"training stopped at step {trained.result.step}")
    return trained.run


class _Trained(NamedTuple):
    """A run that was trained, and how that ended."""

    run: str
    result: "loop.TrainResult"


def _train_all() -> None:
    """Trains the run of the flags, or one per seed of ``--seeds``."""
    seeds = train_flags.seeds()
    if not seeds:
        _train()
        return
    runs: list[str] = []
    for seed in seeds:
        with train_flags.seeded(seed):
            trained = _train()
        if not trained.result.completed:
            return
        runs.append(trained.run)
    print("\n".join(train_report.compare(runs)), flush=True)


def _show_unraisable(show: Callable[..., Any], unraisable: "sys.UnraisableHookArgs") -> None:
    """Drops what TensorStore's threads report after a failed write, which Orbax raises too."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        show(unraisable)


def _train(on_metrics: Callable[[_Line], None] | None = None) -> _Trained:
    train = train_flags.train_config()
    train_start.check_flags(train)
    base = train_init.find_base()
    model = train_flags.model_config(base.model if base else None)
    _note_warmup(train)
    is_distributed = _is_distributed()
    with contextlib.ExitStack() as stack:
        if is_distributed:
            stack.enter_context(_joined())
        program.outlive_stdout(matters=False)  # metrics.jsonl has all that is printed
        start = None if is_distributed else stack.enter_context(train_start.open_run(base))
        device = _start_device()
        if is_distributed:
            own = {"process_id", "flagfile"}
            processes.require_agreement(
                {name: str(train_flags.FLAGS[name].value) for name in train_flags.FLAGS if name not in own}
            )

        import jax

        from hipgpt_jax.model import mesh
        from hipgpt_jax.training import train_step

        rows = train.batch_size // train.grad_accum
        sizes = mesh.parse(train_flags.MESH.value, batch_size=rows, available=jax.device_count())
        layout = mesh.Layout.create(sizes)
        layout.shardings_for(train_step.param_shapes(model))  # a mesh that does not fit is an error before any write
        if is_distributed and jax.process_index() == 0:
            start = stack.enter_context(train_start.open_run(base))
        return _run(model, base.init_from if base else None, train, start, device, layout, on_metrics)


def _run(
    model: config.ModelConfig,
    init_from: initial.Initial | None,
    train: training_config.TrainConfig,
    start: train_start.Start | None,
    device: devices.Device,
    layout: "mesh.Layout",
    on_metrics: Callable[[_Line], None] | None,
) -> _Trained:
    """Trains; ``start`` is None in all processes except the first."""
    import jax

    from hipgpt_jax.training import flops, loop, train_step

    if start:
        start.prepare(model.max_seq_len)
    folder, resume_step = json.loads(
        processes.of_first(json.dumps([str(start.directory), start.resume_step] if start else None))
    )
    run_directory = Path(folder)
    run = train_flags.RUN_NAME.value or run_directory.name
    # Process 0 reads the whole file for its digest; the others wait for it before the first step.
    data = dataset.Dataset(run_directory, verify=start is not None)
    requested, model = model.vocab_size, dataclasses.replace(model, vocab_size=data.manifest.vocab_size)
    size = flops.size(train_step.param_shapes(model))
    cost = flops.per_token(model, size)
    if start:
        start.save_settings(model, train, init_from)
        sizes = layout.mesh.shape
        used = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
        if model.vocab_size < requested and train_flags.TOKENIZER_PATH.value is None:
            program.note(f"the text yields a vocabulary of {model.vocab_size}, smaller than --vocab-size")
        _note_run(run, f"{device}, {used} of {jax.device_count()}", data.manifest, flops.describe(size, cost))
        if init_from and resume_step is None:
            program.note(f"starting from the weights of {init_from}")
    processes.wait_for_all("settings")
    job = loop.Job(
        directory=run_directory,
        data=data,
        model=model,
        train=train,
        layout=layout,
        init_from=init_from,
        weights_dtype=train_flags.WEIGHTS_DTYPE.value,
        attention=device.attention(train.dtype, model.head_dim, trains=True),
        steps_in_flight=0 if device.platform == "cpu" else 1,
        utilisation=functools.partial(_utilisation, cost, device, layout.mesh.size, train.dtype),
        check_directory=start.held.check_directory if start else lambda: None,
    )
    with train_report.stopping() as should_stop, train_report.reporting(job, should_stop, resume_step) as report:
        if start:
            report = dataclasses.replace(report, saved=start.delete_replaced_run)
        if on_metrics:
            report = dataclasses.replace(report, metrics=_both(report.metrics, on_metrics))
        result = loop.train(job, report, resume_step=resume_step)
    if start:
        if result.stopped_early:
            program.note(
                f"stopped early at step {result.step}: the last {train.patience} evaluations had no lower validation "
                f"loss (--patience). --step best loads the step that had the lowest"
            )
        if result.completed:
            words = [*program.command("generate"), "--run-name", run, "--prompt", "TEXT"]
            program.note(f"done: {program.shell_command(words)}")
        else:
            program.note(f"stopped and saved at step {result.step}; to resume: {train_flags.resume_command(run)}")
    return _Trained(run, result)


def _both(first: Callable[[_Line], None], second: Callable[[_Line], None]) -> Callable[[_Line], None]:
    def call(line: _Line) -> None:
        first(line)
        second(line)

    return call


def _note_warmup(train: training_config.TrainConfig) -> None:
    if train.warmup_steps >= train.steps > 1:
        last = train.learning_rate * train.steps / train.warmup_steps
        program.note(
            f"--warmup-steps {train.warmup_steps} is not below --steps {train.steps}: the learning rate rises to "
            f"{last:.3g} at the last step and never decays"
        )


def _note_run(run: str, where: str, data: manifest.Manifest, size: str) -> None:
    tokens = f"{data.train_tokens} training and {data.validation_tokens} validation tokens"
    program.note(f"run {run} on {where}: {tokens}; {size}")


def _start_device() -> devices.Device:
    """Starts JAX, with the settings that make steps on a CPU faster."""
    on_main_thread = devices.step_on_main_thread()
    device = program.start_device(train_flags.DEVICE.value, train_flags.FLAGS.dtype, deterministic=False)
    if device.platform == "cpu":
        if on_main_thread and train_flags.VERBOSE.value:
            program.note("set jax_cpu_enable_async_dispatch=False: steps run on the main thread")
        program.keep_freed_memory(verbose=train_flags.VERBOSE.value)
    return device


def _utilisation(cost: float, device: devices.Device, number: int, dtype: str, rate: float) -> float | None:
    """Model FLOPs utilisation at ``rate`` tokens/s; None if the peak of the device is unknown."""
    from hipgpt_jax.training import flops

    # JAX multiplies float32 in TF32 on NVIDIA GPUs by default.
    precision = "tensorfloat32" if dtype == "float32" and device.is_nvidia else dtype
    return flops.mfu(cost, rate, device.kind, number, precision)


def _is_distributed() -> bool:
    """Returns whether this is one process of several."""
    given = (train_flags.COORDINATOR.value, train_flags.NUM_PROCESSES.value, train_flags.PROCESS_ID.value)
    if any(value is not None for value in given) and None in given:
        raise ValueError("--coordinator, --num_processes and --process_id go together: give all three")
    return train_flags.DISTRIBUTED.value or given[0] is not None


def _joined() -> contextlib.AbstractContextManager[None]:
    program.keep_stdout_for_text()
    return processes.joined(
        train_flags.COORDINATOR.value,
        train_flags.NUM_PROCESSES.value,
        train_flags.PROCESS_ID.value,
        device=train_flags.DEVICE.value,
        log=program.note,
        report=functools.partial(streams.report, "train", "error"),
    )


if __name__ == "__main__":
    main()
