"""Plans: prompts checked, counted and resolved, without holding them."""

import array
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from hipgpt_jax import config
from hipgpt_jax.records import writer
from hipgpt_jax.runs import loading
from hipgpt_jax.text import prompts


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
        found: loading.Source,
        several: Iterable[prompts.Prompt],
        sampling: config.SamplingConfig,
        generation: config.GenerationConfig,
        out: writer.Output | None = None,
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
        names, wanted, done = prompts.NameIndex(), array.array("Q"), array.array("Q")
        for number, prompt in enumerate(several, 1):
            try:
                self._check(prompt)
            except ValueError as error:
                raise error if is_alone else ValueError(f"{loading.prompt_name(prompt, number)}: {error}") from error
            names.add(prompt)
            wanted.append(self._number(prompt))
            done.append(self._count_done(prompt))
        names.check_unique(several)
        order, starts = names.groups()
        self.prompts = len(wanted)
        self.repeated = len(wanted) - len(starts)
        self.samples = _sum_of_largest(wanted, order, starts) if out else sum(wanted)
        self.left = self.samples - _sum_of_largest(done, order, starts)

    def __iter__(self) -> Iterator[loading.Ask]:
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
        """Raises what ``loading.Source.ask`` would, without tokenizing the prompt where that is possible."""
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
        self._out.require_same(name, _own_basis(self._found, prompt, *self._defaults))
        return self._out.done.count(name, self._number(prompt))


def _sum_of_largest(values: "array.array[int]", order: np.ndarray, starts: np.ndarray) -> int:
    """Returns the sum of the largest value of each group; see ``prompts.NameIndex.groups`` for the groups."""
    return int(np.maximum.reduceat(np.array(values, np.uint64)[order], starts).sum()) if len(starts) else 0


def _own_basis(
    found: loading.Source, prompt: prompts.Prompt, sampling: config.SamplingConfig, generation: config.GenerationConfig
) -> dict[str, Any]:
    """Returns ``writer.own_basis`` of the records of a prompt, without tokenizing it where that is possible."""
    text = prompt.text
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which its record does not have
        text = found.vocabulary.decode(found.vocabulary.encode(text))
    settings = {**vars(generation), **prompt.generation, **vars(sampling), **prompt.sampling}
    return writer.own_basis({"prompt": text, "seed": settings["seed"], "settings": settings})
