"""The configuration and the request that regenerate a record."""

import dataclasses

from hipgpt_jax import config
from hipgpt_jax.generation import requests
from hipgpt_jax.records import record

# The engine allocates KV cache for every slot, however few records there are.
MAX_BATCH_SIZE = 4096
_INVARIANT_BATCH_SIZE = 16  # of records whose tokens do not depend on it


def decoding_config(
    recorded: record.Record, batch_size: int | None = None, mesh: str | None = None
) -> config.DecodingConfig:
    """Returns the decoding configuration of a record.

    Args:
        recorded: The record.
        batch_size: Batch size that replaces the record's.
        mesh: Mesh that replaces the record's.

    Raises:
        ValueError: A value is out of range, or the record's batch size is above ``MAX_BATCH_SIZE``.
    """
    recorded_size = recorded.numerics.batch_size
    if batch_size is None:
        batch_size = _INVARIANT_BATCH_SIZE if recorded_size is None else recorded_size
        if batch_size > MAX_BATCH_SIZE:
            raise ValueError(
                f"batch_size must be at most {MAX_BATCH_SIZE} to be replayed: got {batch_size}. "
                f"Choose another batch_size for the replay"
            )
    decoding, _, _ = recorded.settings.configs()
    numerics = "invariant" if recorded_size is None else "fast"
    return dataclasses.replace(
        decoding,
        batch_size=batch_size,
        dtype=recorded.numerics.dtype,
        numerics=numerics,
        mesh=recorded.numerics.mesh if mesh is None else mesh,
    )


def request(recorded: record.Record) -> requests.Request:
    """Returns the request that a record answers.

    Raises:
        ValueError: A setting is out of range.
    """
    _, generation, sampling = recorded.settings.configs()
    return requests.Request(
        id=recorded.id,
        prompt=recorded.prompt,
        prompt_ids=recorded.prompt_ids,
        sample=recorded.sample,
        generation=dataclasses.replace(generation, seed=recorded.seed),
        sampling=sampling,
        rule=recorded.settings.rule,
    )


def shortened(asked: requests.Request, recorded: record.Record) -> requests.Request:
    """Returns a request with the fewest tokens that decide whether the record is true: one more than it holds.

    The extra token is generated only if the record ends too early. ``num_tokens`` of a forged record can be any number.
    """
    num_tokens = min(asked.generation.num_tokens, len(recorded.ids) + 1)
    return dataclasses.replace(asked, generation=dataclasses.replace(asked.generation, num_tokens=num_tokens))


def window_start(prompt_length: int, length: int, window: int, stride: int) -> int:
    """Returns the index of the oldest token in the window, for a prompt and text of ``length`` tokens together.

    The window begins with the last ``window`` tokens of the prompt; each time it overflows, ``stride`` tokens are
    dropped.
    """
    start = max(0, prompt_length - window)
    overflow = max(0, length - start - window)
    return start - -overflow // stride * stride


def unused_settings(recorded: record.Record) -> tuple[str, ...]:
    """Returns the settings without effect on a sample: other values would have given the same one.

    Settings at their neutral value are not among them. A stop string or an end token that did not occur is: the sample
    shows no more than that it did not occur.
    """
    settings, prompt_length = recorded.settings, len(recorded.prompt_ids)
    last = window_start(prompt_length, prompt_length + len(recorded.ids) - 1, settings.window, settings.window_stride)
    has_rolled = last > max(0, prompt_length - settings.window)
    is_full = (
        settings.overflow == "stop" and recorded.finish_reason == "length" and len(recorded.ids) < settings.num_tokens
    )
    is_greedy = settings.temperature == 0
    unused = {
        "window": not (has_rolled or is_full or recorded.prompt_dropped),
        "window_stride": not has_rolled,
        "overflow": not (has_rolled or is_full),
        "eos_id": settings.eos_id >= 0 and recorded.finish_reason != "eos",
        "stop": settings.stop != () and recorded.finish_reason != "stop",
        "seed": is_greedy,
        "top_k": is_greedy and settings.top_k > 0,
        "top_p": is_greedy and settings.top_p < 1,
        "min_p": is_greedy and settings.min_p > 0,
    }
    return tuple(name for name, is_unused in unused.items() if is_unused)
