"""``hipgpt-train``: a run from a text."""

import functools
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipgpt_jax import compilation, config, devices, processes, training_config
from hipgpt_jax.cli import program, train_flags, train_report
from hipgpt_jax.runs import directory
from hipgpt_jax.text import dataset, manifest

SUMMARY = """Train a GPT-2-style model on a text, into checkpoints/[run-name]/. Log lines go to stdout. Ctrl-C or
SIGTERM finishes the step, saves, and says how to go on. Examples:

  hipgpt-train --data-path data/data.txt --run-name my_run
  hipgpt-train --flagfile=configs/shakespeare.flags"""


def main() -> None:
    """Runs ``hipgpt-train``."""
    for name in ("absl", "asyncio"):  # where Orbax logs a traceback of what it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = functools.partial(_tell_unraisable, sys.unraisablehook)
    program.run("train", SUMMARY, train_flags.FLAGS, _train)


def _tell_unraisable(tell: Callable[..., Any], unraisable: "sys.UnraisableHookArgs") -> None:
    """Passes on all but what TensorStore's threads report after a failed write, which is told itself."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        tell(unraisable)


def _train() -> None:
    train = train_flags.train_config()
    train_flags.model_config(train_flags.VOCAB_SIZE.value)
    if train_flags.TENSORBOARD.value:
        from hipgpt_jax.training import tensorboard

        tensorboard.require()
    run = directory.check_name(train_flags.RUN_NAME.value or time.strftime("run_%Y%m%d-%H%M%S"))
    run_directory = directory.CHECKPOINTS / run
    many = _join()
    program.outlive_stdout(matters=False)  # metrics.jsonl has all that is printed
    if not many:
        _check_start(run_directory)
    device = _start_device()
    compilation.use_cache(program.note)
    if many:
        processes.require_agreement(_words())

    import jax

    from hipgpt_jax.training import flops, loop, mesh, step

    tells = jax.process_index() == 0
    rows = train.batch_size // train.grad_accum
    sizes = mesh.parse(train_flags.MESH.value, batch_size=rows, available=jax.device_count())
    layout = mesh.Layout.over(sizes)
    layout.of(step.shape_of(train_flags.model_config(train_flags.VOCAB_SIZE.value)))  # before anything is written
    if tells:
        if many:
            _check_start(run_directory)
        _prepare(run_directory)
    processes.wait_for_all("data")
    data = dataset.Dataset(run_directory)
    model = train_flags.model_config(data.manifest.vocab_size)
    size = flops.size(step.shape_of(model))
    cost = flops.per_token(model, size)
    if tells:
        _begin(run_directory, model, train)
        used = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
        _tell_of_run(run, f"{device}, {used} of {jax.device_count()}", data.manifest, flops.describe(size, cost))
    processes.wait_for_all("settings")
    job = loop.Job(
        directory=run_directory,
        data=data,
        model=model,
        train=train,
        layout=layout,
        weights_dtype=train_flags.WEIGHTS_DTYPE.value,
        attention=device.attention(train.dtype, model.head_dim, trains=True),
        utilisation=functools.partial(_utilisation, cost, device, layout.mesh.size, train.dtype),
    )
    with train_report.stopping() as stops, train_report.reporting(job, stops) as report:
        end = loop.train(job, report, resume=train_flags.RESUME.value)
    if tells:
        if end.whole:
            program.note(f"done: hipgpt-generate --run-name {run} --prompt TEXT")
        else:
            program.note(f"stopped and saved at step {end.at}; to go on: {_resume_command(run)}")


def _tell_of_run(run: str, where: str, data: manifest.Manifest, size: str) -> None:
    if data.vocab_size < train_flags.VOCAB_SIZE.value and train_flags.TOKENIZER_PATH.value is None:
        program.note(f"the text gave {data.vocab_size} ids, fewer than --vocab-size")
    tokens = f"{data.train_tokens} training and {data.validation_tokens} validation tokens"
    program.note(f"run {run} on {where}: {tokens}; {size}")


def _start_device() -> devices.Device:
    """Starts JAX, with what makes steps on a CPU faster, and tells of it."""
    on_main_thread = devices.step_on_main_thread()
    device = devices.start(train_flags.DEVICE.value, program.note, exact=False)
    program.note_emulation(device.platform, train_flags.DTYPE.value)
    if device.platform == "cpu":
        if on_main_thread:
            program.note("set jax_cpu_enable_async_dispatch=False: the main thread takes the steps")
        program.keep_freed_memory()
    return device


def _utilisation(cost: float, device: devices.Device, number: int, dtype: str, rate: float) -> float | None:
    """Model FLOPs utilisation at ``rate`` tokens a second; None where the device's peak is not known."""
    from hipgpt_jax.training import flops

    # JAX multiplies float32 in TF32 on NVIDIA's GPUs unless it is told otherwise.
    precision = "tensorfloat32" if dtype == "float32" and device.is_nvidia else dtype
    return flops.mfu(cost, rate, device.kind, number, precision)


