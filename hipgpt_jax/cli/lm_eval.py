"""Runs as models of lm-evaluation-harness: ``python -m hipgpt_jax.cli.lm_eval run --model hipgpt``.

It takes the command line of ``lm_eval``. Samples are the package's own: the same weights, context, settings and seed
give the same text.
"""

import collections
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from hipgpt_jax import api, config
from hipgpt_jax.generation import requests as generation_requests

# Imported by name, as type checkers of this package do not have the harness.
try:
    _main, _utils, _model_utils, _model, _registry = (
        importlib.import_module(f"lm_eval.{name}")
        for name in ("__main__", "utils", "models.utils", "api.model", "api.registry")
    )
except ImportError as error:
    sys.exit(f"lm_eval: error: {error}. lm-evaluation-harness is an extra: pip install -e '.[lm-eval]'")

_Instance = Any
_Request = tuple[tuple[str, str], list[int], list[int]]
_NEUTRAL = config.SamplingConfig(top_k=0, top_p=1.0, repetition_penalty=1.0)


@_registry.register_model("hipgpt")
class HipGPT(_model.TemplateLM):
    """A run of this package."""

    def __init__(
        self,
        run: str,
        step: int | str | None = None,
        seed: int | None = None,
        dtype: str = "float32",
        numerics: str = "fast",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Loads a run.

        Args:
            run: Name of the run.
            step: Training step, or ``best``; the latest if absent.
            seed: Seed of samples; if absent, the one that the harness gave NumPy, the second of its ``--seed``.
            dtype: Compute dtype.
            numerics: ``fast``, or ``invariant`` to the batch size.
            max_length: Window in tokens; the run's own if absent.
            max_gen_toks: Number of new tokens if a task does not set it.
            prefix_token_id: Token that texts without a context follow; the run's end token if absent.
            batch_size: Samples decoded side by side. Scores are computed one by one.
            device: Device, as for ``hipgpt-generate``. ``cuda:0``, the default of the harness, means ``auto``.
            max_batch_size: Not used.
        """
        super().__init__()
        del max_batch_size
        width = config.as_int(int(batch_size) if str(batch_size).isdigit() else batch_size)
        if width is None:
            raise ValueError(f"batch_size must be a number: got {batch_size!r}")
        decoding = config.DecodingConfig(window=max_length, batch_size=width, dtype=dtype, numerics=numerics)
        self._run = api.load_run(
            str(run), step, device="auto" if device in (None, "cuda:0") else device, decoding=decoding
        )
        numpy_state: Any = np.random.get_state()
        self._seed = int(numpy_state[1][0]) if seed is None else seed
        self._max_gen_toks, self._prefix_token_id = max_gen_toks, prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """End token of the run."""
        return self._run.files.checkpoint.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token that a text without a context follows."""
        found = self.eot_token_id if self._prefix_token_id is None else self._prefix_token_id
        if found < 0:
            raise ValueError(
                f"run {self._run.files.checkpoint.run!r} has no end token for texts without a context to follow: give "
                f"--model_args prefix_token_id=ID"
            )
        return found

    @property
    def tokenizer_name(self) -> str:
        """Digest of the tokenizer."""
        return self._run.files.checkpoint.tokenizer_sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text."""
        del add_special_tokens, kwargs
        return list(self._run.files.vocabulary.encode(string))

    def loglikelihood_rolling(self, requests: list[_Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text, in windows that do not overlap."""
        del disable_tqdm
        return [sum(value for value, _ in self._loglikelihood_tokens(self._windows(*each.args))) for each in requests]

    def _windows(self, text: str) -> list[_Request]:
        windows = _utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._run.files.window,
            context_len=1,
        )
        return [(("", text), *_utils.make_disjoint_window(window)) for window in windows]

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is what greedy decoding gives."""
        del kwargs
        return [self._score(context, continuation) for _, context, continuation in requests]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        window, count = self._run.files.window, len(continuation)
        if not 0 < count <= window:
            raise ValueError(f"a continuation must have at least one token and fit the window of {window}: got {count}")
        (scored,) = self._run.score([[*context, *continuation][-(window + 1) :]], stride=window)
        return float(scored.logprobs[-count:].astype(np.float64).sum()), bool((scored.ranks[-count:] == 1).all())

    def generate_until(self, requests: list[_Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns a continuation of each context.

        Settings that a task does not give are neutral, and the most likely token is taken unless it asks to sample.
        Equal requests get samples 0, 1, … of their prompt.
        """
        del disable_tqdm
        seen: collections.Counter[tuple[Any, ...]] = collections.Counter()
        samples = []
        for each in requests:
            asked = self._request(*each.args)
            key = asked.prompt_ids, asked.generation, asked.sampling
            samples.append(dataclasses.replace(asked, sample=seen[key]))
            seen[key] += 1
        return [record.text for record in self._run.records_of(samples)]

    def _request(self, context: str, gen_kwargs: dict[str, Any]) -> generation_requests.Request:
        settings: dict[str, Any] = dict(_model_utils.normalize_gen_kwargs(gen_kwargs, self._max_gen_toks))
        num_tokens, stop, seed = settings.pop("max_gen_toks"), settings.pop("until"), settings.pop("seed", self._seed)
        settings.pop("do_sample")
        if unknown := sorted(settings.keys() - config.SAMPLING_RULES.keys()):
            raise ValueError(f"gen_kwargs has {unknown[0]!r}: its keys are {', '.join(config.SAMPLING_RULES)}, seed")
        files = self._run.files
        # As in other models of the harness, the end of a long context is kept, with room for the continuation.
        room = files.window - num_tokens if num_tokens < files.window else files.window
        ids = tuple(self.tok_encode(context)) or (self.prefix_token_id,)
        return generation_requests.Request(
            prompt_ids=ids[-room:],
            sample=0,
            generation=config.GenerationConfig(
                num_tokens=num_tokens, seed=seed, eos_id=files.checkpoint.eos_id, stop=tuple(filter(None, stop))
            ),
            sampling=dataclasses.replace(_NEUTRAL, **settings).with_ids(
                files.vocabulary.id_of, files.vocabulary.vocab_size
            ),
            prompt=context,
        )


def main() -> None:
    """Runs ``lm_eval`` with this model registered."""
    try:
        _main.cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"lm_eval: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
