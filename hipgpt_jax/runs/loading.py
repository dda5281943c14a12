"""A run opened for generation: its verified files, its tokenizer, and prompts resolved with them."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hipgpt_jax import config
from hipgpt_jax.runs import directory, initial, weights
from hipgpt_jax.text import prompts, tokenizer

_NO_END = (
    "the prompt is empty, which begins a document after the run's end token, but the run has none, because it was "
    "trained on a single document: give at least one token"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedPrompt:
    """A tokenized prompt with all of its settings.

    Attributes:
        id: Id of the prompt.
        prompt: Text, decoded from the ids.
        prompt_ids: Token ids.
        generation: Number, length and ends of its samples.
        sampling: Sampling settings.
        samples: Indices of the samples to generate; None for all.
    """

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    generation: config.GenerationConfig
    sampling: config.SamplingConfig
    samples: Iterable[int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run with verified files.

    Attributes:
        checkpoint: The step and its files.
        vocabulary: Tokenizer of the run.
        decoding: Window, stride, overflow rule, batch size and type of the arithmetic.
    """

    checkpoint: directory.Checkpoint
    vocabulary: tokenizer.Tokenizer
    decoding: config.DecodingConfig

    @property
    def window(self) -> int:
        """Maximum number of tokens that the model sees, ``W``."""
        return self.decoding.resolve_window(self.checkpoint.model)

    def resolve(
        self, prompt: prompts.Prompt, sampling: config.SamplingConfig, generation: config.GenerationConfig
    ) -> ResolvedPrompt:
        """Tokenizes a prompt and resolves its settings.

        Args:
            prompt: The prompt.
            sampling: Defaults of settings that the prompt does not have.
            generation: Defaults, likewise.

        Raises:
            ValueError: The prompt is empty and the run has no end token, a token is not in the vocabulary, or its
                samples do not fit the window although ``overflow`` is ``error``.
        """
        ids = self.encode(prompt)
        generation, sampling = self.resolve_settings(prompt, sampling, generation)
        self.decoding.check_fits(self.window, len(ids), generation.num_tokens)
        return ResolvedPrompt(
            id=prompt.name,
            prompt=self.vocabulary.decode(ids),
            prompt_ids=ids,
            generation=generation,
            sampling=sampling,
        )

    def encode(self, prompt: prompts.Prompt) -> tuple[int, ...]:
        """Returns the ids of a prompt: the run's end token for an empty one, which begins a document.

        Raises:
            ValueError: It is empty and the run has no end token, or an id is not in the vocabulary.
        """
        self.check_prompt(prompt)
        if prompt.ids is not None:
            return tuple(prompt.ids)
        ids = self.vocabulary.encode(prompt.text, parse_special=prompt.parse_special)
        return tuple(ids) or (self.checkpoint.eos_id,)

    def check_prompt(self, prompt: prompts.Prompt) -> None:
        """Raises the errors of ``encode``, without tokenizing the prompt."""
        if prompt.ids is not None and max(prompt.ids) >= self.vocabulary.vocab_size:
            size = self.vocabulary.vocab_size
            raise ValueError(f"prompt_ids must be below the vocabulary's size {size}: got {max(prompt.ids)}")
        if prompt.ids is None and not prompt.text and self.checkpoint.eos_id < 0:
            raise ValueError(_NO_END)

    def resolve_settings(
        self, prompt: prompts.Prompt, sampling: config.SamplingConfig, generation: config.GenerationConfig
    ) -> tuple[config.GenerationConfig, config.SamplingConfig]:
        """Returns the settings of a prompt, with tokens given by their ids; see ``resolve``."""
        size = self.vocabulary.vocab_size
        generation = dataclasses.replace(generation, **prompt.generation) if prompt.generation else generation
        generation.check_vocabulary(size)
        sampling = dataclasses.replace(sampling, **prompt.sampling) if prompt.sampling else sampling
        sampling = sampling.with_ids(self.vocabulary.id_of, size)
        if generation.min_tokens and set(sampling.allow) - set(sampling.ban) == {generation.eos_id}:
            raise ValueError("min_tokens needs a token other than the end token: allow has no other")
        return generation, sampling

    def resolve_all(
        self, requested: Iterable[prompts.Prompt], sampling: config.SamplingConfig, generation: config.GenerationConfig
    ) -> Iterator[ResolvedPrompt]:
        """Resolves prompts as they are taken; an error names the prompt."""
        for number, prompt in enumerate(requested, 1):
            try:
                yield self.resolve(prompt, sampling, generation)
            except ValueError as error:
                raise ValueError(f"{describe(prompt, number)}: {error}") from error


def describe(prompt: prompts.Prompt, number: int) -> str:
    """Returns where a prompt comes from and its id, for error messages."""
    return f"{prompt.location or f'prompt {number}'} ({prompt.name})"


def open_run(name: str, step: int | str | None, decoding: config.DecodingConfig, path: Path | None = None) -> RunFiles:
    """Finds a run, verifies the digests of its files and loads its tokenizer.

    Args:
        name: Name of the run.
        step: Training step, or ``best``; None for the latest.
        decoding: Window, stride, overflow rule, batch size and type of the arithmetic.
        path: Directory of the run; None finds it by name.

    Raises:
        FileNotFoundError: The run, the step or a file does not exist.
        ValueError: A file is not the one named by the config, or ``decoding`` does not fit the model.
    """
    checkpoint = directory.read_checkpoint(name, step, path)
    decoding.resolve_mesh(checkpoint.model)
    _check_memory(decoding.batch_size, decoding.resolve_window(checkpoint.model), checkpoint.model.vocab_size)
    checkpoint.verify()
    vocabulary = tokenizer.Tokenizer.load(checkpoint.tokenizer)
    if vocabulary.vocab_size != checkpoint.model.vocab_size:
        raise ValueError(
            f"{checkpoint.tokenizer} has {vocabulary.vocab_size} ids: the model in its config needs "
            f"{checkpoint.model.vocab_size}. Restore the tokenizer that the run was trained with"
        )
    return RunFiles(checkpoint=checkpoint, vocabulary=vocabulary, decoding=decoding)


def read_initial(init_from: initial.Initial, model: config.ModelConfig) -> dict[str, Any]:
    """Returns the weights that a run starts from, as ``weights.read`` does.

    Args:
        init_from: The checkpoint that they belong to.
        model: Shape of the run's model; its context may be shorter than the checkpoint's, whose later positions are
            dropped.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: Its weights are not those of the digest.
    """
    checkpoint = directory.read_checkpoint(init_from.run, init_from.step, init_from.directory)
    if checkpoint.weights_sha256 != init_from.sha256:
        raise ValueError(
            f"step {init_from.step} of run {init_from.run!r} has other weights than the run starts from (sha256 "
            f"{checkpoint.weights_sha256[:12]}…, expected {init_from.sha256[:12]}…): restore them"
        )
    checkpoint.verify()
    params = weights.read(checkpoint.weights, checkpoint.model)
    params["wpe"]["embedding"] = params["wpe"]["embedding"][: model.max_seq_len]
    return params


def _check_memory(batch_size: int, window: int, vocab_size: int) -> None:
    """Raises ValueError if the smallest part of the decode state exceeds the machine's memory."""
    needed = batch_size * (12 * vocab_size + 4 * window)  # logits, bias and counts of tokens; ids of the context
    present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > present:
        raise ValueError(
            f"batch_size must be smaller: {config.shortened(batch_size)} slots need at least {needed / 2**30:.3g} GiB "
            f"of memory, and this machine has {present / 2**30:.3g}"
        )
