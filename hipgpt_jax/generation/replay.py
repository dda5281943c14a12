"""A record against the sample made anew from it."""

import dataclasses

from hipgpt_jax import config
from hipgpt_jax.runs import record

# How far the logits of two ways to compute the same may lie apart. In float32 the widths of a decode step
# differed by up to 2e-5 on a CPU, and GPT-2 by up to 1e-4 from another framework.
_TOLERANCE = {"float32": 2e-4, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a sample made anew first departs from its record.

    Attributes:
        place: Index of the first token that differs.
        recorded: The id in the record; None where it ends there.
        found: The id made anew; None where that ends there.
        margin: The record's margin there; None where it has none.
        gap: The record's gap there.
        is_rounding: Whether margin or gap is so small that rounding explains the difference.
    """

    place: int
    recorded: int | None
    found: int | None
    margin: float | None
    gap: float | None
    is_rounding: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What became of a record.

    Attributes:
        recorded: The record.
        found: The sample made anew.
        difference: The first one; None where all tokens and the end are the same.
        logprob_error: Largest difference of a log-probability before it, in nats.
        altered: Fields of the record that do not belong to its ids: someone has changed them.
    """

    recorded: record.Record
    found: record.Record
    difference: Difference | None
    logprob_error: float
    altered: tuple[str, ...]


def compare(recorded: record.Record, found: record.Record) -> Comparison:
    """Compares a record with the sample made anew, token by token."""
    pairs = list(zip(recorded.ids, found.ids, strict=False))
    place = next((i for i, (old, new) in enumerate(pairs) if old != new), len(pairs))
    pairs_of_logprobs = zip(recorded.logprobs[:place], found.logprobs[:place], strict=True)
    error = max((abs(old - new) for old, new in pairs_of_logprobs), default=0.0)
    ends_differ = (recorded.finish_reason, len(recorded.ids)) != (found.finish_reason, len(found.ids))
    differs = place < len(pairs) or ends_differ
    return Comparison(
        recorded=recorded,
        found=found,
        difference=_difference(recorded, found, place) if differs else None,
        logprob_error=error,
        altered=() if differs else _altered(recorded, found, error),
    )


def _altered(recorded: record.Record, found: record.Record, error: float) -> tuple[str, ...]:
    names = ["prompt", "prompt_dropped", "tokens", "text", "stop"]
    if error == 0 and recorded.numerics == found.numerics:
        names += ["ranks", "margins", "gaps"]
    altered = [name for name in names if getattr(recorded, name) != getattr(found, name)]
    if error > _TOLERANCE[recorded.numerics.dtype]:
        altered.append("logprobs")
    return tuple(altered)


def sampling_of(recorded: record.Record) -> config.SamplingConfig:
    """Returns how the record's tokens were chosen."""
    settings = recorded.settings
    return config.SamplingConfig(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
    )


def generation_of(recorded: record.Record) -> config.GenerationConfig:
    """Returns what the record's sample was asked to be."""
    settings = recorded.settings
    return config.GenerationConfig(
        num_tokens=settings.num_tokens,
        num_samples=recorded.sample + 1,
        seed=recorded.seed,
        eos_id=settings.eos_id,
        stop=settings.stop,
        top_logprobs=settings.top_logprobs,
    )


def decoding_of(recorded: record.Record, width: int | None = None) -> config.DecodingConfig:
    """Returns the window, the type and the width of the record, or another width."""
    settings = recorded.settings
    return config.DecodingConfig(
        window=settings.window,
        window_stride=settings.window_stride,
        overflow=settings.overflow,
        width=recorded.numerics.decode_width if width is None else width,
        dtype=recorded.numerics.dtype,
    )


def _difference(recorded: record.Record, found: record.Record, place: int) -> Difference:
    margin = recorded.margins[place] if place < len(recorded.margins) else None
    gap = recorded.gaps[place] if place < len(recorded.gaps) else None
    tolerance = _TOLERANCE[recorded.numerics.dtype]
    # A draw divides the logits by the temperature, and so the error in them.
    spread = tolerance / min(1.0, recorded.settings.temperature or 1.0)
    return Difference(
        place=place,
        recorded=recorded.ids[place] if place < len(recorded.ids) else None,
        found=found.ids[place] if place < len(found.ids) else None,
        margin=margin,
        gap=gap,
        is_rounding=margin is not None and gap is not None and (margin <= spread or gap <= 2 * tolerance),
    )
