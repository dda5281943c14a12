"""The draws of a given text: its ids are fed to the model, and every token is drawn again from those before it."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, logprobs, requests, sampling, scheduler, topk
from hipgpt_jax.records import replay

_ROWS = 64  # tokens that are drawn by one program
_TOKENS = 2048  # tokens of the contexts that one program computes, unless one context is longer


class Draws(NamedTuple):
    """The draws of a text, arrays ``[T]`` with one element per token.

    Attributes:
        token_T: Ids that the settings and the seed lead to after the text before them.
        stats: Statistics of those ids.
        logprob_T: Log-probability of the text's own ids in the model's distribution.
    """

    token_T: jax.Array
    stats: logprobs.TokenStats
    logprob_T: jax.Array


class Drawer:
    """Draws the tokens of given texts, many at a time, with the model of a scheduler."""

    def __init__(self, generator: scheduler.Scheduler, stride: int) -> None:
        """Compiles nothing yet.

        Args:
            generator: Scheduler of the model; its window is used.
            stride: Tokens by which a full window slides.
        """
        self._module, self._params = generator.module, generator.params
        self._plan = topk.plan_for(generator.model.vocab_size, "cpu")._replace(rule=generator.plan.rule)
        self._V, self._W, self._stride = generator.model.vocab_size, generator.window, stride

    def draw(self, request: requests.Request, ids: Sequence[int]) -> Draws:
        """Returns the draws of ids that follow a prompt.

        Args:
            request: The prompt, its settings, its seed and the index of its sample.
            ids: The ids.
        """
        if not ids:  # one row is padding
            return jax.tree.map(lambda x: x[:0], self._map(_draw, request, request.prompt_ids[:1]))
        return self._map(_draw, request, ids)

    def sampled_logprobs(
        self, settings: config.SamplingConfig, prompt_ids: Sequence[int], ids: Sequence[int]
    ) -> np.ndarray:
        """Returns the log-probability under sampling settings of every id of a text but the first, float32.

        Args:
            settings: The settings, with tokens given by their ids.
            prompt_ids: A prompt, of whose tokens the text begins with those in the window.
            ids: The text.
        """
        split = min(len(prompt_ids), self._W)
        parts = (ids[:1], ids[1:split]), (prompt_ids, ids[split:])
        generation = config.GenerationConfig(num_tokens=len(ids))
        found = []
        for prompt, rest in parts:
            request = requests.Request(prompt_ids=tuple(prompt), sample=0, generation=generation, sampling=settings)
            if rest:
                found.append(self._map(_sampled_logprob, request, rest))
        return np.concatenate(found)

    def distribution(self, request: requests.Request) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probability of every token after a prompt, before and after its settings, float32 ``[V]``."""
        length = len(request.prompt_ids)
        state = decoding.states_at(request, (), [self._start(request, length)], 0, W=self._W, V=self._V)
        logits_V = next(self._logits(request, request.prompt_ids[:1]))  # those before the first id, whichever it is
        before_BV, after_BV = _distribution(self._plan, state, logits_V[None])
        return np.asarray(before_BV)[0], np.asarray(after_BV)[0]

    def _map(self, function: Callable[..., Any], request: requests.Request, ids: Sequence[int]) -> Any:
        """Applies a function of states, logits and ids to all tokens of a text, ``_ROWS`` at a time."""
        parts: list[Any] = []
        logits = self._logits(request, ids)
        for first in range(0, len(ids), _ROWS):
            given = ids[first : first + _ROWS]
            rows = [self._start(request, len(request.prompt_ids) + first + row) for row in range(len(given))]
            states = decoding.states_at(request, ids, rows, first, W=self._W, V=self._V)
            arguments = states, np.stack([next(logits) for _ in given]), np.array(given, np.int32)
            # The last row is repeated, so that one shape is compiled.
            padded = jax.tree.map(
                lambda x: np.pad(x, [(0, _ROWS - len(x)), *[(0, 0)] * (x.ndim - 1)], "edge"), arguments
            )
            size = len(given)
            parts.append(jax.tree.map(functools.partial(_head, size), function(self._plan, *padded)))
        return jax.tree.map(lambda *several: np.concatenate(several), *parts)

    def _start(self, request: requests.Request, length: int) -> int:
        return replay.window_start(len(request.prompt_ids), length, self._W, self._stride)

    def _logits(self, request: requests.Request, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields the logits ``[V]`` after which each id is drawn."""
        text, prompt_length = (*request.prompt_ids, *ids), len(request.prompt_ids)
        T = min(self._W, 1 << (min(len(text), self._W) - 1).bit_length())  # few shapes are compiled
        lengths = range(prompt_length, prompt_length + len(ids))
        starts = ((self._start(request, length), length) for length in lengths)
        windows = [
            (text[start : start + T], [length - start for _, length in several])
            for start, several in itertools.groupby(starts, lambda pair: pair[0])
        ]
        for is_single, several in itertools.groupby(windows, lambda window: len(window[1]) == 1):
            # Of a window that slides at every token, only the last logits are needed.
            size = max(1, _TOKENS // T) if is_single else 1
            for group in _grouped(several, size):
                tokens_BT = np.zeros((size, T), np.int32)
                length_B = np.ones(size, np.int32)
                for row, (context, counts) in enumerate(group):
                    tokens_BT[row, : len(context)] = context
                    length_B[row] = counts[0]
                if is_single:
                    yield from np.asarray(_last_logits(self._module, self._params, tokens_BT, length_B))[: len(group)]
                else:
                    logits_TV = np.asarray(all_logits(self._module, self._params, tokens_BT))[0]
                    yield from (logits_TV[count - 1] for count in group[0][1])


_Window = tuple[Sequence[int], list[int]]


def _grouped(windows: Iterable[_Window], size: int) -> Iterator[list[_Window]]:
    """Yields windows in groups of ``size``; the last may have fewer."""
    iterator = iter(windows)
    while group := list(itertools.islice(iterator, size)):
        yield group


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Returns the logits ``[B, T, V]`` after each token."""
    return model.bind({"params": params})(tokens_BT, dropout=0.0)


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(model: Any, params: Any, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    return model.bind({"params": params}).prefill(tokens_BT, length_B)[0]


def _head(size: int, x: jax.Array) -> np.ndarray:
    return np.asarray(x)[:size]


@functools.partial(jax.jit, static_argnums=0)
def _draw(plan: topk.Plan, state: decoding.DecodeState, logits_BV: jax.Array, given_B: jax.Array) -> Draws:
    _, output = decoding.sample_next(state, logits_BV, plan)
    logprob_B = jnp.take_along_axis(_log_softmax(logits_BV), given_B[:, None], axis=-1)[:, 0]
    return Draws(output.token_B, output.stats, logprob_B)


def _log_softmax(logits_BV: jax.Array) -> jax.Array:
    shifted_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    return jnp.minimum(shifted_BV - jnp.log(jnp.exp(shifted_BV).sum(axis=-1, keepdims=True)), 0)


@functools.partial(jax.jit, static_argnums=0)
def _sampled_logprob(
    plan: topk.Plan, state: decoding.DecodeState, logits_BV: jax.Array, given_B: jax.Array
) -> jax.Array:
    return topk.at_rank(_distribution(plan, state, logits_BV)[1], given_B)


@functools.partial(jax.jit, static_argnums=0)
def _distribution(plan: topk.Plan, state: decoding.DecodeState, logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of all tokens, before and after the sampling settings."""
    _, output = decoding.sample_next(state, logits_BV, plan)
    adjusted_BV = sampling.adjust(decoding.restrict(state, logits_BV, plan), state.counts_BV, state.params)
    return _log_softmax(logits_BV), sampling.sampled_logprobs(adjusted_BV, state.params, output.stats.kept_B)
