"""Runs from Python: the records that the command line writes, in notebooks and experiment scripts."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipgpt_jax import compilation, config, devices
from hipgpt_jax.generation import source
from hipgpt_jax.runs import provenance, record, weights
from hipgpt_jax.text import prompts as prompt_files

if TYPE_CHECKING:
    import numpy as np

    from hipgpt_jax.evaluation import loss, score
    from hipgpt_jax.generation import comparison, samples

Prompt = prompt_files.Prompt

_LOG = logging.getLogger("hipgpt_jax")


class Stream:
    """The text of one sample as it is made: iterate over it for its pieces.

    Attributes:
        record: The sample's record, once the text has ended; None before.
    """

    def __init__(self, run: "Run", job: "samples.Job") -> None:
        self.record: record.Record | None = None
        self._pieces = self._make(run, job)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _make(self, run: "Run", job: "samples.Job") -> Iterator[str]:
        for update in run.make([job]):
            if update.finish_reason is not None:
                self.record = run.recorder.describe(update.sample)
            if update.text:
                yield update.text


class Run:
    """A run that is loaded, to generate and to score.

    Attributes:
        source: The run's files and the window it is read through.
        device: What it is computed on.
        recorder: Makes the records of its samples.
        load_seconds: From the program's start to the loaded weights.
    """

    def __init__(self, found: source.Source, device: devices.Device, origin: provenance.Origin) -> None:
        """Loads the weights; JAX has been started on ``device``. ``load_run`` is the way in."""
        from hipgpt_jax.generation import recorder, sampler

        model = found.checkpoint.model
        self.source = found
        self.device = device
        params = weights.read(found.checkpoint.weights, model)
        attention = device.attention(found.decoding.dtype, model.head_dim)
        self._engine = sampler.Sampler(model, params, found.decoding, attention)
        self.load_seconds = origin.elapsed()
        self.recorder = recorder.Recorder(found, device, origin, self.load_seconds)

    def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        num_samples: int = 1,
        **generation: Any,
    ) -> list[record.Record]:
        """Generates from prompts and returns a record a sample, prompt by prompt.

        Args:
            prompts: A text, or several; a ``Prompt`` may have settings of its own.
            settings: How each token is chosen; the defaults of ``hipgpt-generate`` if absent.
            seed: In ``[0, 2**32)``.
            num_samples: Samples for each prompt, at least 1.
            **generation: Other fields of ``config.GenerationConfig``: ``num_tokens``, ``eos_id``,
                ``stop``, ``top_logprobs``.

        Raises:
            ValueError: A prompt is empty, or a value is out of its range.
        """
        several = [prompts] if isinstance(prompts, (str, Prompt)) else prompts
        return list(self.records(several, settings, seed, num_samples, **generation))

    def records(
        self,
        prompts: Iterable[str | Prompt],
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        num_samples: int = 1,
        **generation: Any,
    ) -> Iterator[record.Record]:
        """Yields what ``generate`` returns, each record when its sample ends: for more samples than memory holds."""
        defaults = self._defaults(seed=seed, num_samples=num_samples, **generation)
        asked = self.source.ask_all(map(_prompt, prompts), settings or config.SamplingConfig(), defaults)
        yield from self.records_of(self.jobs(asked))

    def stream(
        self,
        prompt: str | Prompt,
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        sample: int = 0,
        **generation: Any,
    ) -> Stream:
        """Makes one sample of those that ``generate`` would, and gives its text as it is made.

        Args:
            prompt: The text to continue.
            settings: As for ``generate``.
            seed: As for ``generate``.
            sample: Index of the sample among those of its prompt.
            **generation: As for ``generate``.
        """
        defaults = self._defaults(seed=seed, num_samples=sample + 1, **generation)
        (asked,) = self.source.ask_all([_prompt(prompt)], settings or config.SamplingConfig(), defaults)
        return Stream(self, _job(asked, sample))

    def score(
        self, texts: str | Sequence[str | Sequence[int] | record.Record], stride: int | None = None
    ) -> "list[score.TextScore]":
        """Returns the log-probability of every token of each text but the first, which nothing predicts.

        Args:
            texts: Texts, or their token ids; each needs at least two tokens. Or records: then the ids that
                were read of the prompt and those that were drawn, whose scores are what the record says.
            stride: Tokens by which the window moves on where a text is longer than it; that of
                generation if absent.

        Raises:
            ValueError: A text has fewer than two tokens, an id is unknown, or the stride is out of range.
            FloatingPointError: A log-probability is infinite or not a number.
        """
        from hipgpt_jax.evaluation import score

        several = [self._ids_of(text) for text in ([texts] if isinstance(texts, str) else texts)]
        vocabulary = self.source.vocabulary
        stride = self.source.decoding.window_stride if stride is None else stride
        return [
            score.score_text(
                self._engine.module,
                self._engine.params,
                ids,
                vocabulary=vocabulary,
                window=self.source.window,
                stride=stride,
            )
            for ids in several
        ]

    def _defaults(self, **generation: Any) -> config.GenerationConfig:
        """What a call asks for; the end token is the run's own unless one is given."""
        return config.GenerationConfig(**{"eos_id": self.source.checkpoint.eos_id, **generation})

    def _ids_of(self, text: str | Sequence[int] | record.Record) -> Sequence[int]:
        """The ids to score; ``score.check_ids`` raises ValueError where they cannot be."""
        from hipgpt_jax.evaluation import score

        if isinstance(text, record.Record):
            ids: Sequence[int] = (*text.prompt_ids[-self.source.window :], *text.ids)
        else:
            ids = self.source.vocabulary.encode(text) if isinstance(text, str) else text
        score.check_ids(ids, self.source.vocabulary.vocab_size)
        return ids

    def evaluate(self, ids: "np.ndarray", *, text_bytes: int, stride: int) -> "loss.Score":
        """Scores every token of a long text but the first, each once; ``loss.Windows`` has the context rule.

        Args:
            ids: Token ids of the text, at least two.
            text_bytes: Bytes of text that the ids after the first stand for.
            stride: Tokens from one window to the next.

        Raises:
            FloatingPointError: The loss is infinite or not a number.
        """
        from hipgpt_jax.evaluation import loss

        length = self.source.window
        found = loss.score(
            self._engine.module,
            self._engine.params,
            ids,
            text_bytes=text_bytes,
            batch_size=loss.rows_of(length),
            length=length,
            stride=stride,
        )
        return loss.require_finite(found)

    def jobs(self, asked: Iterable[source.Ask]) -> "Iterator[samples.Job]":
        """Yields the samples that are asked for, prompt by prompt."""
        for ask in asked:
            for sample in range(ask.generation.num_samples):
                yield _job(ask, sample)

    def job_of(self, recorded: record.Record) -> "samples.Job":
        """Returns the job that regenerates a record, with as few tokens as ``compare`` needs.

        Raises:
            ValueError: This run cannot have made the record.
        """
        from hipgpt_jax.generation import replay, samples

        request = replay.request_of(recorded)
        self._engine.check(request)
        if recorded.ids and max(recorded.ids) >= self.source.vocabulary.vocab_size:
            raise ValueError(f"it has ids beyond the vocabulary's size {self.source.vocabulary.vocab_size}")
        prompt = self.source.vocabulary.decode(recorded.prompt_ids)
        return samples.Job(id=recorded.id, prompt=prompt, request=replay.shortened(request, recorded))

    def compare(self, recorded: record.Record, found: record.Record) -> "comparison.Comparison":
        """Compares a record with the one that ``records_of`` yields for its job."""
        from hipgpt_jax.generation import comparison

        return comparison.Judge(self._engine, self.source.vocabulary).compare(recorded, found)

    def records_of(self, jobs: "Iterable[samples.Job]") -> Iterator[record.Record]:
        """Makes samples and yields their records, in order."""
        from hipgpt_jax.generation import events

        for update in events.in_order(self.make(jobs)):
            if update.finish_reason is not None:
                yield self.recorder.describe(update.sample)

    def make(self, jobs: "Iterable[samples.Job]", *, measure: bool = True) -> "Iterator[samples.Update]":
        """Yields the steps of samples as they are made; ``measure`` is needed for their records."""
        from hipgpt_jax.generation import samples

        return samples.make(self._engine, self.source.vocabulary, jobs, measure=measure)


