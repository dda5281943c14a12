"""The source of generation: a run verified on disk, and prompts with their settings. Nothing here imports JAX."""

import array
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hipgpt_jax import config
from hipgpt_jax.runs import directory, output
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

    def basis(
        self, prompt: prompts.Prompt, sampling: config.SamplingConfig, generation: config.GenerationConfig
    ) -> dict[str, Any]:
        """Returns ``output.own_basis`` of the records of a prompt, without tokenizing it where that is possible."""
        text = prompt.text
        try:
            text.encode()
        except UnicodeEncodeError:  # a lone surrogate, which its record does not have
            text = self.vocabulary.decode(self.vocabulary.encode(text))
        settings = {**vars(generation), **prompt.generation, **vars(sampling), **prompt.sampling}
        return output.own_basis({"prompt": text, "seed": settings["seed"], "settings": settings})

    def ask_all(
        self, several: Iterable[prompts.Prompt], sampling: config.SamplingConfig, generation: config.GenerationConfig
    ) -> Iterator[Ask]:
        """Yields what ``ask`` returns for each prompt, as it is taken; an error names the prompt."""
        for number, prompt in enumerate(several, 1):
            try:
                yield self.ask(prompt, sampling, generation)
            except ValueError as error:
                raise ValueError(f"{_name(prompt, number)}: {error}") from error


class Plan:
    """Prompts that have been checked and counted. Iterating reads and tokenizes them, one at a time.

    The check reads all prompts once and keeps 32 bytes of each. It tokenizes none, except to find out if one fits the
    window where overflow is an error.

    Attributes:
        prompts: Number of prompts.
        repeated: How many of them repeat an earlier one.
        samples: Number of different samples that the prompts ask for.
        left: How many of those are not in the output yet.
    """

    def __init__(
        self,
        found: Source,
        several: Iterable[prompts.Prompt],
        sampling: config.SamplingConfig,
        generation: config.GenerationConfig,
        out: output.Output | None = None,
    ) -> None:
        """Checks the prompts.

        Args:
            found: The run to generate from.
            several: The prompts; they can be iterated over repeatedly.
            sampling: The defaults for settings that a prompt does not have.
            generation: Likewise.
            out: Where the samples go. Those that are in it are not made again, nor is one sample twice.

        Raises:
            ValueError: A prompt is no good, two different ones have one id, or ``out`` has a sample of one that was
                made by other settings; the message names the prompt.
        """
        self._found, self._several, self._defaults, self._out = found, several, (sampling, generation), out
        generation.check_vocabulary(found.vocabulary.vocab_size)
        is_alone = isinstance(several, list) and len(several) == 1
        names, wanted, done = prompts.Names(), array.array("Q"), array.array("Q")
        for number, prompt in enumerate(several, 1):
            try:
                self._check(prompt)
            except ValueError as error:
                raise error if is_alone else ValueError(f"{_name(prompt, number)}: {error}") from error
            names.add(prompt)
            wanted.append(self._number(prompt))
            done.append(self._count_done(prompt))
        names.require_distinct(several)
        order, starts = names.groups()
        self.prompts = len(wanted)
        self.repeated = len(wanted) - len(starts)
        self.samples = _sum_of_largest(wanted, order, starts) if out else sum(wanted)
        self.left = self.samples - _sum_of_largest(done, order, starts)

    def __iter__(self) -> Iterator[Ask]:
        made: dict[str, int] = {}  # number of samples of each prompt, for those that repeat one
        for prompt in self._several:
            samples = None
            if self._out is not None:
                name, number = prompt.name, self._number(prompt)
                samples = self._out.done.missing(name, number, made.get(name, 0))
                if self.repeated:
                    made[name] = max(number, made.get(name, 0))
                first = next(samples, None)
                if first is None:
                    continue  # without tokenizing it
                samples = itertools.chain([first], samples)
            yield dataclasses.replace(self._found.ask(prompt, *self._defaults), samples=samples)

    def _number(self, prompt: prompts.Prompt) -> int:
        return prompt.generation.get("num_samples", self._defaults[1].num_samples)

    def _check(self, prompt: prompts.Prompt) -> None:
        """Raises what ``Source.ask`` would, without tokenizing the prompt where that is possible."""
        if not prompt.text:
            raise ValueError("the prompt is empty: it must hold at least one token")
        if self._found.decoding.overflow == "error":
            self._found.ask(prompt, *self._defaults)
        elif "eos_id" in prompt.generation:
            config.require_token("eos_id", prompt.generation["eos_id"], self._found.vocabulary.vocab_size)

    def _count_done(self, prompt: prompts.Prompt) -> int:
        """Returns how many of a prompt's samples are in the output; raises ValueError if other settings made them."""
        if self._out is None or not len(self._out.done) or (name := prompt.name) not in self._out.done:
            return 0
        self._out.require_same(name, self._found.basis(prompt, *self._defaults))
        return self._out.done.count(name, self._number(prompt))


def _sum_of_largest(values: "array.array[int]", order: np.ndarray, starts: np.ndarray) -> int:
    """Returns the sum of the largest value of each group; see ``prompts.Names.groups`` for the groups."""
    return int(np.maximum.reduceat(np.array(values, np.uint64)[order], starts).sum()) if len(starts) else 0


def _name(prompt: prompts.Prompt, number: int) -> str:
    return f"{prompt.place or f'prompt {number}'} ({prompt.name})"


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
