"""Summary of the records of files, in memory that does not grow with them."""

import collections
import math
from collections.abc import Iterator
from typing import Any

from hipgpt_jax import config
from hipgpt_jax.records import record, writer

_MOST_VALUES = 5


class Summary:
    """Counts and means of records. Different values are listed, up to five of each kind."""

    def __init__(self) -> None:
        self._samples = writer.Samples()
        self._first, self._last = config.MAX_SAMPLES, 0
        self._values: dict[str, dict[str, None]] = {}  # ordered sets
        self._ends: collections.Counter[str] = collections.Counter()
        self._tokens, self._fewest, self._most = 0, math.inf, 0
        self._logprobs = self._sampled_logprobs = 0.0

    def add(self, one: record.Record) -> None:
        """Adds a record."""
        self._samples.add(one.id, one.sample, "")
        self._first, self._last = min(self._first, one.sample), max(self._last, one.sample)
        numerics, run = one.numerics, one.run
        size = "invariant" if numerics.batch_size is None else f"batch_size {numerics.batch_size}"
        self._note("run", f"{run.name} step {run.step} (weights {run.weights_sha256[:12]}…)")
        self._note("numerics", f"{numerics.platform} ({numerics.device_kind}), {numerics.dtype}, {size}")
        self._note("seed", one.seed)
        for name, value in vars(one.settings).items():
            self._note(name, value)
        self._ends[one.finish_reason] += 1
        number = len(one.ids)
        self._tokens, self._fewest, self._most = (
            self._tokens + number,
            min(self._fewest, number),
            max(self._most, number),
        )
        self._logprobs += math.fsum(one.logprobs)
        self._sampled_logprobs += math.fsum(one.sampled_logprobs)

    def __len__(self) -> int:
        return len(self._samples)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yields names and values to print. There must be at least one record."""
        number = len(self._samples)
        yield "records", f"{number:,} of {self._samples.num_prompts:,} prompts, samples {self._first} to {self._last}"
        for name in ("run", "numerics", "seed"):
            yield name, self._listed(name)
        yield "tokens", f"{self._tokens:,}, {self._tokens / number:.1f} per sample ({self._fewest} to {self._most})"
        yield "ends", ", ".join(f"{count:,} {reason}" for reason, count in self._ends.most_common())
        if self._tokens:
            mean, chance = self._logprobs / self._tokens, self._sampled_logprobs / self._tokens
            yield "logprob", f"{mean:.4f} per token, perplexity {math.exp(-mean):.2f}; as sampled {chance:.4f}"
        for name in record.Settings.__dataclass_fields__:
            if len(self._values[name]) > 1:
                yield name, f"varies: {self._listed(name)}"

    def _note(self, name: str, value: Any) -> None:
        values = self._values.setdefault(name, {})
        if len(values) <= _MOST_VALUES:
            values.setdefault(config.shortened(value) if not isinstance(value, str) else value)

    def _listed(self, name: str) -> str:
        first, more = [*self._values[name]][:_MOST_VALUES], len(self._values[name]) > _MOST_VALUES
        return ", ".join(first) + (", and others" if more else "")
