"""Samples from prompts: the one driver over the decode step, for a stream and for a batch."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hipgpt_jax import config
from hipgpt_jax.generation import decoding, events, facts, sampling
from hipgpt_jax.model import cache as kv
from hipgpt_jax.model import transformer

_SMALLEST_BUCKET = 8


class Sampler:
    """Draws tokens from a model, ``width`` samples side by side.

    Streams and batches run the same compiled step, so they give the same tokens bit for bit; the
    step is called from Python one token ahead of the one being fetched, so the device does not wait.
    A scan over the step is no faster from D256 L8 on (626 and 652 tokens/s on 2 CPU cores; 26 and 36
    at GPT-2's size, where it copies the cache).
    """

    def __init__(self, model: config.ModelConfig, params: Any, decode: config.DecodingConfig) -> None:
        """Prepares a sampler; nothing is compiled until the first token.

        Args:
            model: Shape of the model.
            params: Its parameters.
            decode: Window, stride, overflow rule and width.

        Raises:
            ValueError: The window or the stride does not fit the model.
        """
        self.model = model
        self.window = decode.resolve_window(model)
        self._decode = decode
        self.params = jax.device_put(params)
        module = transformer.Transformer(model)
        self._sizes = kv.part_sizes(self.window)
        self._starts = np.cumsum((0, *self._sizes))
        read = functools.partial(decoding.read_window, module, sizes=self._sizes)
        self._read = jax.jit(read, static_argnames="length")
        self._advance = jax.jit(functools.partial(decoding.advance, module))
        self._append = jax.jit(_append, donate_argnums=0)
        self._roll = jax.jit(functools.partial(_roll, module, stride=decode.window_stride, sizes=self._sizes))
        self._measure = jax.jit(facts.measure, static_argnames="alternatives")
        self._where = jax.jit(decoding.where)
        self._where_cache = jax.jit(kv.where)

    def load(self, params: Any) -> None:
        """Takes other parameters of the same model; nothing compiles again."""
        self.params = jax.device_put(params)

    def run(self, requests: Iterable[events.Request], *, measure: bool = False) -> Iterator[events.Event]:
        """Yields the tokens of each request as they are drawn, and how it ended.

        Requests are taken ``width`` at a time; a last partial group is padded. Within a group the
        events of its samples alternate, token by token.

        Args:
            requests: Taken as they are needed.
            measure: Whether events carry facts; it changes no token.

        Raises:
            ValueError: A request is empty, or cannot fit the window where overflow is an error.
        """
        source = iter(requests)
        first = 0
        while group := list(itertools.islice(source, self._decode.width)):
            for request in group:
                self.check(request)
            yield from self._run_group(first, group, measure)
            first += len(group)

    def check(self, request: events.Request) -> None:
        """Raises ValueError where a request cannot be served."""
        if not request.prompt_ids:
            raise ValueError("the prompt is empty: it must hold at least one token")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.model.vocab_size:
            raise ValueError(
                f"the prompt's ids must be at least 0 and below the vocabulary's size {self.model.vocab_size}"
            )
        request.generation.check_vocabulary(self.model.vocab_size)
        self._decode.check_fits(self.window, len(request.prompt_ids), request.generation.num_tokens)

    def _run_group(self, first: int, group: list[events.Request], measure: bool) -> Iterator[events.Event]:
        limit_B = [self._limit(request) for request in group]
        active_B = np.array([limit > 0 for limit in limit_B] + [False] * (self._decode.width - len(group)))
        for row, limit in enumerate(limit_B):
            if limit == 0:
                yield events.Event(index=first + row, finish_reason="length")
        if not active_B.any():
            return
        alternatives = any(request.generation.top_logprobs for request in group)
        rows, before = self._start(group)
        length_B = np.array(before.length_B)
        state, cache = self._read_prompts(rows, before, length_B)
        for drawn in itertools.count(1):
            newest = state
            measured = self._measure(rows, before, newest, alternatives=alternatives) if measure else None
            wanted_B = active_B.copy()
            wanted_B[: len(group)] &= np.array(limit_B) > drawn
            if wanted_B.any():
                before = newest
                state, cache = self._step(rows, newest, cache, length_B, wanted_B)
            token_B, measured = np.asarray(newest.token_B), jax.device_get(measured)
            for row in np.flatnonzero(active_B).tolist():
                found = None if measured is None else events.facts_of(measured, row)
                event = events.event_of(first + row, int(token_B[row]), found, group[row], last=drawn == limit_B[row])
                active_B[row] = event.finish_reason is None
                yield event
            if not active_B.any():
                return

    def _limit(self, request: events.Request) -> int:
        """Tokens that a sample may have before it ends for want of tokens or of window."""
        if self._decode.overflow != "stop":
            return request.generation.num_tokens
        return min(request.generation.num_tokens, self.window - min(len(request.prompt_ids), self.window) + 1)

    def _start(self, group: Sequence[events.Request]) -> tuple[decoding.Rows, decoding.State]:
        """The state before the prompts are read; rows without a request repeat the first one."""
        padded = [*group, *[group[0]] * (self._decode.width - len(group))]
        B, W, V = len(padded), self.window, self.model.vocab_size
        context_BS, seen_BV = np.zeros((B, W), np.int32), np.zeros((B, V), bool)
        for row, request in enumerate(padded):
            kept = request.prompt_ids[-W:]
            context_BS[row, : len(kept)] = kept
            seen_BV[row, list(request.prompt_ids)] = True
        keys = [sampling.sample_key(r.generation.seed, r.prompt_ids, r.sample) for r in padded]
        rows = decoding.Rows(
            key_B2=jnp.stack([jax.random.key_data(key) for key in keys]),
            settings=sampling.settings([request.sampling for request in padded]),
        )
        state = decoding.State(
            index_B=jnp.zeros(B, jnp.int32),
            token_B=jnp.zeros(B, jnp.int32),
            length_B=jnp.asarray([min(len(request.prompt_ids), W) for request in padded], jnp.int32),
            context_BS=jnp.asarray(context_BS),
            seen_BV=jnp.asarray(seen_BV),
            logits_BV=jnp.zeros((B, V), jnp.float32),
        )
        return rows, state

    def _read_prompts(
        self, rows: decoding.Rows, start: decoding.State, length_B: np.ndarray
    ) -> tuple[decoding.State, tuple[kv.Cache, ...]]:
        """Reads each row in its own bucket, so that no other row's length touches its arithmetic."""
        bucket_B = np.array([bucket(int(length), self.window) for length in length_B])
        read = {size: self._read(self.params, rows, start, length=size) for size in sorted(set(bucket_B.tolist()))}
        (size, (state, cache)), *others = read.items()
        for size, (other_state, other_cache) in others:
            state = self._where(bucket_B == size, other_state, state)
            cache = self._where_cache(bucket_B == size, other_cache, cache)
        return state, cache

    def _step(
        self,
        rows: decoding.Rows,
        state: decoding.State,
        cache: tuple[kv.Cache, ...],
        length_B: np.ndarray,
        wanted_B: np.ndarray,
    ) -> tuple[decoding.State, tuple[kv.Cache, ...]]:
        """Draws a token for every row that wants one: from the cache, or anew where its window is full.

        ``length_B`` is the host's copy of the state's lengths and is brought up to date in place.
        """
        full_B = (length_B >= self.window) & wanted_B
        rolled = self._roll(self.params, rows, state) if full_B.any() else None
        if (cached_B := wanted_B & ~full_B).any():
            live = np.searchsorted(self._starts, length_B[cached_B].max())
            next_state, new = self._advance(self.params, rows, state, cache[:live])
            parts = list(cache)
            for place in set((np.searchsorted(self._starts, length_B[cached_B], side="right") - 1).tolist()):
                parts[place] = self._append(parts[place], new, state.length_B, self._starts[place])
            cache = tuple(parts)
            if rolled is not None:
                next_state = self._where(full_B, rolled[0], next_state)
                cache = self._where_cache(full_B, rolled[1], cache) if rolled[1] else cache
            state = next_state
        elif rolled is not None:
            state, cache = rolled[0], rolled[1] or cache
        length_B[:] = np.where(full_B, self.window - self._decode.window_stride + 1, length_B + 1)
        return state, cache


def bucket(length: int, window: int) -> int:
    """Returns the slots read for a prompt: 8, 12, 16, 24, 32, 48, … or the window.

    A length compiles nothing that another length of its bucket has compiled, and at most a third of
    a bucket above 8 is padding.

    >>> [bucket(length, window=100) for length in (1, 9, 13, 70, 100)]
    [8, 12, 16, 96, 100]
    """
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, window)


def _append(part: kv.Cache, new: kv.Cache, length_B: jax.Array, start: jax.Array) -> kv.Cache:
    return kv.append(part, new, length_B - start)


def _roll(
    model: transformer.Transformer,
    params: Any,
    rows: decoding.Rows,
    state: decoding.State,
    *,
    stride: int,
    sizes: tuple[int, ...],
) -> tuple[decoding.State, tuple[kv.Cache, ...] | None]:
    """Slides the full window and reads it; with stride 1 the next token rolls again and needs no cache."""
    length = state.context_BS.shape[1] - stride + 1
    state = decoding.slide(state, stride=stride)
    state, cache = decoding.read_window(model, params, rows, state, length=length, sizes=sizes)
    return state, cache if stride > 1 else None
