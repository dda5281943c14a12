"""Runs from Python: the records that the command line writes, in notebooks and experiment scripts."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipgpt_jax import compilation, config, devices
from hipgpt_jax.records import planning, provenance, record
from hipgpt_jax.runs import loading, weights
from hipgpt_jax.text import prompts as prompt_files

if TYPE_CHECKING:
    import numpy as np

    from hipgpt_jax.evaluation import score
    from hipgpt_jax.generation import requests
    from hipgpt_jax.records import comparison

Prompt = prompt_files.Prompt

_LOG = logging.getLogger("hipgpt_jax")
_SAMPLING = tuple(field.name for field in dataclasses.fields(config.SamplingConfig))
_GENERATION = tuple(field.name for field in dataclasses.fields(config.GenerationConfig))


class Stream:
    """The text of one sample as it is made: iterate over it for its pieces.

    Attributes:
        record: The sample's record, once the text has ended; None before.
    """

    def __init__(self, run: "Run", request: "requests.Request") -> None:
        self.record: record.Record | None = None
        self._pieces = self._make(run, request)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _make(self, run: "Run", request: "requests.Request") -> Iterator[str]:
        for output in run.outputs([request]):
            if output.finish_reason is not None:
                self.record = run.recorder.build(output.sequence)
            if output.text:
                yield output.text


class Run:
    """A run that is loaded, to generate and to score.

    Attributes:
        files: The run's files, its tokenizer and its window.
        device: What it is computed on.
        recorder: Makes the records of its samples.
        load_seconds: From the program's start to the loaded weights.
    """

    def __init__(self, found: loading.RunFiles, device: devices.Device, origin: provenance.Invocation) -> None:
        """Loads the weights; JAX has been started on ``device``. ``load_run`` is the way in."""
        from hipgpt_jax.generation import scheduler
        from hipgpt_jax.records import recorder

        model = found.checkpoint.model
        self.files = found
        self.device = device
        params = weights.read(found.checkpoint.weights, model)
        attention = device.attention(found.decoding.dtype, model.head_dim)
        self._engine = scheduler.Scheduler(model, params, found.decoding, attention)
        self.load_seconds = origin.elapsed()
        self.recorder = recorder.Recorder(found, device, origin, self.load_seconds)

    def generate(
        self,
        prompts: str | Prompt | Iterable[str | Prompt],
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        num_samples: int = 1,
        **more: Any,
    ) -> list[record.Record]:
        """Generates from prompts and returns one record per sample, prompt by prompt.

        Args:
            prompts: A text, or several; a ``Prompt`` may have settings of its own.
            settings: How each token is chosen; the defaults of ``hipgpt-generate`` if absent.
            seed: In ``[0, 2**32)``.
            num_samples: Samples for each prompt, from 1 to 2**32.
            **more: Other fields of ``config.GenerationConfig``: ``num_tokens``, ``eos_id``, ``stop``,
                ``top_logprobs``; and, in place of ``settings``, those of ``config.SamplingConfig``: ``temperature``,
                ``top_k``, ``top_p``, ``repetition_penalty``.

        Raises:
            TypeError: A prompt is not a text, a keyword is unknown, or ``settings`` is given beside a field of it.
            ValueError: A prompt is empty, two different ones have one id, or a value is out of its range.
        """
        return list(self.records(prompts, settings, seed, num_samples, **more))

    def records(
        self,
        prompts: str | Prompt | Iterable[str | Prompt],
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        num_samples: int = 1,
        **more: Any,
    ) -> Iterator[record.Record]:
        """Yields what ``generate`` returns, each record when its sample ends: for more samples than memory holds.

        Arguments and errors are those of ``generate``. The prompts of an iterator are taken as they are needed, and so
        an error in one of them is raised when its turn comes.
        """
        defaults = self._configs(settings, seed=seed, num_samples=num_samples, **more)
        if isinstance(prompts, (str, Prompt)):
            prompts = [prompts]
        if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, Mapping)):
            raise TypeError(f"prompts must be a text, a Prompt or several: got {config.shortened(prompts)}")
        if isinstance(prompts, Iterator):
            return self.records_of(self.requests(self.files.resolve_all(_distinct(prompts), *defaults)))
        several = [_prompt(prompt, number) for number, prompt in enumerate(prompts, 1)]
        return self.records_of(self.requests(planning.Plan(self.files, several, *defaults)))

    def stream(
        self,
        prompt: str | Prompt,
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        sample: int = 0,
        **more: Any,
    ) -> Stream:
        """Generates one of the samples that ``generate`` would, and gives its text as it is generated.

        Args:
            prompt: The text to continue.
            settings: As for ``generate``.
            seed: As for ``generate``.
            sample: Index of the sample among those of its prompt, in ``[0, 2**32)``.
            **more: As for ``generate``, except ``num_samples``.

        Raises:
            TypeError: As for ``generate``.
            ValueError: As for ``generate``, or ``sample`` is out of its range.
        """
        sample = config.require_int("sample", sample, 0, "index among the samples of the prompt")
        if sample >= config.MAX_SAMPLES:
            raise ValueError(f"sample must be below {config.MAX_SAMPLES} (32 bits): got {sample}")
        if "num_samples" in more:
            raise TypeError("a stream is of one sample: give its index as sample, not num_samples")
        defaults = self._configs(settings, seed=seed, **more)
        (asked,) = planning.Plan(self.files, [_prompt(prompt)], *defaults)
        return Stream(self, _request(asked, sample))

    def score(
        self, texts: "str | Iterable[str | Sequence[int] | np.ndarray | record.Record]", stride: int | None = None
    ) -> "list[score.TextScore]":
        """Returns the log-probability of every token of each text but the first, which nothing predicts.

        Args:
            texts: Texts, or their token ids as lists or arrays; each needs at least two tokens. Or records: then the
                ids that were read of the prompt and those that were drawn, whose scores are what the record says.
            stride: Tokens by which the window moves on where a text is longer than it; that of
                generation if absent.

        Raises:
            TypeError: ``texts`` is neither a text nor several.
            ValueError: A text has fewer than two tokens, an id is not an integer or not in the vocabulary, or the
                stride is no integer or out of range.
            FloatingPointError: A log-probability is infinite or not a number.
        """
        from hipgpt_jax.evaluation import score

        if not isinstance(texts, Iterable) or isinstance(texts, (bytes, bytearray, Mapping)):
            raise TypeError(f"texts must be a text or a list of texts or of ids: got {config.shortened(texts)}")
        several = [self._ids_of(text) for text in ([texts] if isinstance(texts, str) else texts)]
        vocabulary = self.files.vocabulary
        number = self.files.decoding.window_stride if stride is None else config.as_int(stride)
        if number is None:
            raise ValueError(f"stride must be an integer: got {config.shortened(stride)}")
        return [
            score.score_text(
                self._engine.module,
                self._engine.params,
                ids,
                vocabulary=vocabulary,
                window=self.files.window,
                stride=number,
            )
            for ids in several
        ]

    def _configs(
        self, settings: config.SamplingConfig | None, **values: Any
    ) -> tuple[config.SamplingConfig, config.GenerationConfig]:
        """Returns the keywords of a call as settings; the end token is the run's own unless one is given."""
        if unknown := [name for name in values if name not in (*_SAMPLING, *_GENERATION)]:
            raise TypeError(f"unknown keyword {unknown[0]!r}: the keywords are {', '.join((*_GENERATION, *_SAMPLING))}")
        sampling = {name: values.pop(name) for name in _SAMPLING if name in values}
        if settings is None:
            settings = config.SamplingConfig(**sampling)
        elif not isinstance(settings, config.SamplingConfig):
            raise TypeError(f"settings must be a SamplingConfig: got {config.shortened(settings)}")
        elif sampling:
            raise TypeError(f"settings and {next(iter(sampling))} are both given: give one of them")
        return settings, config.GenerationConfig(**{"eos_id": self.files.checkpoint.eos_id, **values})

    def _ids_of(self, text: Any) -> Sequence[int]:
        """Returns the ids to score; ``score.check_ids`` raises ValueError where they cannot be."""
        from hipgpt_jax.evaluation import score

        if isinstance(text, record.Record):
            text = (*text.prompt_ids[-self.files.window :], *text.ids)
        elif isinstance(text, str):
            text = self.files.vocabulary.encode(text)
        return score.check_ids(text, self.files.vocabulary.vocab_size)

    def evaluate(self, ids: "np.ndarray", *, text_bytes: int, stride: int) -> "score.Score":
        """Scores every token of a long text but the first, each once; ``score.Windows`` defines the context of each.

        Args:
            ids: Token ids of the text, at least two.
            text_bytes: Bytes of text that the ids after the first stand for.
            stride: Tokens from one window to the next.

        Raises:
            FloatingPointError: The loss is infinite or not a number.
        """
        from hipgpt_jax.evaluation import score

        length = self.files.window
        found = score.evaluate(
            self._engine.module,
            self._engine.params,
            ids,
            text_bytes=text_bytes,
            batch_size=score.rows_of(length),
            length=length,
            stride=stride,
        )
        return score.check_finite(found)

    def requests(self, asked: Iterable[loading.ResolvedPrompt]) -> "Iterator[requests.Request]":
        """Yields the samples of each prompt, prompt by prompt."""
        for ask in asked:
            for sample in range(ask.generation.num_samples) if ask.samples is None else ask.samples:
                yield _request(ask, sample)

    def request_of(self, recorded: record.Record) -> "requests.Request":
        """Returns the request that regenerates a record, with as few tokens as ``compare`` needs.

        Raises:
            ValueError: This run cannot have made the record.
        """
        from hipgpt_jax.records import replay

        request = replay.request(recorded)
        self._engine.check(request)
        if recorded.ids and max(recorded.ids) >= self.files.vocabulary.vocab_size:
            raise ValueError(f"it has ids beyond the vocabulary's size {self.files.vocabulary.vocab_size}")
        prompt = self.files.vocabulary.decode(recorded.prompt_ids)
        return dataclasses.replace(replay.shortened(request, recorded), prompt=prompt)

    def compare(self, recorded: record.Record, found: record.Record) -> "comparison.Comparison":
        """Compares a record with the one that ``records_of`` yields for its request."""
        from hipgpt_jax.records import comparison

        return comparison.Judge(self._engine, self.files.vocabulary).compare(recorded, found)

    def records_of(self, samples: "Iterable[requests.Request]") -> Iterator[record.Record]:
        """Generates samples and yields their records, in order."""
        from hipgpt_jax.generation import requests

        for output in requests.in_order(self.outputs(samples)):
            if output.finish_reason is not None:
                yield self.recorder.build(output.sequence)

    def outputs(self, samples: "Iterable[requests.Request]", *, measure: bool = True) -> "Iterator[requests.Output]":
        """Yields the outputs of samples as they are generated; ``measure`` is needed for their records.

        Raises:
            MemoryError: There is too little memory for the batch size.
        """
        try:
            yield from self._engine.run(samples, self.files.vocabulary, measure=measure)
        except (MemoryError, RuntimeError) as error:
            # XLA raises a RuntimeError of its own, which begins so.
            if not isinstance(error, MemoryError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            width = self.files.decoding.width
            raise MemoryError(
                f"width must be smaller: {width} slots and a window of {self.files.window} tokens exceed the memory "
                f"({error or type(error).__name__})"
            ) from error


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
        TypeError: An argument is of another type.
        FileNotFoundError: There is no such run, step or file.
        ValueError: A file is not the one that the run's config names, or JAX has no such device.
    """
    for argument, value, kinds in (
        ("name", name, str),
        ("device", device, str),
        ("decoding", decoding, (config.DecodingConfig, type(None))),
        ("where", where, (str, os.PathLike, type(None))),
    ):
        if not isinstance(value, kinds):
            raise TypeError(f"{argument} is of the wrong type: got {config.shortened(value)}")
    if step is not None and not isinstance(step, str):
        step = config.require_int("step", step, 0, "a training step, or best")
    origin = provenance.Invocation()
    found = loading.open_run(name, step, decoding or config.DecodingConfig(), None if where is None else Path(where))
    started = devices.start(device, _LOG.info)
    compilation.check_cache(_LOG.warning)
    return Run(found, started, origin)


def _request(ask: loading.ResolvedPrompt, sample: int) -> "requests.Request":
    from hipgpt_jax.generation import requests

    return requests.Request(
        id=ask.id,
        prompt=ask.prompt,
        prompt_ids=ask.prompt_ids,
        sample=sample,
        generation=ask.generation,
        sampling=ask.sampling,
    )


def _prompt(prompt: object, number: int | None = None) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str):
        name = "prompt" if number is None else f"prompt {number}"
        raise TypeError(f"{name} must be a text or a Prompt: got {config.shortened(prompt)}")
    return Prompt(text=prompt)


def _distinct(several: Iterable[str | Prompt]) -> Iterator[Prompt]:
    """Yields prompts; raises ValueError where two different ones have one id."""
    digests: dict[int, int] = {}  # by the id's hash: 64 bits of each
    for number, each in enumerate(several, 1):
        prompt = _prompt(each, number)
        if prompt.id is not None and digests.setdefault(hash(prompt.id), hash(prompt.digest)) != hash(prompt.digest):
            raise ValueError(f"prompt {number}: id {config.shortened(prompt.id)} is that of a different prompt too")
        yield prompt
