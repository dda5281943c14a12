"""A run's directory: file names, links, and the checkpoint that a name and a step refer to."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from hipgpt_jax import config, files, json_files, version
from hipgpt_jax.runs import initial

CHECKPOINTS = Path("checkpoints")
SHIPPED = Path(__file__).parent / "shipped"
LATEST_CONFIG = "latest_config.json"
LATEST_CHECKPOINT = "latest_checkpoint.bin"
BEST_CONFIG = "best_config.json"
BEST_CHECKPOINT = "best_checkpoint.bin"
SETTINGS_NAME = "settings.json"
METRICS_NAME = "metrics.jsonl"
TRAIN_STATE_NAME = "train_state"

_MAX_NAME_BYTES = 255  # limit of a file name on every common file system
_MAX_PID = 1 << 22  # largest process id of Linux; temporary names contain it

# Path separators; control characters, line separators and bidirectional overrides, which could forge lines of a
# terminal; lone surrogates, which are not Unicode.
_NOT_IN_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\.\.")

# The name in it may differ from the directory's, because renaming a directory does not rename the files in it.
_STEP_CONFIG = re.compile(r"(?!\.)(.+)_step([0-9]+)_config\.json", re.DOTALL)
_MODEL_FIELDS = tuple(field.name for field in dataclasses.fields(config.ModelConfig))


def _section(**properties: str) -> dict[str, Any]:
    types = {name: {"type": kind} for name, kind in properties.items()}
    return {"type": "object", "properties": types, "required": list(properties)}


_SCHEMA = json_files.Schema(
    "config",
    {
        "type": "object",
        "required": ["model", "tokenizer", "checkpoint"],
        "properties": {
            "model": _section(**dict.fromkeys(_MODEL_FIELDS, "integer")),
            "tokenizer": _section(path="string", sha256="string"),
            "checkpoint": _section(latest="string", step="integer", sha256="string"),
            "data": {"type": "object", "properties": {"eos_id": {"type": ["integer", "null"]}}},
            "init_from": initial.SCHEMA,
        },
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Config file of one step of a run.

    Attributes:
        run: Name of the run.
        step: Number of optimizer steps.
        directory: Directory of the run.
        model: Shape of the model.
        weights: Path of the ``.bin`` file.
        weights_sha256: Expected digest of the weights.
        tokenizer: Path of ``tokenizer.json``.
        tokenizer_sha256: Expected digest of the tokenizer.
        config_sha256: Actual digest of the config file.
        eos_id: Token that followed each document in training; -1 for none.
        init_from: Checkpoint that training started from; None if it started from random weights.
    """

    run: str
    step: int
    directory: Path
    model: config.ModelConfig
    weights: Path
    weights_sha256: str
    tokenizer: Path
    tokenizer_sha256: str
    config_sha256: str
    eos_id: int = -1
    init_from: initial.Initial | None = None

    def verify(self) -> None:
        """Raises ValueError or FileNotFoundError if a file is not the one that the config names."""
        for path, expected in ((self.tokenizer, self.tokenizer_sha256), (self.weights, self.weights_sha256)):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though the config of step {self.step} names it")
            if (digest := files.sha256(path)) != expected:
                raise ValueError(
                    f"{path} is not the file that the config of step {self.step} names: it was cut, changed or "
                    f"swapped (sha256 {digest[:12]}…, expected {expected[:12]}…). Restore it, or take another --step"
                )


def check_name(run: str) -> str:
    """Returns ``run`` if it is a valid run name, else raises ValueError."""
    if not _is_name(run):
        raise ValueError(
            f"run name must be a plain name in Unicode, without '/', '..', control characters or a leading '.': "
            f"got {files.shortened(repr(run))}"
        )
    if (size := len(os.fsencode(run))) > _MAX_NAME_BYTES:
        raise ValueError(f"run name of {size} bytes is too long: a file name may have {_MAX_NAME_BYTES}")
    return run


def is_path(run: str) -> bool:
    """Returns whether a run is given by the path of its directory instead of its name."""
    return "/" in run or run in (".", "..")


