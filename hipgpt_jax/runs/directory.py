"""A run's directory: file names, links, and the checkpoint that a name and a step refer to."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from hipgpt_jax import config, files, version

CHECKPOINTS = Path("checkpoints")
SHIPPED = Path(__file__).parent / "shipped"
LATEST_CONFIG = "latest_config.json"
LATEST_CHECKPOINT = "latest_checkpoint.bin"
BEST_CONFIG = "best_config.json"
BEST_CHECKPOINT = "best_checkpoint.bin"
SETTINGS_NAME = "settings.json"
METRICS_NAME = "metrics.jsonl"
TRAIN_STATE_NAME = "train_state"

_MAX_NAME_BYTES = 255  # of a file name, on every common file system
_MAX_PID = 1 << 22  # Linux's largest process number, which a temporary name contains

# Path separators; control characters, Unicode's line separators and bidirectional overrides, which would forge lines
# of a terminal; lone surrogates, which are no Unicode.
_NOT_IN_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\.\.")

# The run's name in a file name is not compared with the directory's: renaming a directory renames no file in it.
_STEP_CONFIG = re.compile(r"(?!\.)(.+)_step([0-9]+)_config\.json", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One step of a run, as its config file describes it.

    Attributes:
        run: Name of the run.
        step: Optimizer steps taken.
        directory: The run's directory.
        model: Shape of the model.
        weights: The ``.bin`` file.
        weights_sha256: Digest that the config gives for it.
        tokenizer: The ``tokenizer.json`` file.
        tokenizer_sha256: Digest that the config gives for it.
        config_sha256: Digest of the config file itself.
        eos_id: The token that the run was taught to see after a document; -1 where it knows none.
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

    def verify(self) -> None:
        """Raises ValueError or FileNotFoundError where a file is not the one that the config names."""
        for path, expected in ((self.tokenizer, self.tokenizer_sha256), (self.weights, self.weights_sha256)):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though the config of step {self.step} names it")
            if (digest := files.sha256(path)) != expected:
                raise ValueError(
                    f"{path} is not the file that the config of step {self.step} names: it was cut, changed or "
                    f"swapped (sha256 {digest[:12]}…, expected {expected[:12]}…). Restore it, or take another --step"
                )


def check_name(run: str) -> str:
    """Returns ``run`` if it can name a directory, else raises ValueError."""
    if not _is_name(run):
        raise ValueError(
            f"run name must be a plain name in Unicode, without '/', '..', control characters or a leading '.': "
            f"got {files.shortened(repr(run))}"
        )
    if (size := len(os.fsencode(run))) > _MAX_NAME_BYTES:
        raise ValueError(f"run name of {size} bytes is too long: a file name may have {_MAX_NAME_BYTES}")
    return run


def check_new_name(run: str, steps: int) -> str:
    """Returns ``run`` if a run of that name can write all of its files, else raises ValueError.

    Args:
        run: Name of the run.
        steps: Its last step, the longest number in a file name.
    """
    check_name(run)
    # The name on disk is encoded as the locale says, which may be ASCII.
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
    """Returns the runs that ``find`` knows: those in ``checkpoints/`` and those in the package."""
    begun = {path.name for path in CHECKPOINTS.glob("*")}
    own, shipped = (
        {path.parent.name for path in root.glob(f"*/{LATEST_CONFIG}") if path.is_file()}
        for root in (CHECKPOINTS, SHIPPED)
    )
    return sorted(filter(_is_name, own | (shipped - begun)))


def find(run: str) -> Path:
    """Returns the directory of a run: ``checkpoints/[run]``, or where that is absent the one inside the package.

    Raises:
        ValueError: The name could leave ``checkpoints/``.
        FileNotFoundError: There is no such run, and the message lists those there are; or it has no checkpoint.
    """
    check_name(run)
    if (CHECKPOINTS / run / LATEST_CONFIG).is_file():
        return CHECKPOINTS / run
    aside = beside(CHECKPOINTS / run, "old")
    hint = f". The run that --reset set aside is in {aside}: the next hipgpt-train of that name restores it"
    hint = hint if aside.exists() else ""
    if (CHECKPOINTS / run).exists():
        raise FileNotFoundError(
            f"run {run!r} in {CHECKPOINTS}/ has no whole checkpoint yet: it has no {LATEST_CONFIG}{hint}"
        )
    if (SHIPPED / run / LATEST_CONFIG).is_file():
        return SHIPPED / run
    raise FileNotFoundError(f"run {run!r} not found in {CHECKPOINTS}/ or the package. Runs: {', '.join(names())}{hint}")


def beside(directory: Path, suffix: str) -> Path:
    """Returns the hidden path ``.NAME.suffix`` beside a run's directory, links followed: the same for every link."""
    real = Path(os.path.realpath(directory))  # unlike resolve(), no error where links form a circle
    return real.with_name(f".{real.name}.{suffix}")


