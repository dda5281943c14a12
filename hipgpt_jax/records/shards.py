"""Parts of a grid of prompts and samples: the share of one of several processes, and lists of single cells."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from hipgpt_jax import config, json_files

# Variables with the index and the number of a job's processes; those that JAX reads too.
_LAUNCHERS = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
_KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"

_CELLS = json_files.Schema(
    "range of samples",
    {
        "type": "object",
        "properties": {
            "id": {"type": "string", "minLength": 1},
            "first_sample": {"type": "integer", "minimum": 0, "maximum": config.MAX_SAMPLES - 1},
            "num_samples": {"type": "integer", "minimum": 1, "maximum": config.MAX_SAMPLES},
        },
        "required": ["id", "first_sample", "num_samples"],
        "additionalProperties": False,
    },
)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The share of one of several processes in the samples of all prompts.

    Sample ``i`` of a prompt belongs to shard ``(h + i) mod count``, where ``h`` is the number in the first 8 bytes of
    the SHA-256 of the prompt's id, big-endian. So the samples of one prompt are divided evenly, and the first samples
    of many prompts are spread over all shards.

    Attributes:
        index: Index of the shard, from 0.
        count: Number of shards.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard must be I/N with I from 0 to N-1: got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str] = os.environ) -> "Shard":
        """Returns the shard that a text such as ``3/8`` names, or ``auto``, which reads the environment.

        Raises:
            ValueError: The text names no shard, or the environment is that of no job, or of an array job.
        """
        if text == "auto":
            return cls(*_position(environ))
        if not (match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)):
            raise ValueError(f"shard must be I/N, such as 0/8, or auto: got {config.shortened(text)}")
        return cls(int(match[1]), int(match[2]))

    def part(self, prompt_id: str, samples: range) -> range:
        """Returns those of consecutive samples of a prompt that belong to the shard."""
        if self.count == 1:
            return samples
        digest = hashlib.sha256(prompt_id.encode()).digest()
        offset = self.index - int.from_bytes(digest[:8]) - samples.start
        return samples[offset % self.count :: self.count]

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def _position(environ: Mapping[str, str]) -> tuple[int, int]:
    """Returns the index of this process in its job, and the number of the job's processes."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        # The variables of an array describe the tasks that were submitted together. After a failure those are fewer,
        # and the same task would get another share.
        raise ValueError(
            "shard auto does not know how many tasks an array job had at first: give --shard $SLURM_ARRAY_TASK_ID/N"
        )
    for index, count in _LAUNCHERS:
        if index in environ and count in environ:
            return int(environ[index]), int(environ[count])
    if _KUBERNETES_INDEX in environ:
        raise ValueError(
            f"shard auto finds no number of processes in a Kubernetes job's environment: give --shard "
            f"${_KUBERNETES_INDEX}/N, with the job's completions for N"
        )
    raise ValueError("shard auto needs a job of Slurm or Open MPI: give --shard I/N, such as 0/8")


class Cells:
    """Single samples of prompts, read from JSON lines with ``id``, ``first_sample`` and ``num_samples``.

    ``hipgpt-records merge`` lists missing samples in this form.

    Attributes:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: A line is not a range of samples, or there is none.
        """
        if not path.is_file():
            raise FileNotFoundError(f"list of samples not found: {path}")
        self.path = path
        self._ranges: dict[str, list[range]] = {}
        for line in json_files.read_lines(path):
            value = _CELLS.parse(line.text, f"{path} line {line.number}")
            samples = range(value["first_sample"], value["first_sample"] + value["num_samples"])
            self._ranges.setdefault(value["id"], []).append(samples)
        if not self._ranges:
            raise ValueError(f"{path} lists no samples: there is nothing to generate")
        self._ranges = {name: _merged(ranges) for name, ranges in self._ranges.items()}

    def part(self, prompt_id: str, samples: range) -> list[range]:
        """Returns those of consecutive samples of a prompt that are listed."""
        listed = self._ranges.get(prompt_id, ())
        both = (range(max(one.start, samples.start), min(one.stop, samples.stop)) for one in listed)
        return [one for one in both if one]

    def check_all_in(self, wanted: Mapping[str, range]) -> None:
        """Raises ValueError if a sample is listed that is not among those of its prompt."""
        for name, listed in self._ranges.items():
            samples = wanted.get(name, range(0))
            for one in listed:
                if one.start < samples.start or one.stop > samples.stop:
                    sample = one.start if one.start not in samples else samples.stop
                    raise ValueError(
                        f"{self.path} lists sample {sample} of {config.shortened(name)}, which this command does not "
                        f"have: repeat the prompts and the numbers of samples of the first command"
                    )

    def __contains__(self, prompt_id: str) -> bool:
        """Returns whether samples of a prompt are listed."""
        return prompt_id in self._ranges


def _merged(ranges: list[range]) -> list[range]:
    """Returns ranges in order, with those that touch or overlap merged."""
    merged: list[range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        if merged and one.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, one.stop))
        else:
            merged.append(one)
    return merged
