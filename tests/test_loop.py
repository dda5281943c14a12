"""The training loop: fetching metrics late changes no bit of a run and saves nothing that is not finite."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import jax
import numpy as np
import pytest

from hipgpt_jax import training_config
from hipgpt_jax.model import mesh
from hipgpt_jax.text import dataset
from hipgpt_jax.training import loop

TRAIN = training_config.TrainConfig(
    steps=8, warmup_steps=2, dropout=0.1, ckpt_every=4, eval_every=3, eval_batches=2, log_every=1
)
QUIET = loop.Report(log=lambda line: None, progress=lambda step, loss, rate: None)


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """Optax 0.2.8 itself promotes a Python float with an integer count; our own code is tested strictly elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def job(path: Path, steps_in_flight: int, **changes: Any) -> loop.Job:
    """Returns a job on one device, in a directory whose data is prepared if it is missing."""
    run = path / str(steps_in_flight)
    if not run.exists():
        fakes.make_run(path, run.name, steps=())
    return loop.Job(
        directory=run,
        data=dataset.Dataset(run),
        model=fakes.RUN_MODEL,
        train=dataclasses.replace(TRAIN, **changes),
        layout=mesh.Layout.create({"data": 1, "fsdp": 1, "model": 1}),
        steps_in_flight=steps_in_flight,
    )


def lines(run: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics, without their timing."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line.keys() - {"milliseconds", "tokens_per_second"}} for line in found]


@pytest.mark.slow
def test_metrics_fetched_late_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is dispatched before the metrics of the last are fetched, except after an evaluation."""
    order: list[str] = []
    batch_at = dataset.Dataset.batch_at

    def record_batch(self: dataset.Dataset, number: int, **more: Any) -> np.ndarray:
        order.append(f"step {number + 1}")
        return batch_at(self, number, **more)

    monkeypatch.setattr(dataset.Dataset, "batch_at", record_batch)
    report = dataclasses.replace(QUIET, progress=lambda step, loss, rate: order.append(f"loss {step}"))
    for steps_in_flight in (0, 1):
        order.clear()
        assert loop.train(job(tmp_path, steps_in_flight), report) == (8, True, False)
    assert order[:6] == ["step 1", "step 2", "loss 1", "step 3", "loss 2", "loss 3"]
    assert lines(tmp_path / "0") == lines(tmp_path / "1")
    assert [line["step"] for line in lines(tmp_path / "1")] == [1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    weights = [(tmp_path / name / f"{name}_step8.bin").read_bytes() for name in ("0", "1")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_run_stopped_with_a_step_in_flight_resumes_to_the_same_bits(tmp_path: Path) -> None:
    loop.train(job(tmp_path, 0), QUIET)
    stopping = dataclasses.replace(QUIET, should_stop=iter([False, True]).__next__)
    step, completed, _ = loop.train(job(tmp_path, 1), stopping)
    assert (step, completed) == (2, False)
    assert lines(tmp_path / "1")[-1]["step"] == 2
    assert loop.train(job(tmp_path, 1), QUIET, resume_step=step) == (8, True, False)
    assert lines(tmp_path / "0") == lines(tmp_path / "1")
    weights = [(tmp_path / name / f"{name}_step8.bin").read_bytes() for name in ("0", "1")]
    assert weights[0] == weights[1]


def test_loss_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Neither by the checkpoint after it nor by the stop that comes with it."""
    wild = {"learning_rate": 1e38, "clip": 1e38, "min_lr": 0.0, "eval_every": 0, "warmup_steps": 0}
    for steps_in_flight in (0, 1):
        with pytest.raises(FloatingPointError, match="is nan at step 2: training stopped, nothing was saved"):
            loop.train(job(tmp_path, steps_in_flight, ckpt_every=3, **wild), QUIET)
    assert lines(tmp_path / "0") == lines(tmp_path / "1")
    stopping = dataclasses.replace(QUIET, should_stop=iter([False, True]).__next__)
    with pytest.raises(FloatingPointError, match="at step 2"):
        loop.train(job(tmp_path, 1, ckpt_every=3, **wild), stopping)
    for run in (tmp_path / "0", tmp_path / "1"):
        assert [line["step"] for line in lines(run)] == [1]
        assert not list(run.glob("*_step*")) + list((run / "train_state").glob("[0-9]*"))


@pytest.mark.slow
def test_patience_stops_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    rising = {"learning_rate": 3.0, "warmup_steps": 1, "eval_every": 1, "ckpt_every": 0, "steps": 30}
    result = loop.train(job(tmp_path, 0, **rising, patience=2), QUIET)
    losses = {int(line["step"]): line["validation_loss"] for line in lines(tmp_path / "0") if "validation_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert result == (best + 2, True, True)
    assert max(losses) == best + 2
    config = json.loads((tmp_path / "0/latest_config.json").read_text())
    assert (config["checkpoint"]["step"], config["training"]["patience"]) == (best + 2, 2)
    assert loop.train(job(tmp_path, 0, **rising, patience=2), QUIET, resume_step=best + 2) == result, "nothing is left"
    logged: list[str] = []
    other = dataclasses.replace(job(tmp_path, 0, **rising, patience=4), weights_dtype="bfloat16")
    more = loop.train(other, dataclasses.replace(QUIET, log=logged.append), resume_step=best + 2)
    assert more.step > best + 2
    assert logged[0] == f"weights_dtype is bfloat16: the weights of step {best + 2} are on disk in float32"
    assert [line for line in logged if "weights_dtype" in line] == logged[:1]
