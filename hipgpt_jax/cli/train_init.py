"""``--init-from``: what a run takes over from the run that it starts from."""

import dataclasses
from pathlib import Path

from hipgpt_jax import config, files
from hipgpt_jax.cli import flags, program, train_flags
from hipgpt_jax.runs import directory, initial, loading, settings
from hipgpt_jax.text import manifest, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What a run takes over from the run that it starts from.

    Attributes:
        model: Shape of the model, for the flags that are absent.
        init_from: Checkpoint whose weights the run starts from.
        tokenizer: Path of the tokenizer.
        end_id: End token of documents; None if the other run has none.
    """

    model: config.ModelConfig
    init_from: initial.Initial
    tokenizer: Path
    end_id: int | None


def find_base() -> Base | None:
    """Returns what ``--init-from``, or the settings of a resumed run, refer to; None for random initial weights.

    Raises:
        FileNotFoundError: The other run, its step or a file does not exist.
        ValueError: One of them is invalid, or another flag contradicts it.
    """
    given = train_flags.INIT_FROM.value
    if train_flags.RESUME.value:
        return _resume(directory.new(program.required(train_flags.RUN_NAME), train_flags.FLAGS.steps), given)
    return None if given is None else _open(given)


def _parse(given: str) -> tuple[str, int | str | None, Path | None]:
    """Returns the name, the step and, if it is given by its path, the directory of a run."""
    run, colon, step = given.rpartition(":")
    name, path = directory.parse_run(run if colon else given)
    try:
        return name, directory.parse_step(step) if colon else None, path
    except ValueError as error:
        raise ValueError(f"--init-from {given} must be RUN or RUN:STEP: {error}") from error


def _open(given: str) -> Base:
    run, step, path = _parse(given)
    source = loading.open_run(run, step, config.DecodingConfig(), path)
    found = source.checkpoint
    _check_sizes(found)
    _check_tokenizer(source.vocabulary, f"that of --init-from {given} (sha256 {found.tokenizer_sha256[:12]}…)")
    # A special token only: data that spells any other end token could not be told from its end.
    special = source.vocabulary.special_tokens.values()
    return Base(
        model=found.model,
        init_from=initial.Initial(run=run, step=found.step, sha256=found.weights_sha256, directory=path),
        tokenizer=found.tokenizer,
        end_id=found.eos_id if found.eos_id in special else None,
    )


def _resume(run_directory: Path, given: str | None) -> Base | None:
    if not (run_directory / directory.SETTINGS_NAME).is_file():
        return None  # nothing to resume, which is reported later
    saved = settings.read(run_directory)
    init_from = initial.parse(saved)
    if given is not None:
        run, step, path = _parse(given)
        own = f"the run starts from {init_from}" if init_from else "the run starts from random weights"
        if init_from is None or run != init_from.run or (isinstance(step, int) and step != init_from.step):
            raise ValueError(f"--init-from {given} contradicts --resume: {own}. Leave it out, or use --reset")
        init_from = dataclasses.replace(init_from, directory=path)
    if init_from is None:
        return None
    path = run_directory / manifest.TOKENIZER_NAME
    if train_flags.TOKENIZER_PATH.value is not None:
        _check_tokenizer(tokenizer.Tokenizer.load(path), f"the run's own (sha256 {files.sha256(path)[:12]}…)")
    try:
        model = config.ModelConfig(**saved["model"])
    except ValueError as error:
        raise ValueError(f"{run_directory / directory.SETTINGS_NAME}: {error}") from error
    return Base(model=model, init_from=init_from, tokenizer=path, end_id=None)


def _check_sizes(found: directory.Checkpoint) -> None:
    """Raises ValueError if a flag gives the model another size; only its context may be shorter."""
    for field, value in flags.given(config.ModelConfig, train_flags.FLAGS).items():
        own = getattr(found.model, field)
        if field == "max_seq_len" and value > own:
            raise ValueError(f"{field} must be at most {own}, the context of --init-from {found.run}: got {value}")
        if field != "max_seq_len" and value != own:
            raise ValueError(f"{field} {value} contradicts --init-from {found.run}, which has {own}: leave it out")


def _check_tokenizer(own: tokenizer.Tokenizer, description: str) -> None:
    """Raises ValueError if ``--tokenizer-path`` is another tokenizer; the same one may be written differently."""
    if (given := train_flags.TOKENIZER_PATH.value) is None:
        return
    if tokenizer.Tokenizer.load(Path(given)).to_json() != own.to_json():
        digest = files.sha256(Path(given))[:12]
        raise ValueError(
            f"--tokenizer-path {given} (sha256 {digest}…) is not {description}, which is used: leave it out"
        )
