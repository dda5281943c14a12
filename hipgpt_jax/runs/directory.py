"""A run's directory: its names, its links, and which checkpoint a request means."""

import dataclasses
import json
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
        raise ValueError(f"run name must be a plain name, without '/' or '..' or a leading '.': got {run!r}")
    return run


def _is_name(run: str) -> bool:
    return bool(run) and not run.startswith(".") and not re.search(r"[/\\\x00-\x1f]|\.\.", run)


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
    if (CHECKPOINTS / run).exists():
        raise FileNotFoundError(f"run {run!r} in {CHECKPOINTS}/ has no whole checkpoint yet: it has no {LATEST_CONFIG}")
    if (SHIPPED / run / LATEST_CONFIG).is_file():
        return SHIPPED / run
    raise FileNotFoundError(f"run {run!r} not found in {CHECKPOINTS}/ or the package. Runs: {', '.join(names())}")


def steps(directory: Path, run: str | None = None) -> list[int]:
    """Returns the steps that have a config file, ascending; the run has its directory's name unless one is given."""
    pattern = re.compile(re.escape(run or directory.name) + r"_step(\d+)_config\.json")
    return sorted(int(match[1]) for path in directory.iterdir() if (match := pattern.fullmatch(path.name)))


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
        path = directory / config_name(run, int(step))
    if not path.is_file():
        have = ", ".join(map(str, steps(directory, run))) or "none"
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
        raise ValueError(
            f"{path}: this version, {version.__version__}, does not know model.{unknown[0]}: the run was made by "
            f"another, {json.dumps(value.get('version'))}; use that one"
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
        raise ValueError(f"{path} must hold {section}.{key} of type {kind.__name__}: got {found!r}")
    return found


def _plain(path: Path, name: str) -> str:
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{path} must name files in its own directory: got {name!r}")
    return name
