"""Samples that a command has to generate, and names of prompts, found without holding the prompts in memory."""

import array
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from hipgpt_jax import config
from hipgpt_jax.records import writer
from hipgpt_jax.runs import loading
from hipgpt_jax.text import prompts

# Settings that can contradict the vocabulary or one another. The others are checked when a prompt is read.
_TOKENS = frozenset({"allow", "ban", "eos_id", "logit_bias", "min_tokens"})


class Plan:
    """Prompts that were checked and counted. Iterating reads and tokenizes them, one at a time.

    The check reads all prompts once and keeps 32 bytes of each. It tokenizes only those that the output has samples of,
    to compare their ids, and all if ``overflow`` is ``error``, to check that they fit the window.

    Attributes:
        prompts: Number of prompts.
        repeated: Number of prompts that repeat an earlier one.
        samples: Number of different samples requested.
        left: Number of those that are not in the output yet.
    """

    def __init__(
        self,
        files: loading.RunFiles,
        requested: Iterable[prompts.Prompt],
        sampling: config.SamplingConfig,
        generation: config.GenerationConfig,
        out: writer.RecordFile | None = None,
    ) -> None:
        """Checks the prompts.

        Args:
            files: The run.
            requested: Prompts that can be iterated over repeatedly.
            sampling: Defaults of settings that a prompt does not have.
            generation: Defaults, likewise.
            out: Output of the samples. With an output, samples that are in it are skipped, and so are repeated ones.

        Raises:
            ValueError: A prompt is invalid, two different ones have one id, or ``out`` has a sample of one with other
                settings. The message names the prompt.
        """
        self._files, self._prompts, self._out = files, requested, out
        self._generation, self._sampling = files.resolve_settings(prompts.Prompt(text=""), sampling, generation)
        is_alone = isinstance(requested, list) and len(requested) == 1
        names, wanted, finished = NameIndex(), array.array("Q"), array.array("Q")
        for number, prompt in enumerate(requested, 1):
            try:
                self._check(prompt)
            except ValueError as error:
                raise error if is_alone else ValueError(f"{loading.describe(prompt, number)}: {error}") from error
            names.add(prompt)
            wanted.append(self._num_samples(prompt))
            finished.append(self._count_finished(prompt))
        names.check_unique(requested)
        order, starts = names.groups()
        self.prompts = len(wanted)
        self.repeated = len(wanted) - len(starts)
        self.samples = _sum_of_largest(wanted, order, starts) if out else sum(wanted)
        self.left = self.samples - _sum_of_largest(finished, order, starts)

    def __iter__(self) -> Iterator[loading.ResolvedPrompt]:
        planned: dict[str, int] = {}  # samples planned so far, of prompts that may be repeated
        for prompt in self._prompts:
            samples = None
            if self._out is not None:
                name, number = prompt.name, self._num_samples(prompt)
                samples = self._out.finished.missing(name, range(planned.get(name, 0), number))
                if self.repeated:
                    planned[name] = max(number, planned.get(name, 0))
                first = next(samples, None)
                if first is None:
                    continue  # before tokenizing the prompt
                samples = itertools.chain([first], samples)
            resolved = self._files.resolve(prompt, self._sampling, self._generation)
            yield dataclasses.replace(resolved, samples=samples)

    def _num_samples(self, prompt: prompts.Prompt) -> int:
        return prompt.generation.get("num_samples", self._generation.num_samples)

    def _check(self, prompt: prompts.Prompt) -> None:
        """Raises the errors of ``RunFiles.resolve``, without tokenizing the prompt where possible."""
        if self._files.decoding.overflow == "error":
            self._files.resolve(prompt, self._sampling, self._generation)
            return
        self._files.check_prompt(prompt)
        if _TOKENS & (prompt.sampling.keys() | prompt.generation.keys()) or (
            self._generation.min_tokens and "num_tokens" in prompt.generation
        ):
            self._files.resolve_settings(prompt, self._sampling, self._generation)

    def _count_finished(self, prompt: prompts.Prompt) -> int:
        """Returns how many samples of a prompt are in the output; raises ValueError if they have other settings."""
        name = prompt.name if self._out is not None and len(self._out.finished) else None
        if self._out is None or name is None or name not in self._out.finished:
            return 0
        settings = {**vars(self._generation), **vars(self._sampling), **prompt.generation, **prompt.sampling}
        if _TOKENS & prompt.sampling.keys():
            generation, sampling = self._files.resolve_settings(prompt, self._sampling, self._generation)
            settings = {**vars(generation), **vars(sampling)}
        ids = self._files.encode(prompt)
        text = self._files.vocabulary.decode(ids)  # as in records: U+FFFD replaces a lone surrogate
        self._out.check_prompt(name, writer.prompt_fingerprint(text, ids, settings["seed"], settings))
        return self._out.finished.count(name, range(self._num_samples(prompt)))


def _sum_of_largest(values: "array.array[int]", order: np.ndarray, starts: np.ndarray) -> int:
    """Returns the sum of the largest value of each group of ``NameIndex.groups``."""
    return int(np.maximum.reduceat(np.array(values, np.uint64)[order], starts).sum()) if len(starts) else 0


class NameIndex:
    """Names of prompts, in 9 bytes each, to find repeated ones.

    64-bit hashes are compared: two of 10^6 names collide with probability 3e-8.
    """

    def __init__(self) -> None:
        self._hashes, self._has_id = array.array("q"), bytearray()

    def add(self, prompt: prompts.Prompt) -> None:
        """Adds the name of the next prompt."""
        self._has_id.append(prompt.id is not None)
        self._hashes.append(hash(prompt.name))

    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the indices of the prompts, grouped by name and otherwise in order, and the start of each group."""
        hashes = np.array(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        is_start = np.append(True, hashes[order[1:]] != hashes[order[:-1]])[: len(hashes)]
        return order, np.flatnonzero(is_start)

    def check_unique(self, several: Iterable[prompts.Prompt]) -> None:
        """Raises ValueError if two different prompts have one id, or an id occurs twice in a file.

        Args:
            several: The prompts that were added. They are read again only if a name is repeated.
        """
        order, _ = self.groups()
        hashes, has_id = np.array(self._hashes, np.int64)[order], np.frombuffer(self._has_id, bool)[order]
        is_suspect = (hashes[1:] == hashes[:-1]) & (has_id[1:] | has_id[:-1])
        pairs = [(int(order[i]), int(order[i + 1])) for i in np.flatnonzero(is_suspect)]
        indices = {index for pair in pairs for index in pair}
        repeated = {index: prompt for index, prompt in enumerate(several) if index in indices} if pairs else {}
        for i, j in sorted(pairs, key=max):
            first, second = repeated[i], repeated[j]
            # The same prompt may be repeated from Python or as plain text, where no line repeats an id.
            is_repeated_id = second.location is not None and first.id is not None and second.id is not None
            if is_repeated_id or first.digest != second.digest:
                earlier = f"prompt {i + 1}" if first.location is None else f"line {first.location.rpartition(' ')[2]}"
                later = second.location or f"prompt {j + 1}"
                raise ValueError(f"{later}: id {config.shortened(second.name)} is that of {earlier} too")
