"""A run opened for generation: its files verified on disk, its tokenizer, and prompts resolved with it."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hipgpt_jax import config
from hipgpt_jax.runs import directory
from hipgpt_jax.text import prompts, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A tokenized prompt with all of its settings.

    Attributes:
        id: Of the prompt.
        prompt: Its text, decoded from its ids.
        prompt_ids: Its ids.
        generation: Number, length and ends of its samples.
        sampling: How their tokens are chosen.
        samples: Indices of the samples to make; None makes all of them.
    """

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    generation: config.GenerationConfig
    sampling: config.SamplingConfig
    samples: Iterable[int] | None = None


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
        """Tokenizes a prompt and resolves its settings.

        Args:
            prompt: The prompt.
            sampling: The defaults for settings that it does not have.
            generation: Likewise.

        Raises:
            ValueError: The prompt is empty, its end token is not in the vocabulary, or its samples
                cannot fit the window where overflow is an error.
        """
        ids = tuple(self.vocabulary.encode(prompt.text))
        if not ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        generation = dataclasses.replace(generation, **prompt.generation) if prompt.generation else generation
        generation.check_vocabulary(self.vocabulary.vocab_size)
        self.decoding.check_fits(self.window, len(ids), generation.num_tokens)
        return Ask(
            id=prompt.name,
            prompt=self.vocabulary.decode(ids),
            prompt_ids=ids,
            generation=generation,
            sampling=dataclasses.replace(sampling, **prompt.sampling) if prompt.sampling else sampling,
        )

    def ask_all(
        self, several: Iterable[prompts.Prompt], sampling: config.SamplingConfig, generation: config.GenerationConfig
    ) -> Iterator[Ask]:
        """Yields what ``ask`` returns for each prompt, as it is taken; an error names the prompt."""
        for number, prompt in enumerate(several, 1):
            try:
                yield self.ask(prompt, sampling, generation)
            except ValueError as error:
                raise ValueError(f"{prompt_name(prompt, number)}: {error}") from error


def prompt_name(prompt: prompts.Prompt, number: int) -> str:
    return f"{prompt.location or f'prompt {number}'} ({prompt.name})"


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
    window = decoding.resolve_window(checkpoint.model)
    _require_memory(decoding.width, window, checkpoint.model.vocab_size)
    checkpoint.verify()
    vocabulary = tokenizer.Tokenizer.load(checkpoint.tokenizer)
    if vocabulary.vocab_size != checkpoint.model.vocab_size:
        raise ValueError(
            f"{checkpoint.tokenizer} has {vocabulary.vocab_size} ids: the model in its config needs "
            f"{checkpoint.model.vocab_size}. Restore the tokenizer that the run was trained with"
        )
    return Source(checkpoint=checkpoint, vocabulary=vocabulary, decoding=decoding)


def _require_memory(width: int, window: int, vocab_size: int) -> None:
    """Raises ValueError where the smallest part of a batch's state takes more memory than the machine has."""
    needed = width * (5 * vocab_size + 4 * window)  # float32 logits and a byte for each token seen; the context's ids
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ValueError(
            f"batch_size {config.shortened(width)} (the width) needs at least {needed / 2**30:.3g} GiB of memory, and "
            f"this machine has {present / 2**30:.3g}: give a smaller one"
        )