def configs(directory: Path) -> dict[int, list[Path]]:
    """Returns the config files of each step, by ascending step.

    A step usually has one. It has several where the directory was renamed and the step was then taken again; the
    first is the one that counts: the one named after the directory, else the newest.
    """
    found: dict[int, list[Path]] = {}
    for path in directory.iterdir():
        if match := _STEP_CONFIG.fullmatch(path.name):
            found.setdefault(int(match[2]), []).append(path)
    for at, paths in found.items():
        own = config_name(directory.name, at)
        paths.sort(key=lambda path: (path.name == own, path.lstat().st_mtime_ns, path.name), reverse=True)
    return dict(sorted(found.items()))


def steps(directory: Path) -> list[int]:
    """Returns the steps that have a config file, ascending, whatever the run was called when they were written."""
    return list(configs(directory))


def config_path(directory: Path, step: int) -> Path:
    """Returns the config file of a step; where there is none, the path that it would be written to."""
    return configs(directory).get(step, [directory / config_name(directory.name, step)])[0]


def weights_beside(config: Path) -> Path:
    """Returns the weights that were written with a step's config file."""
    return config.with_name(config.name.removesuffix("_config.json") + ".bin")


def is_begun(directory: Path) -> bool:
    """Returns whether a run has a checkpoint, or a training state that it could go on from."""
    if not directory.is_dir():
        return False
    states = directory / TRAIN_STATE_NAME
    has_state = states.is_dir() and any(path.name.isdecimal() for path in states.iterdir())
    return has_state or (directory / LATEST_CONFIG).is_file() or bool(steps(directory))


def weights_name(run: str, step: int) -> str:
    """Returns the name of a step's weights."""
    return f"{run}_step{step}.bin"


def config_name(run: str, step: int) -> str:
    """Returns the name of a step's config."""
    return f"{run}_step{step}_config.json"


def parse_step(text: str | None) -> int | str | None:
    """Returns the step that a flag means: a number, ``best``, or None for the latest.

    Raises:
        ValueError: It is neither.
    """
    if text is None or text == "best":
        return text
    if text == "latest":
        return None
    if not text.isdecimal():
        raise ValueError(f"step must be a number, best or latest: got {text!r}")
    return int(text)


def read_checkpoint(run: str, step: int | str | None = None, directory: Path | None = None) -> Checkpoint:
    """Reads the config of a step of a run; the latest by default.

    Args:
        run: Name of the run.
        step: The step; None takes the latest, ``best`` the one of the lowest validation loss.
        directory: The run's directory, wherever it was moved to; None finds it by the run's name.

    Raises:
        FileNotFoundError: There is no such run or step; the message lists those there are.
        ValueError: The config lacks a key or holds something else than it should.
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
    value = files.read_json(path)
    return Checkpoint(
        run=run,
        step=_get(path, value, "checkpoint", "step", int),
        directory=directory,
        model=_parse_model(path, value),
        weights=directory / _plain(path, _get(path, value, "checkpoint", "latest", str)),
        weights_sha256=_get(path, value, "checkpoint", "sha256", str),
        tokenizer=directory / _plain(path, _get(path, value, "tokenizer", "path", str)),
        tokenizer_sha256=_get(path, value, "tokenizer", "sha256", str),
        config_sha256=files.sha256(path),
        eos_id=_parse_eos_id(value),
    )


def _parse_model(path: Path, value: dict[str, Any]) -> config.ModelConfig:
    keys = [field.name for field in dataclasses.fields(config.ModelConfig)]
    sizes = {key: _get(path, value, "model", key, int) for key in keys}
    require_known(path, value)
    try:
        return config.ModelConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def require_known(path: Path, value: dict[str, Any]) -> None:
    """Raises ValueError where the model of a config has a part that this version knows nothing of."""
    known = {field.name for field in dataclasses.fields(config.ModelConfig)}
    if unknown := sorted(set(value["model"]) - known):
        key = files.shortened(f"model.{unknown[0]}")
        raise ValueError(
            f"{path}: this version, {version.__version__}, does not know {key}: the run was made by another, "
            f"{files.shortened(json.dumps(value.get('version')))}; use that one"
        )


def _parse_eos_id(value: dict[str, Any]) -> int:
    """The end token of a run's documents; configs of older versions know of none."""
    data = value.get("data")
    eos_id = data.get("eos_id") if isinstance(data, dict) else None
    return eos_id if isinstance(eos_id, int) and not isinstance(eos_id, bool) else -1


_T = TypeVar("_T")


def _get(path: Path, value: dict[str, Any], section: str, key: str, kind: type[_T]) -> _T:
    part = value.get(section)
    found = part.get(key) if isinstance(part, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(
            f"{path} must hold {section}.{key} of type {kind.__name__}: got {files.shortened(repr(found))}"
        )
    return found


def _plain(path: Path, name: str) -> str:
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{path} must name files in its own directory: got {files.shortened(repr(name))}")
    return name
