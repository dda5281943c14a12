"""Runs from Python: generation with the records of the command line, and scores, in notebooks and scripts."""

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipgpt_jax import compilation, config, devices, files, notebook
from hipgpt_jax.generation import requests
from hipgpt_jax.records import planning, provenance, record, recorder, replay
from hipgpt_jax.runs import directory, loading, weights
from hipgpt_jax.text import prompts as prompt_files

# Modules that import JAX are imported late, so that programs report mistakes before it starts.
if TYPE_CHECKING:
    import numpy as np

    from hipgpt_jax.evaluation import score
    from hipgpt_jax.generation.topk import Rule
    from hipgpt_jax.records import comparison

Prompt = prompt_files.Prompt

_LOG = logging.getLogger("hipgpt_jax")
_SAMPLING = tuple(config.SAMPLING_RULES)
_GENERATION = tuple(config.GENERATION_RULES)


class Stream:
    """Text of one sample while it is generated. Iterating yields its pieces.

    Attributes:
        record: Record of the sample, once the text has ended; None before.
    """

    def __init__(self, run: "Run", request: requests.Request) -> None:
        self.record: record.Record | None = None
        self._pieces = self._generate(run, request)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _generate(self, run: "Run", request: requests.Request) -> Iterator[str]:
        for output in run.outputs([request]):
            if output.finish_reason is not None:
                self.record = run.recorder.build(output.sequence)
            if output.text:
                yield output.text


