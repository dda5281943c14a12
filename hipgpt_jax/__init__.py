"""GPT-2-style models on your own text, with generation that can be replayed token for token.

Importing the package imports no JAX: what needs it is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hipgpt_jax.version import __version__ as __version__

__all__ = [
    "DecodingConfig",
    "Prompt",
    "Record",
    "Run",
    "SamplingConfig",
    "__version__",
    "load_run",
    "read_records",
    "train",
]

if TYPE_CHECKING:
    from hipgpt_jax.api import Prompt as Prompt
    from hipgpt_jax.api import Run as Run
    from hipgpt_jax.api import load_run as load_run
    from hipgpt_jax.api import read_records as read_records
    from hipgpt_jax.cli.train import train as train
    from hipgpt_jax.config import DecodingConfig as DecodingConfig
    from hipgpt_jax.config import SamplingConfig as SamplingConfig
    from hipgpt_jax.records.record import Record as Record

_HOMES = {
    "Prompt": "hipgpt_jax.api",
    "Record": "hipgpt_jax.records.record",
    "Run": "hipgpt_jax.api",
    "load_run": "hipgpt_jax.api",
    "read_records": "hipgpt_jax.api",
    "train": "hipgpt_jax.cli.train",
    "DecodingConfig": "hipgpt_jax.config",
    "SamplingConfig": "hipgpt_jax.config",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