def parse_run(run: str) -> tuple[str, Path | None]:
    """Returns the name of a run, and its directory if it is given by its path.

    Raises:
        FileNotFoundError: The directory does not exist or has no checkpoint.
        ValueError: Its name is not a valid run name.
    """
    if not is_path(run):
        return run, None
    directory = Path(run)
    if not directory.is_dir():
        raise FileNotFoundError(f"directory of a run not found: {run}")
    if not (directory / LATEST_CONFIG).is_file():
        raise FileNotFoundError(f"{run} has no complete checkpoint: it has no {LATEST_CONFIG}")
    return check_name(directory.resolve().name), directory


def new(run: str, steps: int) -> Path:
    """Returns the directory of a new run, given by its name or its path; see ``check_new_name``."""
    directory = Path(run) if is_path(run) else CHECKPOINTS / run
    check_new_name(directory.name if is_path(run) else run, steps)
    return directory


def check_new_name(run: str, steps: int) -> str:
    """Returns ``run`` if it is a valid run name and not too long for the run's files, else raises ValueError.

    Args:
        run: Name of the run.
        steps: Last step of the run, the longest number in its file names.
    """
    check_name(run)
    # Names on disk are in the locale's encoding, which may be ASCII.
    longest = len(os.fsencode(f".{config_name(run, steps)}.{_MAX_PID}.tmp"))
    if longest > _MAX_NAME_BYTES:
        size = len(os.fsencode(run))
        raise ValueError(
            f"run name of {size} bytes is too long: its longest file name would have {longest} bytes, of "
            f"{_MAX_NAME_BYTES}. Use at most {size - longest + _MAX_NAME_BYTES} bytes"
        )
    return run


def _is_name(run: str) -> bool:
    return bool(run) and not run.startswith(".") and not _NOT_IN_NAME.search(run)


def names() -> list[str]:
    """Returns the names of all runs that ``find`` finds."""
    local = {path.name for path in CHECKPOINTS.glob("*")}
    own, shipped = (
        {path.parent.name for path in root.glob(f"*/{LATEST_CONFIG}") if path.is_file()}
        for root in (CHECKPOINTS, SHIPPED)
    )
    return sorted(filter(_is_name, own | (shipped - local)))


def find(run: str) -> Path:
    """Returns the directory of a run: ``checkpoints/[run]`` if it exists, else the one inside the package.

    Raises:
        ValueError: The name is not a valid run name.
        FileNotFoundError: The run does not exist or has no checkpoint. The message lists the runs that exist.
    """
    check_name(run)
    if (CHECKPOINTS / run / LATEST_CONFIG).is_file():
        return CHECKPOINTS / run
    old = beside(CHECKPOINTS / run, "old")
    hint = f". The run that --reset set aside is in {old}: the next hipgpt-train of that name restores it"
    hint = hint if old.exists() else ""
    if (CHECKPOINTS / run).exists():
        raise FileNotFoundError(
            f"run {run!r} in {CHECKPOINTS}/ has no whole checkpoint yet: it has no {LATEST_CONFIG}{hint}"
        )
    if (SHIPPED / run / LATEST_CONFIG).is_file():
        return SHIPPED / run
    raise FileNotFoundError(f"run {run!r} not found in {CHECKPOINTS}/ or the package. Runs: {', '.join(names())}{hint}")


def beside(directory: Path, suffix: str) -> Path:
    """Returns the hidden path ``.NAME.suffix`` beside a run's directory, with links resolved."""
    real = Path(os.path.realpath(directory))  # unlike resolve(), raises no error if links form a circle
    return real.with_name(f".{real.name}.{suffix}")


def configs(directory: Path) -> dict[int, list[Path]]:
    """Returns the config files of each step, by ascending step, the valid one first.

    A step has several if the directory was renamed and the step was then trained again. The valid one is that named
    after the directory, else the newest.
    """
    found: dict[int, list[Path]] = {}
    for path in directory.iterdir():
        if match := _STEP_CONFIG.fullmatch(path.name):
            found.setdefault(int(match[2]), []).append(path)
    for step, paths in found.items():
        name = config_name(directory.name, step)
        paths.sort(key=lambda path: (path.name == name, path.lstat().st_mtime_ns, path.name), reverse=True)
    return dict(sorted(found.items()))


def steps(directory: Path) -> list[int]:
    """Returns the steps that have a config file, in ascending order."""
    return list(configs(directory))


