"""From samples to records."""

import functools
import os
import platform
from collections.abc import Iterable
from typing import Any

import numpy as np

from hipgpt_jax import config, devices, numerics
from hipgpt_jax.generation import samples
from hipgpt_jax.records import provenance, record, writer
from hipgpt_jax.runs import loading


class Recorder:
    """Makes the records of samples drawn from one run on one device."""

    def __init__(
        self, run: loading.Source, device: devices.Device, origin: provenance.Origin, load_seconds: float
    ) -> None:
        """Notes what all records of a program share.

        Args:
            run: What is generated from.
            device: What it is computed on.
            origin: The program.
            load_seconds: From its start to the loaded model.
        """
        self._source = run
        self._origin = origin
        self._load_seconds = load_seconds
        checkpoint = run.checkpoint
        self._run = record.Run(
            name=checkpoint.run,
            step=checkpoint.step,
            weights_sha256=checkpoint.weights_sha256,
            tokenizer_sha256=checkpoint.tokenizer_sha256,
            config_sha256=checkpoint.config_sha256,
        )
        self._numerics = record.Numerics(
            platform=device.platform,
            device_kind=device.kind,
            machine=platform.machine(),
            processor=numerics.processor(),
            instruction_sets=numerics.instruction_sets(),
            cores=numerics.cores(),
            dtype=run.decoding.dtype,
            attention=device.attention(run.decoding.dtype, checkpoint.model.head_dim),
            decode_width=run.decoding.width,
            xla_flags=provenance.without_directories(os.environ.get("XLA_FLAGS", "")),
            environment=tuple(map(provenance.without_directories, numerics.environment())),
        )
        self._on_cpu = device.platform == "cpu"

    def describe(self, sample: samples.Sample) -> record.Record:
        """Returns the record of a sample that has ended and was measured."""
        request = sample.job.request
        numbers_4T = np.array([fact.numbers_4 for fact in sample.facts], np.float32).reshape(-1, 4).T
        return record.Record(
            id=sample.job.id,
            sample=request.sample,
            seed=request.generation.seed,
            prompt=sample.job.prompt,
            prompt_ids=request.prompt_ids,
            prompt_dropped=max(0, len(request.prompt_ids) - self._source.window),
            ids=tuple(sample.ids),
            tokens=tuple(sample.tokens),
            text=sample.text,
            finish_reason=str(sample.finish_reason),
            stop=sample.stop,
            error=sample.error,
            logprobs=_float32(numbers_4T[0]),
            ranks=tuple(numbers_4T[1].astype(int).tolist()),
            margins=_float32(numbers_4T[2]),
            gaps=_float32(numbers_4T[3]),
            top_logprobs=self._alternatives(sample),
            settings=self._settings(request.generation, request.sampling),
            run=self._run,
            numerics=self._numerics,
            versions=self._versions,
            argv=self._origin.argv,
            started=self._started,
            timings=record.Timings(
                load=round(self._load_seconds, 6),
                first_token=None if sample.first_token is None else round(sample.first_token, 6),
                total=round(sample.total, 6),
            ),
        )

    def about(self) -> dict[str, Any]:
        """Returns what every record says of its making, as a record's JSON has it."""
        parts = {"run": self._run, "numerics": self._numerics, "versions": self._versions}
        return {
            **{name: vars(part) for name, part in parts.items()},
            "argv": self._origin.argv,
            "started": self._started,
        }

    def shared_basis(self) -> dict[str, Any]:
        """Returns ``writer.shared_basis`` of the records."""
        settings = self._settings(config.GenerationConfig(), config.SamplingConfig())
        parts = {"settings": settings, "run": self._run, "numerics": self._numerics}
        return writer.shared_basis({name: vars(part) for name, part in parts.items()})

    @property
    def _started(self) -> str:
        return self._origin.started.strftime("%Y-%m-%dT%H:%M:%SZ")

    @functools.cached_property
    def _versions(self) -> provenance.Versions:
        plugins = None if self._on_cpu else ", ".join(devices.plugins())
        return provenance.versions(plugins)

    def _settings(self, generation: config.GenerationConfig, sampling: config.SamplingConfig) -> record.Settings:
        return record.Settings(
            num_tokens=generation.num_tokens,
            **vars(sampling),
            eos_id=generation.eos_id,
            stop=generation.stop,
            window=self._source.window,
            window_stride=self._source.decoding.window_stride,
            overflow=self._source.decoding.overflow,
            top_logprobs=generation.top_logprobs,
        )

    def _alternatives(self, sample: samples.Sample) -> tuple[tuple[tuple[int, float, str], ...], ...] | None:
        count = sample.job.request.generation.top_logprobs
        if not count:
            return None
        show = self._source.vocabulary.show
        return tuple(
            tuple(
                (token_id, logprob, show(token_id))
                for token_id, logprob in zip(fact.top[0][:count].tolist(), _float32(fact.top[1][:count]), strict=True)
            )
            for fact in sample.facts
        )


def _float32(values: Iterable[np.float32]) -> tuple[float, ...]:
    """Numbers with the fewest digits that are theirs in float32."""
    return tuple(map(float, map(str, values)))
