"""Event files, read back record by record as TensorBoard reads them."""

import builtins
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hipgpt_jax.training import tensorboard

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
record_writer = pytest.importorskip("tensorboardX.record_writer")


def events(path: Path) -> Iterator[Any]:
    """Yields the events of a file: length, checksum of the length, event, checksum of the event."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,), (length_sum,) = struct.unpack_from("<Q", data, at), struct.unpack_from("<I", data, at + 8)
        body = data[at + 12 : at + 12 + length]
        (body_sum,) = struct.unpack_from("<I", data, at + 12 + length)
        assert length_sum == record_writer.masked_crc32c(data[at : at + 8])
        assert body_sum == record_writer.masked_crc32c(body)
        yield event_pb2.Event.FromString(body)
        at += 16 + length


def shown(directory: Path) -> dict[str, list[tuple[int, Any]]]:
    """Returns what TensorBoard 2.21 shows of a directory, by its rule in ``plugin_event_accumulator.py``.

    It reads the files in the order of their names. A mark of a start, but for the first, drops all events at
    its step and later.
    """
    tags: dict[str, list[tuple[int, Any]]] = {}
    starts = 0
    for path in sorted(directory.iterdir()):
        for event in events(path):
            if event.session_log.status == event_pb2.SessionLog.START:
                starts += 1
                if starts > 1:
                    tags = {tag: [pair for pair in pairs if pair[0] < event.step] for tag, pairs in tags.items()}
            for value in event.summary.value:
                number = value.simple_value if value.HasField("simple_value") else value.tensor.string_val[0].decode()
                tags.setdefault(value.tag, []).append((event.step, number))
    return {tag: pairs for tag, pairs in tags.items() if pairs}


def test_lines_are_scalars_and_samples_are_text(tmp_path: Path) -> None:
    file = tensorboard.EventFile(tmp_path / "tensorboard")
    file.append({"step": 10, "loss": 2.5, "learning_rate": 0.125})
    file.append({"step": 10, "validation_loss": 3.0, "validation_nats_per_byte": 1.5})
    file.text(10, "# ROMEO:\n*O*, speak")
    file.append({"step": 20, "loss": 2.25})
    file.close()
    assert shown(tmp_path / "tensorboard") == {
        "train/loss": [(10, 2.5), (20, 2.25)],
        "train/learning_rate": [(10, 0.125)],
        "validation/loss": [(10, 3.0)],
        "validation/nats_per_byte": [(10, 1.5)],
        "sample/text_summary": [(10, "    # ROMEO:\n    *O*, speak")],
    }
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert next(events(path)).file_version == "brain.Event:2"


def test_every_event_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    """Nothing is lost when the process is killed then."""
    file = tensorboard.EventFile(tmp_path)
    file.append({"step": 1, "loss": 4.0})
    assert shown(tmp_path) == {"train/loss": [(1, 4.0)]}
    file.text(1, "a")
    assert "sample/text_summary" in shown(tmp_path)
    file.close()


def test_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    """The first run was killed after step 50, the state is of step 20; a second resume, from 40, within the second."""
    first = tensorboard.EventFile(tmp_path)
    for step in (10, 20, 30, 40, 50):
        first.append({"step": step, "loss": 1.0})
        first.text(step, "old")
    first.close()
    second = tensorboard.EventFile(tmp_path, resume_step=20)
    for step in (30, 40, 50):
        second.append({"step": step, "loss": 2.0})
    second.close()
    third = tensorboard.EventFile(tmp_path, resume_step=40)
    third.append({"step": 50, "loss": 3.0})
    third.close()
    assert len(list(tmp_path.iterdir())) == 3
    assert shown(tmp_path) == {
        "train/loss": [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 3.0)],
        "sample/text_summary": [(10, "    old"), (20, "    old")],
    }


def test_number_beyond_float32_is_clipped(tmp_path: Path) -> None:
    file = tensorboard.EventFile(tmp_path)
    file.append({"step": 1, "gradient_norm": 1.7e308})
    file.close()
    ((_, number),) = shown(tmp_path)["train/gradient_norm"]
    assert number == pytest.approx(3.4e38)


def test_missing_tensorboardx_is_an_error_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        if name.startswith("tensorboardX"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    message = r"--tensorboard needs tensorboardX \(No module named .*\): pip install -e '\.\[tensorboard\]'"
    with pytest.raises(ValueError, match=message):
        tensorboard.require()
    with pytest.raises(ValueError, match=message):
        tensorboard.EventFile(tmp_path)