def config_path(directory: Path, step: int) -> Path:
    """Returns the config file of a step, or the path that it would have if it does not exist."""
    return configs(directory).get(step, [directory / config_name(directory.name, step)])[0]


def weights_beside(config: Path) -> Path:
    """Returns the weights that belong to a step's config file."""
    return config.with_name(config.name.removesuffix("_config.json") + ".bin")


def has_checkpoint(directory: Path) -> bool:
    """Returns whether a run has a checkpoint or a training state to resume from."""
    if not directory.is_dir():
        return False
    states = directory / TRAIN_STATE_NAME
    has_state = states.is_dir() and any(path.name.isdecimal() for path in states.iterdir())
    return has_state or (directory / LATEST_CONFIG).is_file() or bool(steps(directory))


def can_resume(directory: Path) -> bool:
    """Returns whether a run was started, even if it has no checkpoint yet."""
    return has_checkpoint(directory) or (directory / SETTINGS_NAME).is_file()


def weights_name(run: str, step: int) -> str:
    """Returns the file name of a step's weights."""
    return f"{run}_step{step}.bin"


def config_name(run: str, step: int) -> str:
    """Returns the file name of a step's config."""
    return f"{run}_step{step}_config.json"


def parse_step(text: str | None) -> int | str | None:
    """Parses the flag ``--step``: a number, ``best``, or None for ``latest``; raises ValueError for anything else."""
    if text is None or text == "best":
        return text
    if text == "latest":
        return None
    if not text.isdecimal():
        raise ValueError(f"step must be a number, best or latest: got {text!r}")
    return int(text)


def read_checkpoint(run: str, step: int | str | None = None, directory: Path | None = None) -> Checkpoint:
    """Reads the config of a step of a run.

    Args:
        run: Name of the run.
        step: The step; None for the latest, ``best`` for the one with the lowest validation loss.
        directory: Directory of the run; None finds it by name.

    Raises:
        FileNotFoundError: The run or the step does not exist. The message lists those that exist.
        ValueError: The config is invalid.
    """
    directory = find(run) if directory is None else directory
    if not directory.is_dir():
        raise FileNotFoundError(f"directory of run {run!r} not found: {directory}")
    if step is None or step == "best":
        path = directory / (LATEST_CONFIG if step is None else BEST_CONFIG)
    else:
        path = config_path(directory, int(step))
    if not path.is_file():
        have = ", ".join(map(str, steps(directory))) or "none"
        raise FileNotFoundError(f"run {run!r} has no step {step}. Steps: {have}")
    found = _parse(run, directory, path)
    if step not in (None, "best", found.step):
        raise ValueError(f"{path} must be the config of step {step}: it says step {found.step}")
    return found


def _parse(run: str, directory: Path, path: Path) -> Checkpoint:
    value = _SCHEMA.read(path)
    require_known(path, value)
    try:
        model = config.ModelConfig(**value["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    eos_id = value.get("data", {}).get("eos_id")
    return Checkpoint(
        run=run,
        step=value["checkpoint"]["step"],
        directory=directory,
        model=model,
        weights=file_beside(path, value["checkpoint"]["latest"]),
        weights_sha256=value["checkpoint"]["sha256"],
        tokenizer=file_beside(path, value["tokenizer"]["path"]),
        tokenizer_sha256=value["tokenizer"]["sha256"],
        config_sha256=files.sha256(path),
        eos_id=-1 if eos_id is None else eos_id,
        init_from=initial.parse(value),
    )


def require_known(path: Path, value: dict[str, Any]) -> None:
    """Raises ValueError if a config has a field of the model that this version does not know."""
    if unknown := sorted(set(value["model"]) - set(_MODEL_FIELDS)):
        key = files.shortened(f"model.{unknown[0]}")
        raise ValueError(
            f"{path}: this version, {version.__version__}, does not know {key}: the run was made by another, "
            f"{files.shortened(json.dumps(value.get('version')))}; use that one"
        )


def file_beside(path: Path, name: str) -> Path:
    """Returns the path of a file that another file names; raises ValueError if it is not in the same directory."""
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{path} must name files in its own directory: got {files.shortened(repr(name))}")
    return path.parent / name
