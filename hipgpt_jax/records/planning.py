"""Samples that a command has to generate, and names of prompts, found without holding the prompts in memory."""

import array
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from hipgpt_jax import config
from hipgpt_jax.records import shards, writer
from hipgpt_jax.runs import loading
from hipgpt_jax.text import prompts

# Settings that can contradict the vocabulary or one another. The others are checked when a prompt is read.
_TOKENS = frozenset({"allow", "ban", "eos_id", "logit_bias", "min_tokens", "first_sample"})


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
        *,
        shard: shards.Shard | None = None,
        cells: shards.Cells | None = None,
    ) -> None:
        """Checks the prompts.

        Args:
            files: The run.
            requested: Prompts that can be iterated over repeatedly.
            sampling: Defaults of settings that a prompt does not have.
            generation: Defaults, likewise.
            out: Output of the samples. With an output, samples that are in it are skipped, and so are repeated ones.
            shard: The part of the samples to generate; all if absent.
            cells: The only samples to generate; all if absent.

        Raises:
            ValueError: A prompt is invalid, two different ones have one id, ``out`` has a sample of one with other
                settings, or ``cells`` lists a sample that no prompt has. The message names the prompt.
        """
        self._files, self._prompts, self._out = files, requested, out
        self._shard, self._cells = shard or shards.Shard(), cells
        self._generation, self._sampling = files.resolve_settings(prompts.Prompt(text=""), sampling, generation)
        is_alone = isinstance(requested, list) and len(requested) == 1
        names, listed = NameIndex(), dict[str, range]()
        self.samples = self.left = 0
        for number, prompt in enumerate(requested, 1):
            try:
                self._check(prompt)
            except ValueError as error:
                raise error if is_alone else ValueError(f"{loading.describe(prompt, number)}: {error}") from error
            names.add(prompt)
            self._count(prompt, self._wanted(prompt))
            if cells and prompt.name in cells:
                samples = prompt.samples(self._generation.samples)
                listed[prompt.name] = max(samples, listed.get(prompt.name, samples), key=len)
        names.check_unique(requested)
        if cells:
            cells.check_all_in(listed)
        self.prompts = len(names)
        self.repeated, self._repeated_names = names.repeated()
        if out and self.repeated:
            self.samples = self.left = 0
            for prompt, wanted in self._grid():
                self._count(prompt, wanted)

    def __iter__(self) -> Iterator[loading.ResolvedPrompt]:
        for prompt, wanted in self._grid():
            samples = itertools.chain.from_iterable(wanted)
            if self._out is not None:
                name, finished = prompt.name, self._out.finished
                samples = itertools.chain.from_iterable(finished.missing(name, part) for part in wanted)
            first = next(samples, None)
            if first is None:
                continue  # before tokenizing the prompt
            resolved = self._files.resolve(prompt, self._sampling, self._generation)
            yield dataclasses.replace(resolved, samples=itertools.chain([first], samples))

    def _grid(self) -> Iterator[tuple[prompts.Prompt, list[range]]]:
        """Yields each prompt with its samples; with an output, without those of an equal prompt before it."""
        planned: dict[str, list[range]] = {}
        for prompt in self._prompts:
            wanted = self._wanted(prompt)
            if self._out is not None and self.repeated and hash(prompt.name) in self._repeated_names:
                earlier = planned.setdefault(prompt.name, [])
                for other in earlier:
                    wanted = [rest for part in wanted for rest in _without(part, other)]
                earlier += wanted
            yield prompt, wanted

    def _wanted(self, prompt: prompts.Prompt) -> list[range]:
        """Returns the samples of a prompt that are in the shard and in the list of cells."""
        samples = prompt.samples(self._generation.samples)
        if self._shard.count == 1 and self._cells is None:
            return [samples]  # before computing the prompt's name
        name = prompt.name
        parts = [samples] if self._cells is None else self._cells.part(name, samples)
        return [part for one in parts if (part := self._shard.part(name, one))]

    def _check(self, prompt: prompts.Prompt) -> None:
        """Raises the errors of ``RunFiles.resolve``, without tokenizing the prompt where possible."""
        if self._files.decoding.overflow == "error":
            self._files.resolve(prompt, self._sampling, self._generation)
            return
        self._files.check_prompt(prompt)
        if _TOKENS & (prompt.sampling.keys() | prompt.generation.keys()) or (
            (self._generation.min_tokens and "num_tokens" in prompt.generation)
            or (self._generation.first_sample and "num_samples" in prompt.generation)
        ):
            self._files.resolve_settings(prompt, self._sampling, self._generation)

    def _count(self, prompt: prompts.Prompt, wanted: list[range]) -> None:
        """Counts samples of a prompt, and those that are not in the output yet."""
        number = sum(map(len, wanted))
        self.samples += number
        self.left += number - self._count_finished(prompt, wanted)

    def _count_finished(self, prompt: prompts.Prompt, wanted: list[range]) -> int:
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
        return sum(self._out.finished.count(name, part) for part in wanted)


def _without(samples: range, others: range) -> list[range]:
    """Returns the samples that are not among others. Both are of one shard, so they have one step and one phase."""
    below = range(samples.start, min(samples.stop, others.start), samples.step)
    above = range(max(samples.start, others[-1] + samples.step), samples.stop, samples.step)
    return [part for part in (below, above) if part]


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

    def __len__(self) -> int:
        return len(self._hashes)

    def repeated(self) -> tuple[int, frozenset[int]]:
        """Returns the number of prompts whose name an earlier one has, and the hashes of such names."""
        hashes, counts = np.unique(np.array(self._hashes, np.int64), return_counts=True)
        return len(self) - len(hashes), frozenset(hashes[counts > 1].tolist())

    def check_unique(self, several: Iterable[prompts.Prompt]) -> None:
        """Raises ValueError if two different prompts have one id, or an id occurs twice in a file.

        Args:
            several: The prompts that were added. They are read again only if a name is repeated.
        """
        hashes = np.array(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        hashes, has_id = hashes[order], np.frombuffer(self._has_id, bool)[order]
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