def load_run(
    name: str,
    step: int | str | None = None,
    device: str = "auto",
    decoding: config.DecodingConfig | None = None,
    where: str | Path | None = None,
) -> Run:
    """Loads a run: one in ``checkpoints/``, else one of the package.

    If JAX's persistent compilation cache is on in this process, ``compilation.check_cache`` has its entries checked.

    Args:
        name: Name of the run.
        step: Training step, or ``best``; the latest if absent.
        device: One of ``devices.DEVICES``. JAX must not have started on another one already.
        decoding: Window, stride, overflow rule and width; the defaults of ``hipgpt-generate`` if absent.
        where: The run's directory, where it is not in ``checkpoints/``.

    Raises:
        FileNotFoundError: There is no such run, step or file.
        ValueError: A file is not the one that the run's config names, or JAX has no such device.
    """
    origin = provenance.Origin()
    found = source.open_run(name, step, decoding or config.DecodingConfig(), None if where is None else Path(where))
    started = devices.start(device, _LOG.info)
    compilation.check_cache(_LOG.warning)
    return Run(found, started, origin)


def _job(ask: source.Ask, sample: int) -> "samples.Job":
    from hipgpt_jax.generation import events, samples

    request = events.Request(prompt_ids=ask.prompt_ids, sample=sample, generation=ask.generation, sampling=ask.sampling)
    return samples.Job(id=ask.id, prompt=ask.prompt, request=request)


def _prompt(prompt: str | Prompt) -> Prompt:
    return Prompt(text=prompt) if isinstance(prompt, str) else prompt
