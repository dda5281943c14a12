"""Builds the record of a generated sample."""

import functools
import platform
from typing import Any

from hipgpt_jax import config, devices, numerics
from hipgpt_jax.generation import requests
from hipgpt_jax.records import provenance, record, writer
from hipgpt_jax.runs import loading


class Recorder:
    """Builds records of samples from one run on one device."""

    def __init__(
        self, files: loading.RunFiles, device: devices.Device, invocation: provenance.Invocation, load_seconds: float
    ) -> None:
        """Collects the fields that all records have in common.

        Args:
            files: The run.
            device: Device that computes the samples.
            invocation: The command.
            load_seconds: Time from the start of the command until the model was loaded.
        """
        checkpoint, decoding = files.checkpoint, files.decoding
        self._files, self._invocation, self._load_seconds = files, invocation, load_seconds
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
            dtype=decoding.dtype,
            attention=device.attention(decoding.dtype, checkpoint.model.head_dim),
            batch_size=None if decoding.numerics == "invariant" else decoding.batch_size,
            xla_flags=numerics.xla_flags(),
            environment=numerics.environment(),
            mesh=decoding.mesh,
        )

    def build(self, sequence: requests.Sequence) -> record.Record:
        """Returns the record of a finished sequence with token statistics."""
        request = sequence.request
        return record.Record(
            id=request.id,
            sample=request.sample,
            seed=request.generation.seed,
            prompt=request.prompt,
            prompt_ids=request.prompt_ids,
            prompt_dropped=max(0, len(request.prompt_ids) - self._files.window),
            ids=tuple(sequence.ids),
            tokens=tuple(sequence.tokens),
            text=sequence.text,
            finish_reason=str(sequence.finish_reason),
            stop=sequence.stop,
            error=sequence.error,
            logprobs=record.shortest(one.logprob for one in sequence.stats),
            ranks=tuple(int(one.rank) for one in sequence.stats),
            sampled_logprobs=record.shortest(one.sampled_logprob for one in sequence.stats),
            kept=tuple(int(one.kept) for one in sequence.stats),
            kept_mass=record.shortest(one.kept_mass for one in sequence.stats),
            leads=record.shortest(one.lead for one in sequence.stats),
            cuts=record.shortest(one.cut for one in sequence.stats),
            top_logprobs=self._top_logprobs(sequence),
            settings=self._settings(request.generation, request.sampling, request.rule),
            run=self._run,
            numerics=self._numerics,
            versions=self._versions,
            argv=self._invocation.argv,
            started=self._started,
            timings=record.Timings(
                load=round(self._load_seconds, 6),
                first_token=None if sequence.first_token is None else round(sequence.first_token, 6),
                total=round(sequence.total, 6),
            ),
        )

    def common_fields(self) -> dict[str, Any]:
        """Returns the fields that all records have in common, as in their JSON."""
        return {
            "run": vars(self._run),
            "numerics": self._numerics.fields(),
            "versions": vars(self._versions),
            "argv": self._invocation.argv,
            "started": self._started,
        }

    def shared_fingerprint(self) -> writer.Fingerprint:
        """Returns ``writer.shared_fingerprint`` of the records."""
        settings = self._settings(config.GenerationConfig(), config.SamplingConfig(), None)
        return writer.shared_fingerprint(settings, self._run, self._numerics)

    @property
    def _started(self) -> str:
        return self._invocation.started.strftime("%Y-%m-%dT%H:%M:%SZ")

    @functools.cached_property
    def _versions(self) -> provenance.Versions:
        return provenance.versions(None if self._numerics.platform == "cpu" else ", ".join(devices.plugins()))

    def _settings(
        self, generation: config.GenerationConfig, sampling: config.SamplingConfig, rule: str | None
    ) -> record.Settings:
        return record.Settings.of(self._files.decoding, generation, sampling, self._files.window, rule)

    def _top_logprobs(self, sequence: requests.Sequence) -> tuple[tuple[tuple[int, float, str], ...], ...] | None:
        count = sequence.request.generation.top_logprobs
        if not count:
            return None
        show = self._files.vocabulary.show
        return tuple(
            tuple(
                (token, logprob, show(token))
                for token, logprob in zip(ids.tolist(), record.shortest(logprobs), strict=True)
            )
            for ids, logprobs in (one.top_logprobs(count) for one in sequence.stats)
        )
