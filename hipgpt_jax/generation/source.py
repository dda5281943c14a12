"""What is generated from: a run found whole on disk, and what prompts ask of it. Nothing here imports JAX."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from hipgpt_jax import config
from hipgpt_jax.runs import directory
from hipgpt_jax.text import prompts, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A prompt with all that is asked of it resolved.

    Attributes:
        id: Of the prompt.
        prompt: Its text, as its ids say it.
        prompt_ids: Its ids.
        generation: What its samples are.
        sampling: How their tokens are chosen.
    """

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    generation: config.GenerationConfig
    sampling: config.SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A run whose files are whole.

    Attributes:
        checkpoint: The step and its files.
        vocabulary: Its tokenizer.
        decoding: Window, stride, overflow rule and width.
    """

    checkpoint: directory.Checkpoint
    vocabulary: tokenizer.Tokenizer
    decoding: config.DecodingConfig

    @property
    def window(self) -> int:
        """Tokens the model sees at most, ``W``."""
        return self.decoding.resolve_window(self.checkpoint.model)

    def ask(self, prompt: prompts.Prompt, sampling: config.SamplingConfig, generation: config.GenerationConfig) -> Ask:
        """Resolves what a prompt asks for, with these as the defaults.

        Raises:
            ValueError: The prompt gives no token, its end token is not in the vocabulary, or its samples
                cannot fit the window where overflow is an error.
        """
        ids = tuple(self.vocabulary.encode(prompt.text))
        if not ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        found = Ask(
            id=prompt.name,
            prompt=self.vocabulary.decode(ids),
            prompt_ids=ids,
            generation=dataclasses.replace(generation, **prompt.generation),
            sampling=dataclasses.replace(sampling, **prompt.sampling),
        )
        found.generation.check_vocabulary(self.vocabulary.vocab_size)
        self.decoding.check_fits(self.window, len(ids), found.generation.num_tokens)
        return found

    def ask_all(
        self, several: Iterable[prompts.Prompt], sampling: config.SamplingConfig, generation: config.GenerationConfig
    ) -> list[Ask]:
        """Resolves several prompts; an error names the one it is about."""
        asked = []
        for number, prompt in enumerate(several, 1):
            try:
                asked.append(self.ask(prompt, sampling, generation))
            except ValueError as error:
                raise ValueError(f"{prompt.place or f'prompt {number}'} ({prompt.name}): {error}") from error
        return asked


def open_run(name: str, step: int | str | None, decoding: config.DecodingConfig, where: Path | None = None) -> Source:
    """Finds a run, verifies the digests of its files and reads its tokenizer.

    Args:
        name: Name of the run.
        step: Training step, or ``best``; None takes the latest.
        decoding: Window, stride, overflow rule and width.
        where: The run's directory; None finds it by the name.

    Raises:
        FileNotFoundError: There is no such run, step or file.
        ValueError: A file is not the one that the config names, or ``decoding`` does not fit the model.
    """
    checkpoint = directory.read_checkpoint(name, step, where)
    decoding.resolve_window(checkpoint.model)
    checkpoint.verify()
    vocabulary = tokenizer.Tokenizer.load(checkpoint.tokenizer)
    if vocabulary.vocab_size != checkpoint.model.vocab_size:
        raise ValueError(
            f"{checkpoint.tokenizer} has {vocabulary.vocab_size} ids: the model in its config needs "
            f"{checkpoint.model.vocab_size}. Restore the tokenizer that the run was trained with"
        )
    return Source(checkpoint=checkpoint, vocabulary=vocabulary, decoding=decoding)