class Run:
    """A loaded run, for generation and scores. ``load_run`` creates it.

    Attributes:
        files: Files, tokenizer and decoding configuration of the run.
        device: Device of the computation.
        recorder: Builds the records of its samples.
        load_seconds: Time from the start of the program until the weights were loaded.
        rule: Name and digest of the rule that samples follow; None for none. See ``with_rule``.
    """

    def __init__(
        self,
        files: loading.RunFiles,
        device: devices.Device,
        invocation: provenance.Invocation,
        number: int | str | None = None,
    ) -> None:
        """Loads the weights. JAX must have started on ``device``; ``number`` is that of ``devices.local``."""
        from hipgpt_jax.generation import scheduler

        model = files.checkpoint.model
        self.files = files
        self.device = device
        chosen = devices.local(number, per_replica=files.decoding.resolve_mesh(model))
        params = weights.read(files.checkpoint.weights, model)
        attention = device.attention(files.decoding.dtype, model.head_dim)
        self._scheduler = scheduler.Scheduler(model, params, files.decoding, attention, on=chosen)
        self.load_seconds = invocation.elapsed()
        self.recorder = recorder.Recorder(files, device, invocation, self.load_seconds)
        self.rule: str | None = None
        self._ruled: dict[Rule, Run] = {}
        self._has_generated = False

    def __repr__(self) -> str:
        return f"<Run {', '.join(f'{name} {fact}' for name, fact in self._facts().items())}>"

    def _repr_html_(self) -> str:
        return notebook.table(self._facts())

    def _facts(self) -> dict[str, object]:
        checkpoint, decoding = self.files.checkpoint, self.files.decoding
        facts: dict[str, object] = {
            "name": checkpoint.run,
            "step": checkpoint.step,
            "parameters": f"{weights.count(checkpoint.model) / 1e6:.1f}M",
            "vocabulary": checkpoint.model.vocab_size,
            "window": self.files.window,
            "dtype": decoding.dtype,
            "device": self.device,
        }
        return facts | ({"rule": self.rule} if self.rule else {})

    def with_rule(self, rule: "Rule") -> "Run":
        """Returns this run with a rule of the caller's own, applied to the logits before all sampling settings.

        Records name the rule and hold the SHA-256 of its source, not what it refers to. Only a run with the same rule
        replays them. The parameters are shared, and programs are compiled once per rule.

        Args:
            rule: A function ``f(logits_V, context_W, length) -> logits_V`` of JAX arrays: the logits of the next token,
                the ids in the window, zeros behind them, and their number. It must be pure: no randomness, no state.

        Raises:
            TypeError: It is not a function.
            ValueError: Its source cannot be read.
        """
        description = provenance.describe_rule(rule)
        if rule not in self._ruled:
            other = copy.copy(self)
            other.rule, other._ruled, other._has_generated = description, {}, False
            other._scheduler = self._scheduler.with_rule(rule)
            self._ruled[rule] = other
        return self._ruled[rule]

    def generate(
        self,
        prompts: str | Prompt | Iterable[str | Prompt],
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        num_samples: int = 1,
        rule: "Rule | None" = None,
        **more: Any,
    ) -> notebook.Records:
        """Generates from prompts and returns one record per sample, prompt by prompt.

        In a notebook, the list is shown as the page of ``hipgpt-inspect``, after its progress.

        Args:
            prompts: A text or a ``Prompt``, which may have settings of its own, or several of them.
            settings: Sampling settings; the defaults of ``hipgpt-generate`` if absent.
            seed: Seed in ``[0, 2**32)``.
            num_samples: Samples per prompt, from 1 to 2**32.
            rule: A function of the logits; see ``with_rule``.
            **more: Other fields of ``config.GenerationConfig``: ``num_tokens``, ``first_sample``, ``min_tokens``,
                ``eos_id``, ``stop``, ``top_logprobs``. Instead of ``settings`` also those of
                ``config.SamplingConfig``: ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty`` and so on.

        Raises:
            TypeError: A prompt is not a text, a keyword is unknown, or ``settings`` is given beside a field of it.
            ValueError: A prompt is empty and the run has no end token, two different ones have one id, or a value is
                out of range.
        """
        run = self if rule is None else self.with_rule(rule)
        records = run.records(prompts, settings, seed, num_samples, **more)
        compiles, run._has_generated = not run._has_generated, True
        return notebook.Records(notebook.progress(records, compiles=compiles))

    def records(
        self,
        prompts: str | Prompt | Iterable[str | Prompt],
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        num_samples: int = 1,
        rule: "Rule | None" = None,
        **more: Any,
    ) -> Iterator[record.Record]:
        """Yields the records of ``generate`` as samples end, for more samples than memory holds.

        Arguments and errors are those of ``generate``. An iterator of prompts is consumed as prompts are needed, so an
        error in one of them is raised when its turn comes.
        """
        if rule is not None:
            return self.with_rule(rule).records(prompts, settings, seed, num_samples, **more)
        sampling, generation = self._configs(settings, seed=seed, num_samples=num_samples, **more)
        if isinstance(prompts, (str, Prompt)):
            prompts = [prompts]
        if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, Mapping)):
            raise TypeError(f"prompts must be a text, a Prompt or several: got {config.shortened(prompts)}")
        if isinstance(prompts, Iterator):
            resolved = self.files.resolve_all(_distinct(prompts), sampling, generation)
        else:
            checked = [_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
            resolved = planning.Plan(self.files, checked, sampling, generation)
        return self.records_of(self.requests_of(resolved))

    def stream(
        self,
        prompt: str | Prompt,
        settings: config.SamplingConfig | None = None,
        seed: int = 0,
        sample: int = 0,
        rule: "Rule | None" = None,
        **more: Any,
    ) -> Stream:
        """Generates one of the samples of ``generate`` and returns its text piece by piece.

        Args:
            prompt: The text to continue.
            settings: As for ``generate``.
            seed: As for ``generate``.
            sample: Index of the sample among those of its prompt, in ``[0, 2**32)``.
            rule: As for ``generate``.
            **more: As for ``generate``, except ``num_samples`` and ``first_sample``.

        Raises:
            TypeError: As for ``generate``.
            ValueError: As for ``generate``, or ``sample`` is out of range.
        """
        sample = config.require_int("sample", sample, 0, "index among the samples of a prompt", config.MAX_SAMPLES - 1)
        if numbering := config.NUMBERING & more.keys():
            raise TypeError(f"a stream is of one sample: give its index as sample, not {min(numbering)}")
        defaults = self._configs(settings, seed=seed, **more)
        (resolved,) = planning.Plan(self.files, [_prompt(prompt, "prompt")], *defaults)
        run = self if rule is None else self.with_rule(rule)
        return Stream(run, next(run.requests_of([dataclasses.replace(resolved, samples=[sample])])))

    def score(
        self,
        texts: "str | Iterable[str | Sequence[int] | np.ndarray | record.Record]",
        stride: int | None = None,
        settings: config.SamplingConfig | None = None,
    ) -> "list[score.TextScore]":
        """Returns the log-probability of every token of each text but the first, which nothing predicts.

        Args:
            texts: Texts, or their token ids as lists or arrays, of at least two tokens each. Of a record, the prompt
                ids in the window and the generated ids are scored; the scores of the latter are those recorded.
            stride: Tokens by which the window moves in a text that is longer; that of generation if absent.
            settings: Sampling settings, under which ``sampled_logprobs`` are computed, too. The first token, or the
                prompt of a record, is the prompt whose tokens the penalties count.

        Raises:
            TypeError: ``texts`` is neither a text nor several, or ``settings`` is not a ``SamplingConfig``.
            ValueError: A text has fewer than two tokens, an id is not an integer or not in the vocabulary, or the
                stride is not an integer or out of range.
            FloatingPointError: A log-probability is infinite or NaN.
        """
        from hipgpt_jax.evaluation import score

        if not isinstance(texts, Iterable) or isinstance(texts, (bytes, bytearray, Mapping)):
            raise TypeError(f"texts must be a text or a list of texts or of ids: got {config.shortened(texts)}")
        if settings is not None:
            _require_sampling(settings)
        vocabulary, window = self.files.vocabulary, self.files.window
        several = [texts] if isinstance(texts, str) else list(texts)
        ids = [score.check_ids(self._ids_of(text), vocabulary.vocab_size) for text in several]
        number = self.files.decoding.window_stride if stride is None else config.as_int(stride)
        if number is None:
            raise ValueError(f"stride must be an integer: got {config.shortened(stride)}")
        model, params = self._scheduler.module, self._scheduler.params
        scores = [
            score.score_text(model, params, each, vocabulary=vocabulary, window=window, stride=number) for each in ids
        ]
        if settings is None:
            return scores
        settings = settings.with_ids(vocabulary.id_of, vocabulary.vocab_size)
        from hipgpt_jax.records import forced

        drawer = forced.Drawer(self._scheduler, number)
        prompts = [
            text.prompt_ids if isinstance(text, record.Record) else own[:1]
            for text, own in zip(several, ids, strict=True)
        ]
        return [
            dataclasses.replace(one, sampled_logprobs=drawer.sampled_logprobs(settings, prompt, one.ids))
            for prompt, one in zip(prompts, scores, strict=True)
        ]

    def score_choices(self, prompt: str | Prompt, choices: Iterable[str]) -> "list[score.ChoiceScore]":
        """Returns the log-probability of each of several texts after a prompt, as the model would generate it.

        Args:
            prompt: The text before the choices. Its tokens, and those of each choice, do not depend on one another, so
                a choice that continues a sentence begins with a space.
            choices: The texts, of at least one character each.

        Raises:
            TypeError: ``choices`` is not several texts.
            ValueError: There are no choices, one is empty, or the prompt is empty and the run has no end token.
            FloatingPointError: A log-probability is infinite or NaN.
        """
        from hipgpt_jax.evaluation import score

        several = [choices] if isinstance(choices, str) or not isinstance(choices, Iterable) else list(choices)
        if isinstance(choices, str) or not all(isinstance(choice, str) for choice in several):
            raise TypeError(f"choices must be several texts: got {config.shortened(choices)}")
        if not several or not all(several):
            raise ValueError(f"choices must be texts of at least one character: got {config.shortened(several)}")
        vocabulary = self.files.vocabulary
        before = self.files.encode(_prompt(prompt, "prompt"))[-self.files.window :]
        encoded = [tuple(vocabulary.encode(choice)) for choice in several]
        scored = self.score([(*before, *ids) for ids in encoded])
        return [
            score.ChoiceScore(
                text=choice,
                ids=ids,
                logprob=float(one.logprobs[-len(ids) :].sum(dtype="float64")),
                bytes=len(vocabulary.decode_bytes(ids)),
            )
            for choice, ids, one in zip(several, encoded, scored, strict=True)
        ]

    def next_token(
        self, prompt: str | Prompt, settings: config.SamplingConfig | None = None, **more: Any
    ) -> "score.NextToken":
        """Returns the distribution of the token after a prompt, before and after the sampling settings.

        Args:
            prompt: The prompt, which may have settings of its own.
            settings: Sampling settings; the defaults of ``hipgpt-generate`` if absent.
            **more: Fields of ``config.SamplingConfig`` instead.

        Raises:
            TypeError: The prompt is not a text, a keyword is unknown, or ``settings`` is given beside one.
            ValueError: The prompt is empty and the run has no end token, or a value is out of range.
        """
        from hipgpt_jax.evaluation import score
        from hipgpt_jax.records import forced

        if unknown := [name for name in more if name not in _SAMPLING]:
            raise TypeError(f"unknown keyword {unknown[0]!r}: the keywords are {', '.join(_SAMPLING)}")
        sampling, generation = self._configs(settings, **more)
        resolved = self.files.resolve(_prompt(prompt, "prompt"), sampling, generation)
        drawer = forced.Drawer(self._scheduler, self.files.decoding.window_stride)
        (request,) = self.requests_of([dataclasses.replace(resolved, samples=[0])])
        return score.NextToken.of(*drawer.distribution(request), self.files.vocabulary)

    def evaluate(self, ids: "np.ndarray", *, text_bytes: int, stride: int) -> "score.Score":
        """Returns the mean score of every token of a long text but the first; see ``score.Windows``.

        Args:
            ids: Token ids of the text, at least two.
            text_bytes: Bytes of text of the ids after the first.
            stride: Tokens from one window to the next.

        Raises:
            FloatingPointError: The loss is infinite or NaN.
        """
        from hipgpt_jax.evaluation import score

        length = self.files.window
        found = score.evaluate(
            self._scheduler.module,
            self._scheduler.params,
            ids,
            text_bytes=text_bytes,
            batch_size=score.rows_of(length),
            length=length,
            stride=stride,
        )
        return score.check_finite(found)

    def requests_of(self, prompts: Iterable[loading.ResolvedPrompt]) -> Iterator[requests.Request]:
        """Yields the requests of the samples of each prompt, prompt by prompt."""
        for prompt in prompts:
            for sample in prompt.generation.samples if prompt.samples is None else prompt.samples:
                yield requests.Request(
                    id=prompt.id,
                    prompt=prompt.prompt,
                    prompt_ids=prompt.prompt_ids,
                    sample=sample,
                    generation=prompt.generation,
                    sampling=prompt.sampling,
                    rule=self.rule,
                )

    def request_of(self, recorded: record.Record) -> requests.Request:
        """Returns the request that regenerates a record, with as few tokens as ``compare`` needs.

        Raises:
            ValueError: This run cannot have made the record.
        """
        request, vocabulary = replay.request(recorded), self.files.vocabulary
        self._check_made(recorded)
        self._scheduler.check(request)
        if request.rule != self.rule:
            theirs, own = (f"the rule {rule}" if rule else "no rule" for rule in (request.rule, self.rule))
            raise ValueError(f"it follows {theirs}, and this run {own}: replay it in Python, by run.with_rule")
        if recorded.ids and max(recorded.ids) >= vocabulary.vocab_size:
            raise ValueError(f"it has ids beyond the vocabulary's size {vocabulary.vocab_size}")
        prompt = vocabulary.decode(recorded.prompt_ids)
        return dataclasses.replace(replay.shortened(request, recorded), prompt=prompt)

    def _check_made(self, recorded: record.Record) -> None:
        """Raises ValueError if a record names other files or another context than those of this run."""
        checkpoint, decoding = self.files.checkpoint, self.files.decoding
        for kind, old, new in (
            ("weights", recorded.run.weights_sha256, checkpoint.weights_sha256),
            ("tokenizer", recorded.run.tokenizer_sha256, checkpoint.tokenizer_sha256),
        ):
            if old != new:
                raise ValueError(f"other {kind}: sha256 {old} in the record, {new} in {checkpoint.directory}")
        own = {
            "window": self.files.window,
            "window_stride": decoding.window_stride,
            "overflow": decoding.overflow,
        }
        for name, new in own.items():
            if (old := getattr(recorded.settings, name)) != new:
                raise ValueError(
                    f"other {name}: {old} in the record, {new} in this run: load the run with "
                    f"decoding=DecodingConfig({name}={old!r})"
                )

    def compare(self, recorded: record.Record, regenerated: record.Record) -> "comparison.Comparison":
        """Compares a record with the one that ``records_of`` yields for its request."""
        from hipgpt_jax.records import comparison

        return comparison.Judge(self._scheduler, self.files.vocabulary).compare(recorded, regenerated)

    def screen(self, recorded: record.Record) -> "comparison.Screening":
        """Feeds a record's ids to the model, draws each again, and compares them: much faster than generating them.

        Raises:
            ValueError: This run cannot have made the record, or it ended with an error.
        """
        from hipgpt_jax.records import comparison, forced

        self.request_of(recorded)  # checks that
        if recorded.error is not None:
            raise ValueError("it ended with an error, which only an exact replay repeats")
        drawer = forced.Drawer(self._scheduler, self.files.decoding.window_stride)
        draws = drawer.draw(replay.request(recorded), recorded.ids)
        return comparison.Judge(self._scheduler, self.files.vocabulary).screen(recorded, draws)

    def records_of(self, samples: Iterable[requests.Request]) -> Iterator[record.Record]:
        """Generates samples and yields their records in order."""
        for output in requests.in_order(self.outputs(samples)):
            if output.finish_reason is not None:
                yield self.recorder.build(output.sequence)

    def outputs(self, samples: Iterable[requests.Request], *, measure: bool = True) -> Iterator[requests.Output]:
        """Yields the outputs of samples as they are generated; ``measure`` is needed for their records.

        Raises:
            MemoryError: The memory is too small for the batch size.
        """
        try:
            yield from self._scheduler.run(samples, self.files.vocabulary, measure=measure)
        except (MemoryError, RuntimeError) as error:
            # XLA raises its own kind of RuntimeError.
            if not isinstance(error, MemoryError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            size = f"{self.files.decoding.batch_size} slots and a window of {self.files.window} tokens"
            raise MemoryError(
                f"batch_size must be smaller: {size} exceed the memory ({error or type(error).__name__})"
            ) from error

    def _configs(
        self, settings: config.SamplingConfig | None, **values: Any
    ) -> tuple[config.SamplingConfig, config.GenerationConfig]:
        """Returns the keywords of a call as configs; the default end token is that of the run."""
        if unknown := [name for name in values if name not in (*_SAMPLING, *_GENERATION)]:
            raise TypeError(f"unknown keyword {unknown[0]!r}: the keywords are {', '.join((*_GENERATION, *_SAMPLING))}")
        sampling = {name: values.pop(name) for name in _SAMPLING if name in values}
        if settings is None:
            settings = config.SamplingConfig(**sampling)
        else:
            _require_sampling(settings)
            if sampling:
                raise TypeError(f"settings and {next(iter(sampling))} are both given: give one of them")
        return settings, config.GenerationConfig(**{"eos_id": self.files.checkpoint.eos_id, **values})

    def _ids_of(self, text: Any) -> Any:
        if isinstance(text, record.Record):
            return (*text.prompt_ids[-self.files.window :], *text.ids)
        return self.files.vocabulary.encode(text) if isinstance(text, str) else text


def load_run(
    name: str,
    step: int | str | None = None,
    device: str = "auto",
    decoding: config.DecodingConfig | None = None,
    where: str | Path | None = None,
    devices: int | str | None = None,
) -> Run:
    """Loads a run: one in ``checkpoints/``, else one of the package.

    If JAX's persistent compilation cache is enabled in this process, its entries are checked.

    Args:
        name: Name of the run, or the path of its directory.
        step: Training step, ``best`` or ``latest``; the latest if absent.
        device: One of ``devices.DEVICES``. JAX must not have started on another one already.
        decoding: Window, stride, overflow rule, batch size, dtype and mesh; the defaults of ``hipgpt-generate`` if
            absent.
        where: Directory of the run, if it is not in ``checkpoints/``.
        devices: Number of devices, or ``all``. Each has ``batch_size`` samples of its own, and they are the same as
            those of one device. As many as a model needs if absent.

    Raises:
        TypeError: An argument has the wrong type.
        FileNotFoundError: The run, the step or a file does not exist.
        ValueError: A file is not the one named by the run's config, or JAX has no such device or number of devices.
    """
    for argument, value, kinds in (
        ("name", name, str),
        ("device", device, str),
        ("decoding", decoding, (config.DecodingConfig, type(None))),
        ("where", where, (str, os.PathLike, type(None))),
    ):
        if not isinstance(value, kinds):
            raise TypeError(f"{argument} is of the wrong type: got {config.shortened(value)}")
    if isinstance(step, str):
        step = directory.parse_step(step)
    elif step is not None:
        step = config.require_int("step", step, 0, "a training step, best or latest")
    files.require_local("name" if where is None else "where", name if where is None else where)
    invocation = provenance.Invocation()
    name, path = directory.parse_run(name) if where is None else (name, Path(where))
    run_files = loading.open_run(name, step, decoding or config.DecodingConfig(), path)
    started = _start(device)
    compilation.check_cache(_LOG.warning)
    return Run(run_files, started, invocation, devices)


def _start(device: str) -> devices.Device:
    return devices.start(device, _LOG.info)


def read_records(path: str | os.PathLike[str]) -> Iterator[record.Record]:
    """Yields the records of a file, except a last line that was cut short.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The path is a URL, or a line is not a record of this version's schema and contract.
    """
    files.require_local("path", path)
    return record.read(Path(path))


def _require_sampling(settings: object) -> None:
    if not isinstance(settings, config.SamplingConfig):
        raise TypeError(f"settings must be a SamplingConfig: got {config.shortened(settings)}")


def _prompt(prompt: object, name: str) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if not isinstance(prompt, str):
        raise TypeError(f"{name} must be a text or a Prompt: got {config.shortened(prompt)}")
    return Prompt(text=prompt)


def _distinct(prompts: Iterable[str | Prompt]) -> Iterator[Prompt]:
    """Yields prompts; raises ValueError if two different ones have one id."""
    digests: dict[int, int] = {}  # hashes, which take 64 bits each
    for number, each in enumerate(prompts, 1):
        prompt = _prompt(each, f"prompt {number}")
        if prompt.id is not None and digests.setdefault(hash(prompt.id), hash(prompt.digest)) != hash(prompt.digest):
            raise ValueError(f"prompt {number}: id {config.shortened(prompt.id)} is that of a different prompt too")
        yield prompt
