"""Regeneration of a record: the request, the settings and the engine's configuration that it asks for."""

import dataclasses

from hipgpt_jax import config
from hipgpt_jax.generation import events
from hipgpt_jax.records import record

# An engine allocates a cache row for each of a record's decode width, whatever number of records there is.
MAX_WIDTH = 4096


def sampling_of(recorded: record.Record) -> config.SamplingConfig:
    """Returns the sampling settings of a record."""
    settings = recorded.settings
    return config.SamplingConfig(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
    )


def generation_of(recorded: record.Record) -> config.GenerationConfig:
    """Returns the generation settings of a record."""
    settings = recorded.settings
    return config.GenerationConfig(
        num_tokens=settings.num_tokens,
        num_samples=recorded.sample + 1,
        seed=recorded.seed,
        eos_id=settings.eos_id,
        stop=settings.stop,
        top_logprobs=settings.top_logprobs,
    )


def request_of(recorded: record.Record) -> events.Request:
    """Returns the request that a record is the answer to."""
    return events.Request(
        prompt_ids=recorded.prompt_ids,
        sample=recorded.sample,
        generation=generation_of(recorded),
        sampling=sampling_of(recorded),
    )


def shortened(request: events.Request, recorded: record.Record) -> events.Request:
    """Returns the request with as few tokens as decide whether the record is true.

    That is one more than it holds: where the record ends too early, there is one. ``num_tokens`` itself may be any
    number in a record that was forged.
    """
    most = min(request.generation.num_tokens, len(recorded.ids) + 1)
    return dataclasses.replace(request, generation=dataclasses.replace(request.generation, num_tokens=most))


def decoding_of(recorded: record.Record, width: int | None = None) -> config.DecodingConfig:
    """Returns the decoding configuration of a record.

    Args:
        recorded: The record.
        width: Batch size to use instead of the record's.

    Raises:
        ValueError: A value is out of its range, or the record's batch size is too large to allocate blindly.
    """
    settings = recorded.settings
    if width is None and recorded.numerics.decode_width > MAX_WIDTH:
        raise ValueError(
            f"decode_width must be at most {MAX_WIDTH} to be replayed: got {recorded.numerics.decode_width}. "
            f"Choose another batch_size for the replay"
        )
    return config.DecodingConfig(
        window=settings.window,
        window_stride=settings.window_stride,
        overflow=settings.overflow,
        width=recorded.numerics.decode_width if width is None else width,
        dtype=recorded.numerics.dtype,
    )


def window_start(recorded: record.Record, length: int) -> int:
    """Returns the index of the oldest token in the window when the prompt and the text are ``length`` tokens.

    A prompt's last ``window`` tokens are read; then ``window_stride`` tokens are dropped whenever the window overflows.
    """
    window, stride = recorded.settings.window, recorded.settings.window_stride
    start = max(0, len(recorded.prompt_ids) - window)
    beyond = max(0, length - start - window)
    return start - -beyond // stride * stride


def not_exercised(recorded: record.Record) -> tuple[str, ...]:
    """Returns the settings that had no part in a sample: with other values of them it would be the same.

    Values that are off are not among them. A stop string or an end token that never came is: the sample shows only
    that it did not come.
    """
    settings, length = recorded.settings, len(recorded.prompt_ids) + len(recorded.ids)
    has_rolled = window_start(recorded, length - 1) > max(0, len(recorded.prompt_ids) - settings.window)
    is_full = (
        settings.overflow == "stop" and recorded.finish_reason == "length" and len(recorded.ids) < settings.num_tokens
    )
    is_cut = recorded.prompt_dropped > 0
    unused = {
        "window": not (has_rolled or is_full or is_cut),
        "window_stride": not has_rolled,
        "overflow": not (has_rolled or is_full),
        "eos_id": settings.eos_id >= 0 and recorded.finish_reason != "eos",
        "stop": bool(settings.stop) and recorded.finish_reason != "stop",
        "seed": settings.temperature == 0,
        "top_k": settings.temperature == 0 and settings.top_k > 0,
        "top_p": settings.temperature == 0 and settings.top_p < 1,
    }
    return tuple(name for name, is_unused in unused.items() if is_unused)