def _join() -> bool:
    """Joins the other processes where the flags ask for it."""
    given = (train_flags.COORDINATOR.value, train_flags.NUM_PROCESSES.value, train_flags.PROCESS_ID.value)
    if any(value is not None for value in given) and None in given:
        raise ValueError("--coordinator, --num_processes and --process_id go together: give all three")
    if not (train_flags.DISTRIBUTED.value or given[0]):
        return False
    program.keep_stdout_for_text()
    processes.join(*given, device=train_flags.DEVICE.value, tell=program.note)
    return True


def _words() -> dict[str, str]:
    """What all processes must have been given alike."""
    own = {"process_id", "flagfile"}
    return {name: str(train_flags.FLAGS[name].value) for name in train_flags.FLAGS if name not in own}


def _begin(run_directory: Path, model: config.ModelConfig, train: training_config.TrainConfig) -> None:
    """Notes the settings of a new run, or holds those of a resumed one against them."""
    from hipgpt_jax.training import settings

    if not train_flags.RESUME.value:
        settings.begin(run_directory, model, train)
    elif changes := settings.require_same(run_directory, model, train, extend=train_flags.EXTEND.value):
        settings.extend(run_directory, train)
        program.note(changes)


def _sources() -> dict[str, Any]:
    """What the data is prepared from, as ``dataset.prepare`` and ``dataset.require_same`` take it."""
    given = train_flags.TOKENIZER_PATH.value
    return {
        "sources": [Path(path) for path in train_flags.DATA_PATH.value],
        "vocab_size": train_flags.VOCAB_SIZE.value,
        "text_field": train_flags.TEXT_FIELD.value,
        "tokenizer_path": None if given is None else Path(given),
    }


def _check_start(run_directory: Path) -> None:
    """Decides between a new run, a resumed one and one started anew, before anything is written."""
    if train_flags.RESET.value and train_flags.RESUME.value:
        raise ValueError("--reset deletes the run and --resume goes on with it: give one of them")
    if train_flags.EXTEND.value and not train_flags.RESUME.value:
        raise ValueError("--extend goes with --resume: it makes a run longer than it was begun")
    begun = directory.is_begun(run_directory)
    if train_flags.RESUME.value and not (begun or (run_directory / directory.SETTINGS_NAME).is_file()):
        raise FileNotFoundError(f"run {run_directory.name!r} has nothing to resume in {directory.CHECKPOINTS}/")
    if not train_flags.RESET.value and begun and (run_directory / dataset.MANIFEST_NAME).is_file():
        dataset.require_same(run_directory, **_sources())
    if begun and not (train_flags.RESET.value or train_flags.RESUME.value):
        raise ValueError(
            f"run {run_directory.name!r} exists already: --resume goes on with it, --reset deletes it and starts anew"
        )
    if not (begun or train_flags.RESET.value) and _holds_something_else(run_directory):
        raise ValueError(f"{run_directory} exists and is no run: give another --run-name, or --reset to delete it")


def _holds_something_else(run_directory: Path) -> bool:
    """Whether a directory holds more than what a run that was cut short before its first checkpoint leaves."""
    known = {dataset.MANIFEST_NAME, dataset.TOKENIZER_NAME, dataset.TOKENS_NAME, dataset.JOURNAL_NAME}
    known |= {directory.METRICS_NAME, directory.TRAIN_STATE_NAME, directory.SETTINGS_NAME}
    if not run_directory.is_dir():
        return run_directory.exists()
    return any(path.name not in known and not path.name.endswith(".tmp") for path in run_directory.iterdir())


def _prepare(run_directory: Path) -> None:
    """Prepares the data beside the run, and moves it into place, over the old run at a reset, when it is whole.

    What a kill leaves beside the run is gone on with.
    """
    if train_flags.RESUME.value:
        return  # _check_start has held it against the flags
    fresh = run_directory.with_name(f".{run_directory.name}.new")
    is_first = not fresh.parent.exists()
    fresh.mkdir(parents=True, exist_ok=True)
    try:
        with train_report.preparing() as progress:
            data = dataset.prepare(fresh, **_sources(), progress=progress)
        data.check_length(train_flags.SEQ.value)
    except (ValueError, FileNotFoundError):
        shutil.rmtree(fresh)
        if is_first:
            fresh.parent.rmdir()
        raise
    shutil.rmtree(run_directory, ignore_errors=True)
    fresh.rename(run_directory)


def _resume_command(run: str) -> str:
    words = [word for word in sys.argv[1:] if word.lstrip("-") not in ("resume", "reset", "noresume", "noreset")]
    if train_flags.RUN_NAME.value is None:
        words += ["--run-name", run]
    return shlex.join(["hipgpt-train", *words, "--resume"])


if __name__ == "__main__":
    main()
